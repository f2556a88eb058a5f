"""`paceline apply`: of an env file only our values change, nothing secret is shown, and the backup is whole."""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from governor.model.env_files import MADE_FROM, SCENARIO, policy_of, read_env_file, scenario_path, settings_digest
from governor.model.errors import BadInput, PacelineError
from governor.model.policy import KNOB_BY_ENV, Policy
from governor.run import apply as applying
from governor.run.apply import apply
from sim.app.cli import main

SECRET = "sk-do-not-show-me"
NEW = {
    "OPENAI_MAX_CONCURRENCY": "20",
    "OPENAI_STAGGER_SECONDS": "0",
    "OPENAI_TPM_HEADROOM": "0.01",
    "OPENAI_TPM_WINDOW": "bucket",
    "OPENAI_SYNC_HEADERS": "true",
}
# Lines as people write them: each twice, with the old value and with the new one.
LINES = {
    "plain": ("OPENAI_MAX_CONCURRENCY=3", "OPENAI_MAX_CONCURRENCY=20"),
    "export": ("export OPENAI_MAX_CONCURRENCY=3", "export OPENAI_MAX_CONCURRENCY=20"),
    "exported far": ("  export   OPENAI_MAX_CONCURRENCY = 3", "  export   OPENAI_MAX_CONCURRENCY = 20"),
    "double quotes": ('OPENAI_STAGGER_SECONDS="15"', 'OPENAI_STAGGER_SECONDS="0"'),
    "single quotes": ("OPENAI_STAGGER_SECONDS='15'", "OPENAI_STAGGER_SECONDS='0'"),
    "quotes and comment": (f'OPENAI_STAGGER_SECONDS="15" # {SECRET}', f'OPENAI_STAGGER_SECONDS="0" # {SECRET}'),
    "comment": (f"OPENAI_TPM_HEADROOM=0.15   # was {SECRET}", f"OPENAI_TPM_HEADROOM=0.01   # was {SECRET}"),
    "trailing blanks": ("OPENAI_TPM_HEADROOM=0.15  \t", "OPENAI_TPM_HEADROOM=0.01  \t"),
    "empty": ("OPENAI_TPM_WINDOW=", "OPENAI_TPM_WINDOW=bucket"),
    "empty in quotes": ('OPENAI_TPM_WINDOW=""', 'OPENAI_TPM_WINDOW="bucket"'),
    "empty with comment": ("OPENAI_TPM_WINDOW= # none", "OPENAI_TPM_WINDOW=bucket # none"),
    "quoted name": ("'OPENAI_SYNC_HEADERS'=false", "'OPENAI_SYNC_HEADERS'=true"),
    "duplicate": (
        "OPENAI_SYNC_HEADERS=true\nX=1\nOPENAI_SYNC_HEADERS=false",
        "OPENAI_SYNC_HEADERS=true\nX=1\nOPENAI_SYNC_HEADERS=true",
    ),
}
FOREIGN = (
    f"OPENAI_API_KEY={SECRET}",
    f"export DATABASE_URL='postgresql://u:{SECRET}@h/db?x=1#y'",
    f'CERTIFICATE="-----BEGIN-----\n{SECRET}\nOPENAI_MAX_CONCURRENCY=99\n-----END-----"',
    f'  JSON={{"key": "{SECRET}", \'a\': 1}}',
    "# OPENAI_MAX_CONCURRENCY=3 is commented out",
    "this is no line at all",
    "BARE",
    "",
    "   ",
    "ÜMLAUT=größe # né",
    "OPENAI_MAX_RETRIES=7",
    "OPENAI_TIMEOUT=20",
    "X='open",
)


def source_in(folder: Path, *, made_from: str = "", scenario: str = "") -> Path:
    path = folder / "recommended.env"
    head = f"{MADE_FROM} {made_from}\n\n" if made_from else ""
    head += f"{SCENARIO}={scenario}\n" if scenario else ""
    path.write_text(head + "".join(f"{name}={value}\n" for name, value in NEW.items()))
    return path


