"""The house keeps its shape: imports point one way, the pure half stays pure, the version and the lock stand once.

Read from the syntax trees, never by importing, so that an import inside a function or behind an `if` counts as well.
The upper half of `governor` is pure, and only the command line imports a `cli`; which room may import which stands in
pyproject.toml, for import-linter.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("governor", "sim", "paceline")

UPPER = (
    "law",
    *(
        f"model.{name}"
        for name in (
            "policy",
            "keyed",
            "knobs",
            "needs",
            "params",
            "requests",
            "estimate",
            "errors",
            "phrases",
        )
    ),
    *("provider.answers", "provider.codes", "provider.rate_limit_headers"),
    *(f"scheduler.{name}" for name in ("interfaces", "learning", "queue", "quota", "scheduler")),
    *("forecast.preflight", "forecast.summary", "forecast.summary_html"),
)
# Compiled as they stand, so numbers and `math` are all they may know; a dataclass is the bag, not part of a function.
NUMBERS_ONLY = {"law": {"math", "dataclasses"}, "model.keyed": {"math", "dataclasses"}}
# No clock, no chance, no I/O, no threads among these. `datetime` is a value here: its clocks are barred by name below.
TYPES = {"__future__", "abc", "types", "typing"}
VALUES = {"array", "collections", "dataclasses", "datetime", "decimal", "enum", "fractions"}
FUNCTIONS = {"bisect", "functools", "heapq", "itertools", "math", "operator", "statistics"}
TEXT = {"difflib", "email.utils", "json", "re", "string", "textwrap"}
PURE = TYPES | VALUES | FUNCTIONS | TEXT
# What a provider's answers mean stands in tables that come along as files, read once.
_PROFILES = {"governor.profiles.loader", "governor.profiles.schema"}
PURE_EXTRA = {
    "model.policy": {"pydantic"},
    **dict.fromkeys(("provider.answers", "provider.codes", "provider.rate_limit_headers"), _PROFILES),
}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "compile", "__import__", "breakpoint"}
CLOCK_METHODS = {"now", "utcnow", "today"}
# The provider is sans-IO as well: one limiter serves the simulation and the HTTP server.
SANS_IO = {"asyncio", "http", "logging", "os", "random", "secrets", "simpy", "socket", "threading", "time"}

# Where a distribution's import name is not its own name.
DISTRIBUTIONS = {
    "dotenv": "python-dotenv",
    "opentelemetry": "opentelemetry-api",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
}
# Who may use what beyond the base (governor) and beyond base + `sim` (sim): the extra that a module needs.
MODULE_EXTRAS = {
    "governor/run/rows.py": {"sim"},  # `to_frame`
    **{f"sim/serving/{name}.py": {"server"} for name in ("batches", "server")},
    "sim/experiment/ray_side.py": {"ray"},
    "governor/telemetry/tracing.py": {"otel"},
    "sim/reporting/sliders.py": {"notebook"},
    **{f"governor/sharedquota/{name}.py": {"redis"} for name in ("image", "member", "recovery", "redis_store")},
}
# Libraries with exactly one door.
ONE_DOOR = {
    "openai": "governor/provider/openai_adapter.py",
    "ray": "sim/experiment/ray_side.py",
    "redis": "governor/sharedquota/redis_store.py",
}


# Who lives in such a folder may use that extra.
FOLDER_EXTRAS = {"governor/service/": {"service"}, "governor/adapters/": {"adapters"}}


def extras_of(path: Path) -> set[str]:
    found = set(MODULE_EXTRAS.get(name_of(path), ()))
    return found.union(*(extras for folder, extras in FOLDER_EXTRAS.items() if name_of(path).startswith(folder)))


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def nodes(node: ast.AST, *, types: bool = True) -> Iterator[ast.AST]:
    """All nodes below this one; without `types` not those that type checkers alone read."""
    for child in ast.iter_child_nodes(node):
        if types or not isinstance(child, ast.If) or "TYPE_CHECKING" not in ast.dump(child.test):
            yield child
            yield from nodes(child, types=types)


def imports(path: Path, *, types: bool = True) -> Iterator[tuple[str, int]]:
    """Every module that `path` imports, anywhere in it, in full: `from governor import law` is `governor.law`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in nodes(tree(path), types=types):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            if stem in PACKAGES or (ROOT / Path(*stem.split(".")) / "__init__.py").is_file():
                yield from ((f"{stem}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield stem, node.lineno


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared(*extras: str) -> list[Requirement]:
    """The requirements of the base and of these extras, as written."""
    project = pyproject()["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def locked() -> dict[str, str]:
    """The lock: name -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def complain(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def impurities(module: str, path: Path) -> list[str]:
    """What the upper-half module `module` does that its half of the house may not, one line each."""
    allowed = NUMBERS_ONLY.get(module, PURE | PURE_EXTRA.get(module, set()) | {f"governor.{name}" for name in UPPER})
    faults = []
    for imported, line in imports(path):
        # `governor.law.Params` is governor.law, and `collections.abc` is collections.
        parts = imported.split(".")
        if not any(".".join(parts[:length]) in allowed for length in range(1, len(parts) + 1)):
            faults.append(f"{path.name}:{line} imports {imported}")
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
            faults.append(f"{path.name}:{node.lineno} calls {node.func.id}()")
        if isinstance(node.func, ast.Attribute) and node.func.attr in CLOCK_METHODS:
            owner = ast.unparse(node.func.value)
            if owner.split(".")[-1] in {"datetime", "date"}:
                faults.append(f"{path.name}:{node.lineno} reads the clock: {owner}.{node.func.attr}()")
    return faults


@pytest.mark.parametrize("module", UPPER)
def test_upper_half_does_no_io_and_reads_no_clock(module: str) -> None:
    complain(impurities(module, ROOT / "governor" / f"{module.replace('.', '/')}.py"))


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("law", "import numpy\n", "imports numpy"),
        ("law", "from governor.model import policy\n", "imports governor.model.policy"),
        ("forecast.summary", "def f():\n    from time import monotonic\n", "imports time"),
        ("provider.answers", "from email import message\n", "imports email"),
        ("forecast.preflight", "from governor.scheduler.driver import Driver\n", "imports governor.scheduler.driver"),
        ("model.requests", "open('batch.jsonl')\n", "calls open()"),
        ("provider.answers", "import datetime\ndatetime.datetime.now()\n", "reads the clock: datetime.datetime.now()"),
        ("model.estimate", "import pydantic\n", "imports pydantic"),
    ],
)
def test_the_guard_of_the_upper_half_sees(module: str, source: str, fault: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "governor" / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(parents=True)
    for package in {path.parent, tmp_path / "governor"}:
        (package / "__init__.py").touch()
    (tmp_path / "governor" / "model").mkdir(exist_ok=True)
    (tmp_path / "governor" / "model" / "__init__.py").touch()
    path.write_text(source)
    assert [line.split(" ", 1)[1] for line in impurities(module, path)] == [fault]


def test_a_cli_is_imported_only_by_the_one_above_it() -> None:
    complain(
        [
            f"{name_of(path)}:{line} imports {imported}"
            for path in modules()
            for imported, line in imports(path)
            if (
                imported.startswith("governor.cli.")
                and not name_of(path).startswith(("governor/cli/", "sim/app/cli.py"))
            )
            or imported.startswith("sim.app.cli")
        ]
    )


def test_the_provider_is_sans_io() -> None:
    path = ROOT / "sim" / "model" / "provider.py"
    complain([f"line {line} imports {name}" for name, line in imports(path) if name.split(".")[0] in SANS_IO])


def test_no_cycle_between_modules() -> None:
    """Also by imports inside functions: those are for optional extras and the time of a start, never for a cycle.

    What is left after modules that import none of the rest are taken away, again and again, is a cycle.
    """
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}
    left: dict[str, set[str]] = {}
    for name, path in paths.items():
        # Of `from a.b import c`, c may be a module or something in one.
        found = {part for full, _ in imports(path, types=False) for part in (full, full.rpartition(".")[0])}
        left[name] = found & set(paths) - {name}
    while free := [name for name, imported in left.items() if not imported & set(left)]:
        for name in free:
            del left[name]
    assert not left, {name: sorted(imported & set(left)) for name, imported in left.items()}


def test_third_party_imports_are_declared_where_they_are_used() -> None:
    base, simulation = names(declared()), names(declared("sim"))
    faults = []
    for path in modules():
        allowed = base if path.is_relative_to(ROOT / "governor") else simulation
        for extra in extras_of(path):
            allowed = allowed | names(declared(extra))
        for imported, line in imports(path, types=False):
            top = imported.split(".")[0]
            if top in sys.stdlib_module_names or top in PACKAGES:
                continue
            if canonicalize_name(DISTRIBUTIONS.get(top, top)) not in allowed:
                faults.append(f"{name_of(path)}:{line} imports {top}, which its extra does not declare")
            if name_of(path) != ONE_DOOR.get(top, name_of(path)):
                faults.append(f"{name_of(path)}:{line} imports {top}: only {ONE_DOOR[top]} does")
    complain(faults)


def test_the_version_stands_once() -> None:
    project = pyproject()["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]
    assert pyproject()["tool"]["hatch"]["version"]["path"] == "governor/__init__.py"
    assigned = [
        name_of(path)
        for path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == "__version__" and isinstance(node.value, ast.Constant)
    ]
    assert assigned == ["governor/__init__.py"]


def test_every_listed_package_exists_and_is_typed() -> None:
    listed = pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(listed) == set(PACKAGES)
    for package in listed:
        assert (ROOT / package / "__init__.py").is_file()
        assert (ROOT / package / "py.typed").is_file()
    strays = {path.parent for path in modules()} - {path.parent for path in modules() if path.name == "__init__.py"}
    assert not strays, f"folders of modules without __init__.py: {sorted(map(name_of, strays))}"


def test_the_lock_holds_names_and_versions_alone() -> None:
    for number, line in enumerate((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(), start=1):
        pinned = re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)
        assert line.startswith("#") or pinned, f"line {number} is not name==version: {line!r}"
        assert "://" not in line, f"line {number} names an address: {line!r}"


def applies(requirement: Requirement, extras: set[str]) -> bool:
    marker: Marker | None = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""})


@pytest.mark.skipif(sys.platform != "linux", reason="the lock is made on Linux; elsewhere a few packages come on top")
def test_the_lock_is_complete_for_every_extra() -> None:
    """Walks the installed packages from what pyproject declares; a package that is not installed ends its branch."""
    pins = locked()
    extras = [extra for extra in pyproject()["project"]["optional-dependencies"] if extra != "all"]
    waiting, seen, faults = declared(*extras), set(), []
    while waiting:
        requirement = waiting.pop()
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        # An extra may name others of ours, and those are declared above.
        if (name, wanted) in seen or name == "paceline":
            continue
        seen.add((name, wanted))
        if name not in pins:
            faults.append(f"{name} is required and not locked")
            continue
        if not requirement.specifier.contains(pins[name], prereleases=True):
            faults.append(f"{name} is locked at {pins[name]}, and {requirement} asks for another")
        try:
            onward = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [each for each in map(Requirement, onward) if applies(each, set(wanted))]
    complain(faults)


def test_every_pin_supports_the_oldest_python_promised() -> None:
    """Debian 12 ships 3.11.2: a pin that asks for a later patch release would break its set-up."""
    floor = pyproject()["project"]["requires-python"].removeprefix(">=") + ".0"
    pins = locked()
    complain(
        [
            f"{each.name} {each.version} needs Python {needs}, and {floor} is promised: lock an older one"
            for each in importlib.metadata.distributions()
            if pins.get(canonicalize_name(each.name)) == each.version
            and (needs := each.metadata.get("Requires-Python"))
            and not SpecifierSet(needs).contains(floor)
        ]
    )


# ---------------------------------------------------------------- size and names

# Longer than a module should be, and for good: the law and the compiled engine.
LONG = {"governor/law.py", "sim/des/engine.py"}
# Names of more than one class: what the engines state alike, and what the field calls alike. None is to be added.
SHARED_NAMES = {"Batch", "Ended", "Event", "Forecast", "Job", "Operation", "Pool", "Tally"}
# Names of more than one constant: words that two rooms use alike, and figures that each room sets for itself.
SHARED_CONSTANTS = """
ANSWER ANSWERS ANSWER_S ARRIVAL AsJson BACKOFF BATCH BUCKET CANCELLED CANCELLING CAUSES CHUNK CLOCK COMPLETED
CONFIDENCE CONNECT_S DAY_S DIMENSIONS DONE DRAWS DROPPED Day EFFORTS ENDED EVENT FAILED FLEX GRID INTERACTIVE
LIVE LOST MAX_COST MEASURED MINUTE_S OUTWAITED PAUSE PAUSED PROVIDER RECOMMENDED REFUSED REQUESTS_MOST RESUME
RETRY_DUE RPD RPM RUN RUNS_LEAST RUNS_MOST Requests SCENARIO SHARED SIZES SLACK_S SLIDING SPENT STANDARD
STATUS TIMES TPD TPM
"""


def test_no_module_is_too_long_and_no_folder_too_full() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    complain([f"{name} has {n} lines" for name, n in lengths.items() if n > 500 and name not in LONG])
    held = Counter(path.parent for path in modules() if path.name != "__init__.py")
    complain([f"{name_of(folder)} holds {n} modules" for folder, n in held.items() if n > 16])


def test_no_class_and_no_constant_has_the_name_of_another() -> None:
    """Names that one module keeps to itself begin with an underscore, and do not count."""
    classes: dict[str, set[str]] = {}
    constants: dict[str, set[str]] = {}
    for path in modules():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes.setdefault(node.name, set()).add(name_of(path))
            for name in _assigned(node):
                if name[0].isupper():
                    constants.setdefault(name, set()).add(name_of(path))
    for places, shared in ((classes, SHARED_NAMES), (constants, set(SHARED_CONSTANTS.split()))):
        twice = {name: sorted(at) for name, at in places.items() if len(at) > 1}
        complain([f"{name}: {at}" for name, at in twice.items() if name not in shared])
        assert shared != SHARED_NAMES or set(twice) == shared, "a name that is no longer shared goes off the list"


def _assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
