"""The parts of the reference that are made from the code: no name, default or meaning is written twice."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

import typer.cli
import typer.main
from pydantic import BaseModel

from governor import law
from governor.forecast.summary import Summary
from governor.journal import schema
from governor.model import errors, policy, requests
from governor.model.phrases import WAITED_FOR
from governor.model.requests import CAUSES
from governor.profiles import schema as profile_schema
from governor.run.account import ATTEMPT_COLUMNS
from governor.telemetry import metrics
from sim.app import cli, inputs
from sim.model import provider_config
from sim.scenario import columns, unknowns
from sim.scenario import scenario_file as document

ROOT = Path(__file__).resolve().parents[2]


def written(folder: Path) -> list[Path]:
    """Writes all parts into `folder`, leaving alone what has not changed; returns their paths."""
    folder.mkdir(exist_ok=True)
    (folder / "extra").mkdir(exist_ok=True)
    (folder / "extra" / "openapi.json").write_text(json.dumps(openapi(), indent=1) + "\n", encoding="utf-8")
    paths = []
    for name, made in PARTS.items():
        path = folder / name
        text = made()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


# ---------------------------------------------------------------- markdown


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table; a bar in a cell would end it, a line break its row."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    names = list(header)
    return "\n".join([line(names), "|" + "---|" * len(names), *map(line, rows)]) + "\n"


def _code(text: object) -> str:
    return f"`{text}`" if str(text) else ""


def listed(docstring: str | None) -> list[tuple[str, str]]:
    """Rows of a block `    name  meaning` in a docstring, two blanks or more between; a longer indent goes on."""
    rows: list[tuple[str, str]] = []
    for text in inspect.cleandoc(docstring or "").splitlines():
        found = re.fullmatch(r" {4}(\S.*?)(?: {2,}(.+))?", text)
        if found is not None and found[2]:
            rows.append((found[1], found[2]))
        elif rows and re.match(r" {6,}\S", text):
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {text.strip()}")
    return rows


def first_lines(item: object) -> str:
    """The docstring as markdown, its indented blocks as they stand."""
    return inspect.getdoc(item) or ""


def models() -> str:
    """Every model with published tiers or a measured latency: its price on the list's day, and its latency line."""
    from governor.profiles.loader import prices_in_force
    from sim.model.provider_tiers import DEFAULT_LATENCY, latency_lines, published_tiers

    prices = prices_in_force()
    rows = []
    tiers = dict.fromkeys(tier.model for tier in published_tiers().values())
    for model in dict.fromkeys([*tiers, *latency_lines()]):
        price = prices.of(model, date.fromisoformat(prices.checked))
        line = latency_lines().get(model)
        rows.append(
            [
                model,
                "published" if model in tiers else "",
                f"{price.input:g} / {price.output:g}" if price else "not in the list",
                f"{line.first_token_s:g} s" if line else f"assumed: that of {DEFAULT_LATENCY}",
                f"{1_000 * line.per_token_s:.3g} ms" if line else "",
                line.recordings if line else "none",
            ]
        )
    header = ["model", "tiers", "$ per million tokens, in / out", "first token", "per token", "answers measured"]
    return _table(header, rows)


# ---------------------------------------------------------------- the house


def rooms(package: str) -> str:
    """The rooms of a package from the top down, as import-linter keeps them: what each is for, and its modules."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = (each["layers"] for each in contracts if each.get("containers") == [package])
    rows = []
    for room in re.findall(r"\w+", " ".join(layers)):
        folder = ROOT / package / room
        if not folder.is_dir():
            rows.append((_code(f"{package}/{room}.py"), "The decisions, as pure functions over numbers.", ""))
            continue
        paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py") if path.stem != "__init__")
        modules = [path.with_suffix("").as_posix() for path in paths if "migrations" not in path.parts]
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        rows.append((_code(f"{package}/{room}/"), (ast.get_docstring(tree) or "").split("\n\n")[0], ", ".join(modules)))
    return _table(("room", "what it is for", "modules"), rows)


# ---------------------------------------------------------------- settings and causes


def settings() -> str:
    """The table of settings, names as code."""
    return re.sub(r"^\| ([A-Z_]+) \|", r"| `\1` |", policy.knob_table(), flags=re.MULTILINE)


def causes() -> str:
    """What can make the head of the queue wait: the law's constant, what it means, the setting behind it."""
    rows = []
    for number, name in enumerate(CAUSES[1:], start=1):
        env, what = WAITED_FOR[name]
        constant = _cause_constants().get(number, "")
        rows.append((_code(name), _code(constant), f"waits for {what}", _code(env)))
    return _table(("cause", "in the law", "meaning", "setting"), rows)