def hand_made(number: int) -> tuple[bytes, bytes]:
    """A file as somebody may have written it, and what must become of it. All draws follow from the number."""
    rng = random.Random(number)
    ours = rng.sample(sorted(LINES), rng.randint(0, len(LINES)))
    taken: set[str] = set()
    pairs: list[tuple[str, str]] = []
    for name in ours:
        setting = next(env for env in NEW if env in LINES[name][0])
        if setting not in taken:
            taken.add(setting)
            pairs.append(LINES[name])
    pairs += [(line, line) for line in rng.choices(FOREIGN[:-1], k=rng.randint(0, 12))]
    rng.shuffle(pairs)
    # A quote that never closes makes nonsense of one line alone only where no other quote follows it.
    if not any("'" in line for pair in pairs for line in pair):
        pairs.insert(0, (FOREIGN[-1], FOREIGN[-1]))
    pairs = pairs or [("# nothing", "# nothing")]
    end = rng.choice(["\n", "\n", "\r\n"])
    last = rng.choice([end, ""])
    bom = rng.choice([b"", b"", b"\xef\xbb\xbf"])
    old, new = ((end.join(p[i].replace("\n", end) for p in pairs) + last).encode() for i in (0, 1))
    added = [f"{name}={value}{end}" for name, value in NEW.items() if name not in taken]
    if added and not new.endswith(b"\n"):
        new += end.encode()
    return bom + old, bom + new + "".join(added).encode()


