"""What the texts say is so: commands parse, snippets run, help texts are there and true, the reference is the code's.

The site itself is built by `make docs`, which `make check` runs: there a warning or a dead link is an error.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import governor
import sim
from governor import law
from governor.cli import serve as serve_cli
from governor.journal import schema
from governor.journal.journal import SET, UNSET
from governor.journal.rows import Command
from governor.journal.schema import metadata
from governor.model.policy import KNOBS
from governor.model.requests import CAUSES
from governor.run import longwaits, outputs
from governor.run.steer import held_settings
from sim.app.capacity_command import terms_of
from sim.app.inputs import PlanOptions
from sim.experiment import results
from sim.model import provider_tiers
from tests.commands import Shown, complaint, leaves, shown_in

ROOT = Path(__file__).resolve().parents[1]
TEXTS = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "ops").glob("*.md"), *(ROOT / "docs").rglob("*.md")]
)
TEXTS = [path for path in TEXTS if "made" not in path.parts]
SOURCES = ("governor", "sim", "benchmarks", "examples", "docs", "tests")


@pytest.fixture(scope="module")
def extension() -> Iterator[Callable[[str], Any]]:
    """Loads modules of `docs/_ext` by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "_ext"))
        yield importlib.import_module


# ---------------------------------------------------------------- commands in texts