def _cause_constants() -> dict[int, str]:
    """The law's names for causes, by number: those that its source lists after its own heading."""
    source = inspect.getsource(law)
    block = source[source.index("# What makes the head of the queue wait.") :].split("\n\n")[0]
    return {int(number): name for name, number in re.findall(r"^([A-Z_]+) = (\d+)$", block, re.MULTILINE)}


def rules() -> str:
    """The law's public functions in the order of its source, each with its signature and all that it says of itself."""
    parts = []
    for name, function in vars(law).items():
        public = inspect.isfunction(function) and not name.startswith("_") and function.__module__ == law.__name__
        if public:
            takes = ", ".join(inspect.signature(function).parameters)
            parts.append(f"`{name}({takes})`\n: " + first_lines(function).replace("\n", "\n  ") + "\n")
    return "\n".join(parts)


def theory() -> str:
    """The law's own account of how it works."""
    return (inspect.getdoc(law) or "").partition("\n\n")[2] + "\n"


def notebooks() -> str:
    """The notebooks: the question that each opens with, and its answer on the packaged example."""
    parts = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title, answer, *_ = "".join(cells[0]["source"]).split("\n\n")
        parts.append(f"**{title.removeprefix('# ')}** (`{path.stem}`)\n: {' '.join(answer.split())}\n")
    return "\n".join(parts)


def pools() -> str:
    """What a pool is, and the form of a pools file."""
    from governor.model import pools as module

    return (inspect.getdoc(module) or "").partition("\n\n")[2].partition("\n\n")[2] + "\n"


def roles() -> str:
    """The roles that a log's columns can play, and the names by which they are known."""
    return _table(
        ("role", "known as"),
        ((_code(role), ", ".join(map(_code, columns.KNOWN[role]))) for role in columns.ROLES),
    )


# ---------------------------------------------------------------- commands


def commands() -> str:
    """Every command with its options, from the application itself."""
    app = typer.main.get_command(cli.app)
    context = typer.Context(app, info_name="paceline")
    found: Mapping[str, Any] = app.commands  # type: ignore[attr-defined]
    rows, parts = [], []
    for name, command in sorted(found.items()):
        rows.append((f"[`paceline {name}`](#paceline-{name})", first_line(command.help)))
        text = typer.cli.get_docs_for_click(obj=command, ctx=context, indent=1, name=name, call_prefix="paceline")
        parts.append(text)
    return _table(("command", "what it does"), rows) + "\n" + "\n".join(parts)


def first_line(text: str | None) -> str:
    """The first line of a help text."""
    return (text or "").strip().split("\n")[0]


# ---------------------------------------------------------------- files


def attempts() -> str:
    """The columns of attempts."""
    shared = typing.get_type_hints(requests.Attempt)
    rows = []
    for name in ATTEMPT_COLUMNS:
        kind = getattr(shared.get(name, str), "__name__", "")
        if name not in shared:
            kind = {"cost_usd": "float"}.get(name, "int" if name.endswith("_tokens") else "str")
        rows.append((_code(name), "str" if kind == "Outcome" else kind, "yes" if name in shared else "live only"))
    outcomes = ", ".join(_code(outcome.value) for outcome in requests.Outcome)
    return f"{first_lines(requests.Attempt)}\n\nOutcomes: {outcomes}.\n\n" + _table(
        ("column", "type", "everywhere"), rows
    )


def journal() -> str:
    """The tables of a journal."""
    rows = [(_code(name), meaning) for name, meaning in listed(schema.__doc__)]
    parts = [_table(("table", "one row is"), rows)]
    for table in schema.metadata.sorted_tables:
        columns = ", ".join(
            _code(column.name) + (" (key)" if column.primary_key else "") for column in table.columns.values()
        )
        parts.append(f"**`{table.name}`**: {columns}\n")
    return "\n".join(parts)