@pytest.mark.parametrize("number", range(60))
def test_only_our_values_change(tmp_path: Path, number: int, capsys) -> None:
    old, new = hand_made(number)
    target = tmp_path / ".env"
    target.write_bytes(old)
    target.chmod(0o640)
    source = source_in(tmp_path)
    code = main(["apply", str(source), str(target)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert target.read_bytes() == new
    assert SECRET not in out
    assert {line.split(":")[0] for line in out.splitlines()[:-1]} <= set(NEW)
    assert policy_of(target) == policy_of(source).with_()
    foreign = {name: each.value for name, each in read_env_file(target).items() if name not in KNOB_BY_ENV}
    (before,) = tmp_path.glob(".env.*.bak")
    assert before.read_bytes() == old
    assert foreign == {name: each.value for name, each in read_env_file(before).items() if name not in KNOB_BY_ENV}
    assert [stat.S_IMODE(path.stat().st_mode) for path in (target, before)] == [0o640, 0o600]
    # Once more there is nothing to do; and the backup is the way back.
    assert main(["apply", str(source), str(target)]) == 0
    assert "nothing to change" in capsys.readouterr().out
    os.replace(before, target)
    assert target.read_bytes() == old


def test_a_line_is_shown_with_its_number_and_nothing_is_written_by_a_dry_run(tmp_path: Path, capsys) -> None:
    target = tmp_path / ".env"
    target.write_text(f"KEY={SECRET}\n\nOPENAI_STAGGER_SECONDS=15\nOPENAI_TPM_HEADROOM=0.01\n")
    before = target.read_bytes()
    assert main(["apply", str(source_in(tmp_path)), str(target), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "OPENAI_MAX_CONCURRENCY: 3 -> 20 (added)",
        "OPENAI_STAGGER_SECONDS: 15 -> 0 (line 3)",
        "OPENAI_TPM_WINDOW: fixed -> bucket (added)",
        "OPENAI_SYNC_HEADERS: false -> true (added)",
        f"{target}: 4 settings would change; nothing was written",
    ]
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "recommended.env"]


def test_settings_that_changed_since_the_plan_are_not_replaced_unasked(tmp_path: Path) -> None:
    target = tmp_path / ".env"
    target.write_text("OPENAI_STAGGER_SECONDS=15\nOPENAI_MAX_CONCURRENCY=4\n")
    source = source_in(tmp_path, made_from=f"{'0' * 16} {settings_digest(policy_of(target))}")
    # The same settings, however they are written, are the same; others are refused.
    target.write_text("# moved\nOPENAI_MAX_CONCURRENCY=04\nOPENAI_RPM_LIMIT=0\n")
    assert len(apply(source, target, write=False).changes) == 5
    target.write_text("OPENAI_MAX_CONCURRENCY=5\n")
    with pytest.raises(BadInput, match=r"\.env: its settings are not those that .* was planned from: plan again"):
        apply(source, target)
    assert target.read_text() == "OPENAI_MAX_CONCURRENCY=5\n"
    apply(source, target, insist=True)
    assert policy_of(target).max_concurrency == 20
    # What is in force already needs no permission.
    assert apply(source, target).changes == ()


def test_the_scenario_is_named_as_it_is_seen_from_the_target(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "app" / "deep").mkdir(parents=True)
    target = tmp_path / "app" / "deep" / ".env"
    target.write_text("A=1\n")
    apply(source_in(tmp_path / "out", scenario="scenario.yaml"), target)
    assert read_env_file(target)[SCENARIO].value == "../../out/scenario.yaml"
    assert os.path.realpath(scenario_path(target, {})) == str(tmp_path / "out" / "scenario.yaml")
    assert "OPENAI_MAX_CONCURRENCY=20\n" in target.read_text()


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    real = tmp_path / "real" / "env"
    real.parent.mkdir()
    real.write_text("A=1\n")
    link = tmp_path / ".env"
    link.symlink_to(real)
    done = apply(source_in(tmp_path), link)
    assert link.is_symlink()
    assert policy_of(real).max_concurrency == 20
    assert done.backup is not None
    assert done.backup.parent == real.parent
    assert done.backup.read_text() == "A=1\n"


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def _read_only(*_: object) -> int:
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize(
    ("name", "fault", "complaint"),
    [("write", _full, "the disk is full"), ("open", _read_only, "read-only"), ("replace", _full, "the disk is full")],
)
def test_where_it_cannot_be_written_all_is_as_it_was(
    tmp_path: Path, monkeypatch, name: str, fault: Callable[..., int], complaint: str
) -> None:
    target = tmp_path / ".env"
    target.write_text("A=1\n")
    source = source_in(tmp_path)
    monkeypatch.setattr(applying.os, name, fault)
    with pytest.raises(BadInput, match=complaint):
        apply(source, target)
    monkeypatch.undo()
    assert target.read_text() == "A=1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "recommended.env"]


def test_ctrl_c_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / ".env"
    target.write_text("A=1\n")
    source = source_in(tmp_path)
    writes = itertools.count()
    write = os.write

    def interrupted(file: int, content: bytes) -> int:
        if next(writes) == 1:  # the backup
            raise KeyboardInterrupt
        return write(file, content)

    monkeypatch.setattr(applying.os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(source, target)
    monkeypatch.undo()
    assert target.read_text() == "A=1\n"
    assert [path.name for path in tmp_path.glob(".env*")] == [".env"]


def test_what_is_wrong_is_one_line(tmp_path: Path, capsys) -> None:
    source, target = source_in(tmp_path), tmp_path / ".env"
    (tmp_path / "foreign.env").write_text("A=1\n")
    for content, words in (
        (None, "there is no such file"),
        (b"", "the file is empty"),
        ("größe=1".encode("latin-1"), "not UTF-8 text"),
        (b"OPENAI_TPM_LIMIT=much\n", "OPENAI_TPM_LIMIT='much' is not allowed"),
        (b"OPENAI_TPM_LIMT=5\n", "did you mean OPENAI_TPM_LIMIT"),
    ):
        if content is not None:
            target.write_bytes(content)
        assert main(["apply", str(source), str(target)]) == 2
        err = capsys.readouterr().err
        assert (err.count("\n"), words in err) == (1, True), err
    target.write_text("A=1\n")
    for wrong, words in (
        (tmp_path, "folder"),
        (tmp_path / "foreign.env", "no Paceline setting"),
        (target, "one file"),
    ):
        with pytest.raises(PacelineError, match=words):
            apply(wrong, target)


def test_every_setting_can_be_written(tmp_path: Path) -> None:
    everything = Policy.preset("paceline").with_(tpm_limit=7, stagger_s=0.5, preflight_mode="strict")
    source, target = tmp_path / "all.env", tmp_path / ".env"
    source.write_text(everything.to_env(everything=True))
    target.write_text(Policy().to_env(everything=True))
    apply(source, target)
    assert policy_of(target) == everything
    assert len(target.read_text().splitlines()) == len(Policy().to_env(everything=True).splitlines())
