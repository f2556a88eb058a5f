"""`paceline apply`: write the settings of one env file into another and touch nothing else in it.

A production file holds secrets, comments and other programs' names, in its own quotes and line ends. Of a line that
states a setting of ours only the value is replaced; if several lines state it, that of the last, which is the one that
counts. Settings that the file does not state are appended. Every other byte stays as it was, and only our own names and
values are ever shown.

A plan's env file says which settings it was made from. Applied to other settings it would not do what the plan said, so
that is refused. The old file stays beside the new one as a backup that only its owner can read.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dotenv.parser import Binding, parse_stream

from governor.model.env_files import MADE_FROM, SCENARIO, policy_of, read_env_file, settings_digest
from governor.model.errors import BadInput
from governor.model.files import why
from governor.model.policy import KNOBS, LIMITS
from governor.model.pools import PROFILE, is_name
from governor.run.outputs import check_apart

_BOM = b"\xef\xbb\xbf"
_VALUE = re.compile(
    r"""(?P<before>\s*(?:export[^\S\r\n]+)?'?[^=\#\s']+'?[^\S\r\n]*=)   # the name, as dotenv reads it
    (?P<blank>[^\S\r\n]*)
    (?P<value>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?:(?![^\S\r\n]+\#)[^\r\n])*?)
    (?P<after>[^\S\r\n]*(?:[^\S\r\n]\#[^\r\n]*)?(?:\r\n|\n|\r|$))""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class SettingChange:
    """One setting that changes. `line`: its place in the target, from 1; 0 = it is appended."""

    name: str
    old: str
    new: str
    line: int

    def __str__(self) -> str:
        where = f"line {self.line:,}" if self.line else "added"
        return f"{self.name}: {self.old or 'not set'} -> {self.new} ({where})"


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """The changes made, or to be made. `backup`: None if nothing was written. `content`: the new file's bytes."""

    changes: tuple[SettingChange, ...]
    backup: Path | None
    content: bytes


def apply(source: Path, target: Path, *, write: bool = True, insist: bool = False) -> ApplyResult:
    """Write the settings that `source` states into `target`, an existing file.

    Without `write` the changes are only returned. With `insist` they are made even if a plan made `source` from other
    settings than the target's. Raise BadInput, in one line, for files that cannot be read or written, hold no settings
    of ours, or have changed since the plan; then the target is as it was.
    """
    check_apart({"the settings": source, "the target": target})
    wanted = _wanted(source, target)
    stated = read_env_file(target)
    raw = _bytes_of(target)
    current = {knob.env: knob.text(getattr(policy_of(target), knob.name)) for knob in KNOBS}
    for name in (SCENARIO, PROFILE, LIMITS):
        if name in stated:
            current[name] = (stated[name].value or "").strip()
    changed = {name: value for name, value in wanted.items() if current.get(name, "") != value}
    if changed and not insist:
        _check_unchanged(source, target)
    content, lines = with_values(raw, changed)
    changes = tuple(SettingChange(name, current.get(name, ""), value, lines[name]) for name, value in changed.items())
    if not (changes and write):
        return ApplyResult(changes, None, content)
    return ApplyResult(changes, _replace(target, raw, content), content)


def write_settings(target: Path, values: Mapping[str, str]) -> ApplyResult:
    """Put settings into an env file, and nothing else of it; a backup lies beside it. See `apply`."""
    raw = _bytes_of(target)
    policy = policy_of(target)
    current = {knob.env: knob.text(getattr(policy, knob.name)) for knob in KNOBS}
    changed = {name: value for name, value in values.items() if current.get(name, "") != value}
    content, lines = with_values(raw, changed)
    changes = tuple(SettingChange(name, current[name], value, lines[name]) for name, value in changed.items())
    return ApplyResult(changes, _replace(target, raw, content) if changes else None, content)


def _wanted(source: Path, target: Path) -> dict[str, str]:
    """Return our names in the source with their values; paths of scenario and profile are made relative to
    the target."""
    stated = read_env_file(source)
    policy = policy_of(source)
    wanted = {knob.env: knob.text(getattr(policy, knob.name)) for knob in KNOBS if knob.name in policy.model_fields_set}
    for name in (SCENARIO, PROFILE, LIMITS):
        named = (stated[name].value or "").strip() if name in stated else ""
        if named and (name == LIMITS or (name == PROFILE and is_name(named))):
            wanted[name] = named
        elif named:
            folder = os.path.realpath(target.parent)
            path = os.path.realpath(source.parent / named)
            wanted[name] = path if os.path.isabs(named) else Path(os.path.relpath(path, folder)).as_posix()
    if not wanted:
        raise BadInput("it contains no Paceline setting: see `paceline settings`", str(source))
    return wanted


def _check_unchanged(source: Path, target: Path) -> None:
    """Raise BadInput if the source was made from other settings than those that the target states now."""
    text = source.read_text(encoding="utf-8-sig")
    made_from = re.search(rf"^{re.escape(MADE_FROM)}((?: [0-9a-f]{{16}})+)\s*$", text, re.MULTILINE)
    if made_from is not None and settings_digest(policy_of(target)) not in made_from[1].split():
        raise BadInput(
            f"its settings are not those that {source} was planned from: plan again with --env-file {target}, or add "
            "--force to apply it anyway",
            str(target),
        )


# ---------------------------------------------------------------- the text


def with_values(raw: bytes, values: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the file's bytes with these values of our names, and the line of each, 0 if it was appended."""
    bom = _BOM if raw.startswith(_BOM) else b""
    text = raw.removeprefix(_BOM).decode("utf-8")
    parts = list(parse_stream(io.StringIO(text, newline="")))
    last = {part.key: i for i, part in enumerate(parts) if part.key in values and part.value is not None}
    texts = [part.original.string for part in parts]
    lines = dict.fromkeys(values, 0)
    for name, i in last.items():
        assert name is not None
        texts[i] = _replaced_value(parts[i], values[name])
        blank = texts[i][: len(texts[i]) - len(texts[i].lstrip())]
        lines[name] = parts[i].original.line + blank.count("\n")
    found = "".join(texts)
    end = "\r\n" if "\r\n" in text else "\n"
    added = [f"{name}={_written(value)}{end}" for name, value in values.items() if not lines[name]]
    if added and found and not found.endswith(("\n", "\r")):
        found += end
    return bom + (found + "".join(added)).encode(), lines


def _replaced_value(part: Binding, value: str) -> str:
    """Return the line with another value, in its present quotes."""
    text = part.original.string
    found = _VALUE.fullmatch(text)
    assert found is not None, "dotenv has read it"
    old = found["value"]
    if not part.value and old[:1] not in ("'", '"'):
        # An empty value: the text that the pattern took for it is the comment behind it.
        return found["before"] + _written(value) + text[len(found["before"]) :]
    quote = old[0] if old[:1] in ("'", '"') and old[-1:] == old[0] and len(old) > 1 else ""
    new = f"{quote}{value}{quote}" if quote else _written(value)
    return f"{found['before']}{found['blank']}{new}{found['after']}"


def _written(value: str) -> str:
    """Return a value as it is written: without quotes, or quoted if it must be."""
    return (
        value if re.fullmatch(r"[\w./:@%+,-]*", value) else "'" + value.replace("\\", "\\\\").replace("'", r"\'") + "'"
    )


# ---------------------------------------------------------------- the file


def _bytes_of(target: Path) -> bytes:
    try:
        return target.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror or error}", str(target)) from None


def _replace(target: Path, raw: bytes, content: bytes) -> Path:
    """Write the backup, then put the new file in the old one's place, with its permissions and owner.

    If that fails, the target is as it was. A symbolic link stays a link.
    """
    real = Path(os.path.realpath(target))
    before = real.stat()
    if not stat.S_ISREG(before.st_mode):
        raise BadInput("cannot be changed: it is not an ordinary file", str(target))
    unfinished = real.with_name(f".{real.name[:200]}.{secrets.token_hex(4)}.part")
    backup = None
    try:
        with _private(unfinished) as file:
            _write_all(file, content)
        # Mode, owner, and whatever else the file system records; the time of the change is now.
        with contextlib.suppress(OSError):
            shutil.copystat(real, unfinished)
        os.utime(unfinished)
        _same_owner(unfinished, before)
        backup = _backed_up(real, raw)
        if real.read_bytes() != raw:
            raise BadInput("it was changed by another program just now: try again", str(target))
        os.replace(unfinished, real)
    except BaseException as error:
        if backup is not None:
            with contextlib.suppress(OSError):
                backup.unlink()
        if isinstance(error, OSError):
            raise BadInput(f"cannot be changed: {why(error)}", str(target)) from None
        raise
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return backup


def _backed_up(real: Path, raw: bytes) -> Path:
    """Write a copy that only its owner can read, under an unused name."""
    moment = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, 100):
        backup = real.with_name(f"{real.name}.{moment}{f'-{number}' if number > 1 else ''}.bak")
        try:
            with _private(backup) as file:
                _write_all(file, raw)
            return backup
        except FileExistsError:
            continue
        except BaseException:
            with contextlib.suppress(OSError):
                backup.unlink()
            raise
    raise OSError(errno.EEXIST, f"there are 99 backups of this second, up to {backup.name}")


@contextlib.contextmanager
def _private(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        yield file
        os.fsync(file)
    finally:
        os.close(file)


def _write_all(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]


def _same_owner(path: Path, before: os.stat_result) -> None:
    now = path.stat()
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        os.chown(path, before.st_uid, before.st_gid)
    if stat.S_IMODE(path.stat().st_mode) != stat.S_IMODE(before.st_mode):
        path.chmod(stat.S_IMODE(before.st_mode))