def test_every_command_that_a_text_shows_is_one() -> None:
    shown = [each for path in TEXTS for each in shown_in(path)]
    assert sum(each.whole for each in shown) > 40
    faults = [said for each in shown if (said := complaint(each))]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("    paceline simulat requests.jsonl\n", "there is no command simulat"),
        ("    paceline plan requests.jsonl --effrt quick\n", "effrt"),
        ("    paceline plan requests.jsonl \\\n        --effort fast\n", "fast"),
        ("```console\n$ X=1 paceline run requests.jsonl &\n```\n", "--out"),
        ("Use `paceline status --all`.\n", "no option --all"),
        ("Use `paceline token ad`.\n", "there is no command ad"),
        ("```{ran} paceline simulate\n```\n", "WORKLOAD"),
        ("    paceline simulate requests.jsonl --tpm many  # no number\n", "many"),
    ],
)
def test_a_command_that_is_none_is_seen(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(text)
    (shown,) = shown_in(path)
    assert isinstance(shown, Shown)
    assert fault in complaint(shown)


def test_every_snippet_of_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of one page after each other, as a reader would type them in the project's folder."""
    monkeypatch.chdir(ROOT)
    count = 0
    for path in TEXTS:
        names: dict[str, Any] = {"__name__": "snippet"}
        for snippet in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            exec(compile(snippet, str(path), "exec"), names)
            count += 1
    assert count
    assert "makespan" in capsys.readouterr().out


def test_what_is_cited_is_there() -> None:
    """A page of `docs` with its section, in code and texts; nothing is cited that a reader does not have."""
    cited: dict[str, set[str]] = {}
    sources = (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    for path in (*TEXTS, *sources):
        text = path.read_text(encoding="utf-8")
        for page, first, more in re.findall(r"docs/([\w/-]+\.md)#([\w-]+)((?:(?:,| and)\s#[\w-]+)*)", text):
            cited.setdefault(page, set()).update([first, *re.findall(r"#([\w-]+)", more)])
        assert not re.search(r"\b(PROVIDER-FACTS|DESIGN\b(?!_))", text) or path == Path(__file__), path
    assert "buckets" in cited["explanation/provider.md"]
    for page, sections in cited.items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        headings = {"-".join(re.findall(r"\w+", title.lower())) for title in re.findall(r"^##+ (.*)", text, re.M)}
        assert sections <= headings, page


# ---------------------------------------------------------------- help


def asked(name: str, *words: str) -> Command:
    return Command(1, 0.0, name, words, -1.0, "")


# What a help text says in words of an option that is left out, and whether it is so; of "all" there is nothing to see.
LEFT_OUT: dict[tuple[str, str], Callable[[], object]] = {
    ("--objective", "makespan"): lambda: PlanOptions().objective == "makespan",
    ("--max-throttled-per-100", "1"): lambda: PlanOptions().max_throttled_per_100 == 1,
    ("--max-lost", "0"): lambda: PlanOptions().max_lost == 0,
    ("--effort", "normal"): lambda: PlanOptions().effort == "normal",
    ("--confidence", "0.95"): lambda: results.CONFIDENCE == 0.95,
    ("--journal", "RESULTS.journal.db"): lambda: outputs.journal_path(Path("a/r.jsonl")) == Path("a/r.journal.db"),
    ("--finish-by", "a day"): lambda: longwaits.DAY_S == 24 * 60 * 60,
    ("--latency", "gpt-4o"): lambda: provider_tiers.DEFAULT_LATENCY == "gpt-4o",
    ("--database", "paceline-service.db"): lambda: serve_cli.DEFAULT_DATABASE == "paceline-service.db",
    ("--batch-turnaround", "4h,20h"): lambda: terms_of(1, "4h,20h", None, None) == terms_of(1, None, None, None),
    ("--pool", "all"): lambda: True,
    ("names", "all"): lambda: held_settings([asked(SET, "A=1", "B=2"), asked(UNSET)], ["p"]) == {"p": {}},
}
_LEFT_OUT = re.compile(r"; (\S+) if not given|default: ([^.;]+)\.|, else ([^ ,;]+)\.")


def test_every_command_and_option_has_help() -> None:
    faults = []
    for name, command in leaves():
        if not (command.help or "").strip():
            faults.append(name)
        for p in command.params:
            # An option that is not shown is for the tests alone.
            if not getattr(p, "hidden", False) and not (p.help or "").strip():
                faults.append(f"{name} {p.opts[0]}")
    assert not faults, f"without a help text: {faults}"


def test_what_help_says_of_an_option_that_is_left_out_is_so() -> None:
    said = {
        (p.opts[0], "".join(words))
        for _, command in leaves()
        for p in command.params
        for words in _LEFT_OUT.findall(p.help or "")
    }
    assert said == set(LEFT_OUT)
    assert [claim for claim, is_so in LEFT_OUT.items() if not is_so()] == []


def test_a_default_that_help_shows_is_the_functions_own() -> None:
    for name, command in leaves():
        context = command.make_context(name, [], resilient_parsing=True)
        text = " ".join(command.get_help(context).split())
        for p in command.params:
            default = p.get_default(context)
            if isinstance(default, bool) or default in (None, "") or not p.opts[0].startswith("--") or p.hidden:
                continue
            shown = text[text.index(f" {p.opts[0]} ") :]
            assert re.search(rf"\[default: {re.escape(str(default))}[;\]]", shown), f"{name} {p.opts[0]}"


# ---------------------------------------------------------------- what the reference is made of


def test_the_reference_of_commands_has_them_all(extension: Any) -> None:
    text = extension("pages").commands()
    for name, command in leaves():
        section = text[text.index(f"`{name}`\n") :].split("\n## ")[0]
        for p in command.params:
            shown = p.opts[0] if p.opts[0].startswith("--") else (p.metavar or p.name.upper()).strip(".")
            assert shown in section or p.hidden, f"{name} {p.opts[0]}"


def test_the_reference_names_what_the_code_has(extension: Any) -> None:
    pages = extension("pages")
    settings, journal, http = pages.settings(), pages.journal(), pages.http()
    assert [knob.env for knob in KNOBS if f"`{knob.env}`" not in settings] == []
    assert [table for table in metadata.tables if f"**`{table}`**" not in journal] == []
    assert {name for name, _ in pages.listed(schema.__doc__)} == set(metadata.tables)
    assert "| `contestra_openai_active_concurrency` | gauge |" in pages.metric_names()
    assert [path for path in ("POST /batches", "GET /batches/{batch_id}") if f"`{path}`" not in http] == []


def test_the_reference_of_python_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    public = [f"{package.__name__}.{name}" for package in (governor, sim) for name in package.__all__]
    assert [name for name in public if f":: {name}\n" not in text and "__" not in name] == []


def test_every_cause_of_the_law_is_named_and_drawn(extension: Any) -> None:
    pages, diagram = extension("pages"), extension("diagram")
    constants = pages._cause_constants()
    assert {getattr(law, name): name for name in constants.values()} == constants
    assert [CAUSES[number] for number in constants][1:] == list(diagram.WAITING)
    moves = diagram.observed()
    assert {to for _, to, _ in moves} >= {*diagram.WAITING, diagram.FLYING, diagram.ANSWERED, diagram.LOST}
    functions = {by for _, _, by in moves} - {diagram.STOP}
    assert all(callable(getattr(law, by)) for by in functions)
    # What goes into a state that is not the last comes out of it again.
    for state in (*diagram.WAITING, diagram.FLYING, diagram.BACKING_OFF, diagram.CUT, diagram.AT_ONCE):
        came = sum(count for (_, to, _), count in moves.items() if to == state)
        went = sum(count for (before, _, _), count in moves.items() if before == state)
        assert came == went > 0, state
    picture = diagram.svg(moves)
    assert all(f">{state}<" in picture for state in (*diagram.INSIDE, *diagram.PLACES))


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ('<script src="https://cdn.example.com/a.js"></script>', "loads https://cdn.example.com/a.js"),
        ('<link rel="stylesheet" href="//fonts.example.com/css">', "loads //fonts.example.com/css"),
        ("<style>@import 'https://example.com/a.css';</style>", "loads https://example.com/a.css"),
        ('<p style="background: url(http://example.com/a.png)">', "loads http://example.com/a.png"),
        ('<img srcset="a.png 1x, https://example.com/b.png 2x">', "loads https://example.com/b.png"),
        ('<a href="gone.html">', "leads nowhere: gone.html"),
        ('<a href="#gone">', "no such place on that page: #gone"),
        ('<a href="https://nowhere">', "no address: https://nowhere"),
        ('<a href="https://example.com/a"><a href="#here" id="here"><img src="data:image/png;base64,AA==">', ""),
    ],
)
def test_what_a_page_may_not_do_is_seen(page: str, fault: str, extension: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "index.html").write_text(page)
    assert list(extension("outside").faults(tmp_path)) == ([f"index.html: {fault}"] if fault else [])


def test_a_style_sheet_that_loads_from_elsewhere_is_seen(extension: Any, tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("@font-face { src: url('https://fonts.example.com/a.woff2') }")
    assert list(extension("outside").faults(tmp_path)) == ["a.css: loads https://fonts.example.com/a.woff2"]


def test_a_command_that_fails_ends_the_build(extension: Any) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 2: .*gone\.jsonl"):
        extension("ran").printed("paceline simulate gone.jsonl")