def scenario() -> str:
    """The keys of a scenario file, part by part."""
    parts: dict[str, type[BaseModel]] = {
        "the document": document.Document,
        "`workload`, from a file": document.FileSource,
        "`workload`, drawn": document.ModelSource,
        "`provider`": provider_config.ProviderConfig,
        "`provider.latency`": provider_config.Latency,
        "`provider.cotenant`": provider_config.Cotenant,
        "`provider.faults`": provider_config.FaultRatios,
        "one of `provider.limit_changes`": provider_config.LimitChange,
        "`plan`": inputs.PlanOptions,
        "`plan.unknowns`": unknowns.Unknowns,
    }
    return "\n".join(_keys(title, kind) for title, kind in parts.items())


def profile_keys() -> str:
    """The keys of a profile file, part by part."""
    parts: dict[str, type[BaseModel]] = {
        "the document": profile_schema.Profile,
        "one of `dimensions`": profile_schema.Dimension,
        "`dimensions.NAME.headers`": profile_schema.CountHeaders,
        "`charge`": profile_schema.Charge,
        "one of `retry_after`": profile_schema.WaitPlace,
        "`errors`": profile_schema.Errors,
        "one of `errors.messages`": profile_schema.Message,
        "one of `tiers`": profile_schema.Tier,
        "one of `service_tiers`": profile_schema.ServiceTier,
        "one of `reserved`": profile_schema.Reserved,
        "one of `latency`": profile_schema.LatencyLine,
        "`limits_endpoint`": profile_schema.LimitsEndpoint,
    }
    return "\n".join(_keys(title, kind, level=2) for title, kind in parts.items())


def profile_list() -> str:
    """The shipped profiles: what each limits, and what it knows."""
    from governor.profiles.loader import all_profiles

    rows = []
    for each in all_profiles():
        urls = ", ".join(map(_code, each.base_urls)) or "by name"
        tiers = sum(len(tier.models) * len(tier.limits) for tier in each.tiers)
        known = [len(each.prices) or "", tiers or "", len(each.reserved) or ""]
        rows.append([_code(each.name), urls, ", ".join(each.dimensions), *known, each.checked])
    return _table(["profile", "chosen by", "limits", "prices", "tiers", "reserved units", "checked"], rows)


def _keys(title: str, kind: type[BaseModel], level: int = 3) -> str:
    described = kind.model_json_schema()
    required = described.get("required", ())
    rows = []
    for name, field in kind.model_fields.items():
        stated = described["properties"][name]
        default = "required" if name in required else _default(field.get_default(call_default_factory=True))
        rows.append((_code(name), _allowed(stated, described.get("$defs", {})), default))
    return f"{'#' * level} {title}\n\n{first_lines(kind)}\n\n" + _table(("key", "allowed", "default"), rows)


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "its own defaults"
    if value is None or value in ("", (), {}, []):
        return "none"
    return _code(json.dumps(value, default=str))


def _allowed(stated: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """What a value may be, out of its JSON schema."""
    if "$ref" in stated:
        return "keys of its own"
    if "allOf" in stated:
        return _allowed(stated["allOf"][0], defs)
    if "anyOf" in stated:
        return " or ".join(filter(None, (_allowed(each, defs) for each in stated["anyOf"] if each != {"type": "null"})))
    if "enum" in stated:
        return "one of " + ", ".join(map(_code, stated["enum"]))
    kind = str(stated.get("type", ""))
    noun = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "string": "text"}
    noun |= {"array": "list", "object": "keys with values"}
    return noun.get(kind, kind) + _range(stated)


def _range(stated: Mapping[str, Any]) -> str:
    words = []
    ends = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    for key, word in ends.items():
        if key in stated:
            words.append(f"{word} {stated[key]:,}")
    return f", {' '.join(words)}" if words else ""


def summary_keys() -> str:
    """The keys of `--json`."""
    return f"{first_lines(Summary)}\n\n" + ", ".join(_code(name) for name in Summary.__dataclass_fields__) + ".\n"


# ---------------------------------------------------------------- exit codes, metrics


def exit_codes() -> str:
    """The process's exit codes, and why single requests fail."""
    rows: list[tuple[object, str]] = []
    for codes, meaning in listed(errors.__doc__):
        if re.match(r"\d", codes):
            meaning = re.split(r" {2,}", meaning)[0]
            # One line of the docstring may speak of several codes, in their order.
            rows += zip(codes.split(", "), meaning.split(", ") if "," in codes else [meaning], strict=True)
    rows.append((cli.HUNG_UP, "ended by SIGHUP: its terminal was closed"))
    rows.append((cli.INTERRUPTED, "interrupted by Ctrl-C: no file was left unfinished"))
    rows.append((cli.PIPE_CLOSED, "whoever read the output has closed it"))
    rows.append((cli.TERMINATED, "ended by SIGTERM: no file was left unfinished"))
    failures = [(_code(code.value), code.fault, "yes" if code.retryable else "no") for code in errors.FailureCode]
    return (
        _table(("exit code", "meaning"), rows)
        + "\n## Why a request failed\n\n"
        + first_lines(errors.FailureCode)
        + "\n\n"
        + _table(("code", "who can fix it", "the same again can succeed"), failures)
    )


def metric_names() -> str:
    """The Prometheus metrics, by the names of a registry as a run has it."""
    kinds = {}
    for family in metrics.Metrics().registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        kinds[name] = family.type
    rows = [(_code(name), kinds.pop(name), meaning) for name, meaning in listed(metrics.__doc__) if name in kinds]
    assert not kinds, f"metrics without a line in the docstring of governor.telemetry.metrics: {sorted(kinds)}"
    return _table(("name", "type", "meaning"), rows)


# ---------------------------------------------------------------- HTTP


def openapi() -> dict[str, Any]:
    """The service's own description of itself, without a database, a pool or a port."""
    from governor.model.pools import default_pools
    from governor.profiles.loader import prices_in_force
    from governor.service.api import app
    from governor.service.api.state import Service
    from governor.service.config import ServiceConfig

    config = ServiceConfig(
        pools=default_pools(policy.Policy(), {}), environment={}, prices=prices_in_force(), require_token=True
    )
    # Whatever else the service is made of, describing it touches none of it but whether a token is required.
    absent: dict[str, Any] = {part.name: types.SimpleNamespace() for part in fields(Service)}
    stated = {"config": config, "authority": types.SimpleNamespace(open=not config.require_token)}
    return app.app_of(Service(**absent | stated)).openapi()


def http() -> str:
    """The paths, what they take and what they answer."""
    described = openapi()
    parts = [described["info"]["description"] + "\n"]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(f"{method.upper()} {path}", operation))
    return "\n".join(parts)


def _operation(title: str, operation: Mapping[str, Any]) -> str:
    lines = [f"## `{title}`\n", operation.get("description") or operation.get("summary", ""), ""]
    takes = [
        (_code(each["name"]), each["in"], "yes" if each.get("required") else "", each.get("description", ""))
        for each in operation.get("parameters", ())
    ]
    if takes:
        lines.append(_table(("parameter", "in", "required", "meaning"), takes))
    body = operation.get("requestBody")
    if body:
        kinds = ", ".join(f"{_code(kind)}{_shape(stated)}" for kind, stated in body["content"].items())
        lines.append(f"Body: {kinds}.{' ' + body['description'] if 'description' in body else ''}\n")
    answers = [
        (status, answer["description"])
        for status, answer in operation["responses"].items()
        if status not in USUAL or (status == "503" and "BATCH" in answer["description"])
    ]
    lines.append(_table(("answer", "meaning"), answers))
    return "\n".join(lines)


# What any path may answer: said once, on the page itself.
USUAL = ("400", "401", "403", "404", "405", "409", "413", "415", "422", "500", "501", "503")


def _shape(stated: Mapping[str, Any]) -> str:
    reference = stated.get("schema", {}).get("$ref", "")
    return f" ({_code(reference.rpartition('/')[2])})" if reference else ""


def usual_answers() -> str:
    """What any path may answer, from the application's own list."""
    from governor.service.api.app import _ERRORS

    return _table(("status", "meaning"), ((status, answer["description"]) for status, answer in _ERRORS.items()))


PARTS: dict[str, Callable[[], str]] = {
    "rooms_governor.md": functools.partial(rooms, "governor"),
    "rooms_sim.md": functools.partial(rooms, "sim"),
    "settings.md": settings,
    "causes.md": causes,
    "rules.md": rules,
    "roles.md": roles,
    "theory.md": theory,
    "pools.md": pools,
    "notebooks.md": notebooks,
    "commands.md": commands,
    "attempts.md": attempts,
    "journal.md": journal,
    "scenario.md": scenario,
    "profiles.md": profile_keys,
    "profile_list.md": profile_list,
    "summary.md": summary_keys,
    "exit_codes.md": exit_codes,
    "metrics.md": metric_names,
    "http.md": http,
    "usual_answers.md": usual_answers,
    "models.md": models,
}
