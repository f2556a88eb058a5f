"""A scenario: workload x provider x policy x seed, written to and read from YAML so that it re-runs exactly.

Theory of operation. A scenario holds everything that a run depends on, and all of it is written: a later change of a
default or a preset does not change an old scenario. Paths are relative to the YAML file. Only our own names are written
of the policy, never anything else from the environment. Rows from standard input have no file to be read from again, so
`write` puts them beside the YAML as a CSV that reads back exactly.

Draws made while the workload is read (`workload.seed`) are independent of the seed of the runs: another run seed does
not change the requests.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, Unpack

import numpy as np
import yaml
from numpy.typing import NDArray

from governor.forecast.summary import Grant
from governor.model.errors import BadInput, BadSetting, Oversized
from governor.model.files import parsed_yaml
from governor.model.policy import KNOB_BY_NAME, KNOB_BY_SHORT_NAME, KNOBS, Policy, knob_named
from sim.base.arguments import checked, is_a, one_of, whole
from sim.base.layout import html_paragraph, html_table
from sim.model.provider import ProviderParams
from sim.model.provider_config import ProviderConfig
from sim.model.provider_tiers import SNAPSHOT
from sim.model.workload import ASSUMED, MEASURED, Arrivals, Columns, Provenance, Workload, charges, columns
from sim.scenario.readers import SCENARIO, Source, save_rows
from sim.scenario.scenario_file import Document, FileSource, ModelSource, Reading, Requests, policy_of

_Reader = TypeVar("_Reader", bound="Callable[..., Scenario]")
_readers: list[Callable[..., Scenario]] = []


def reads_with(reader: _Reader) -> _Reader:
    """Register the function that turns requests into a scenario: the planning commands' reader, in a higher layer."""
    _readers[:] = [reader]
    return reader


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Scenario:
    """Everything that a run depends on: workload, provider, policy and seed. Immutable; `with_` returns a changed copy.

        Scenario("requests.jsonl", tpm=30_000, rpm=500, policy={"stagger_s": 5})
        Scenario([{"prompt_tokens": 900, "output_tokens": 200}] * 400, provider="gpt-4o-tier1")

    `requests`: a file (batch JSONL, a trace as CSV or JSONL, a scenario as YAML), rows as mappings (lines of a batch
    file, chat bodies, or token counts), or a pandas DataFrame of token counts. The other arguments are
    then read as the command line reads its options; `scenario_file.Reading` lists further keywords. `provider` is a
    configuration, a published tier's name, a YAML file, or some of its keys; `policy` is a policy, a preset's name, or
    some knobs on top of the defaults. Errors are one line: BadInput, BadSetting or Oversized.

    `workload` is the content of `source`, read once; if both are given, nothing is read. `seed`: seed of the first
    replication. `replications`: 0 = as many as the precision requires. `arrivals`: all at the start, or as the trace
    states. `finalize`: whether cut answers without text get a finalize pass. `skip_oversized`: leave out requests that
    can never run (see `fitted`).
    """

    source: FileSource | ModelSource
    workload: Workload
    provider: ProviderConfig
    policy: Policy
    seed: int = 0
    replications: int = 0
    arrivals: Arrivals = "batch"
    finalize: bool = False
    skip_oversized: bool = False

    def __init__(
        self,
        requests: Requests | None = None,
        *,
        source: FileSource | ModelSource | None = None,
        workload: Workload | None = None,
        provider: ProviderConfig | Mapping[str, Any] | str | None = None,
        policy: Policy | Mapping[str, Any] | str | None = None,
        seed: int | None = None,
        replications: int | None = None,
        arrivals: Arrivals | None = None,
        finalize: bool | None = None,
        skip_oversized: bool = False,
        **reading: Unpack[Reading],
    ) -> None:
        if seed is not None:
            seed = whole("seed", seed, 0)
        if replications is not None:
            replications = whole("replications", replications, 0)
        if arrivals is not None:
            one_of("arrivals", arrivals, ("batch", "trace"))
        if workload is None and source is not None and requests is None:
            workload = source.load()
        if source is not None and workload is not None and requests is None and not reading:
            made = {
                "source": source,
                "workload": workload,
                "provider": made_provider(provider),
                "policy": made_policy(policy),
                "seed": seed or 0,
                "replications": replications or 0,
                "arrivals": arrivals or "batch",
                "finalize": bool(finalize),
                "skip_oversized": skip_oversized,
            }
        elif requests is not None and source is None and workload is None:
            if not _readers:
                raise BadSetting("requests are read by `sim.app`: import Scenario from `sim` or `paceline`")
            given: dict[str, Any] = {"seed": seed, "replications": replications, "arrivals": arrivals}
            given |= {"finalize": finalize, "skip_oversized": skip_oversized}
            read = _readers[0](requests, reading, provider=provider, policy=policy, **given)
            made = {each.name: getattr(read, each.name) for each in fields(read)}
        else:
            raise BadSetting("a scenario is made of requests (a file, rows or a DataFrame), or of a source alone")
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        models = self.workload.models
        model = f" to {models}" if isinstance(models, str) else ""
        limits = [f"{n:,} {unit}" for n, unit in ((self.provider.tpm, "TPM"), (self.provider.rpm, "RPM")) if n]
        named = [f"{short}={getattr(self.policy, knob.name)}" for short, knob in list(KNOB_BY_SHORT_NAME.items())[:4]]
        granted = " and ".join(limits) or "no limit"
        return f"<Scenario: {len(self.workload):,} requests{model}, {granted}, {', '.join(named)}, seed={self.seed}>"

    def _repr_html_(self) -> str:
        rows = [["", "", "from"], *([name, label, text] for name, (label, text) in self.provenance().items())]
        return f"<div>{html_paragraph(repr(self).strip('<>'))}{html_table(rows)}</div>"

    @staticmethod
    def from_file(path: str | os.PathLike[str], **options: Any) -> Scenario:
        """Return the scenario of a file, with the same options as `Scenario(path, ...)`."""
        return Scenario(os.fspath(path), **options)

    @staticmethod
    def of(
        source: FileSource | ModelSource | str | Path,
        *,
        provider: ProviderConfig | None = None,
        policy: Policy | None = None,
        opened: Source | None = None,
        **rest: Any,
    ) -> Scenario:
        """Return a scenario of a workload (or its path), with the default provider and policy unless they are given.

        `opened`: the source's bytes if they were opened already. `rest`: the other fields of `Scenario`.
        """
        if isinstance(source, str | Path):
            source = FileSource(path=str(source))
        workload = source.load(opened)
        return Scenario(source=source, workload=workload, provider=provider, policy=policy, **rest)

    def with_(self, **changes: Any) -> Scenario:
        """Return this scenario with some fields changed; the workload stays as it was read.

        `changes`: fields, of which `policy` may also be a preset's name (under the provider's limits per minute) or
        some knobs, and `provider` a tier's name or some keys; single knobs by any of their names (`stagger_s=5`, see
        `Policy.with_`); `tpm` and `rpm`, the limits that the provider grants per minute: the settings' own limits
        follow if they were equal before. Raise BadSetting for any other name.
        """
        ours = {name: changes.pop(name) for name in list(changes) if name in Scenario.__dataclass_fields__}
        limits = {name: plain_number(changes.pop(name)) for name in ("tpm", "rpm") if name in changes}
        policy = made_policy(ours.get("policy", self.policy), self.policy)
        provider = made_provider(ours.get("provider", self.provider), self.provider)
        if isinstance(ours.get("policy"), str):
            policy = following(policy, provider)
        if limits:
            granting = provider.with_(**limits)
            policy, provider = policy.with_(**limits_moved(policy, provider, granting)), granting
        if changes:
            unknown = next((name for name in changes if not knob_named(name)), None)
            if unknown is not None:
                near = difflib.get_close_matches(unknown.lower(), [*KNOB_BY_SHORT_NAME, *_CHANGEABLE], 1)
                hint = f": did you mean {near[0]}?" if near else ": fields, knobs (stagger_s, ...), tpm and rpm are"
                raise BadSetting(f"{unknown!r} is nothing that a scenario can be changed in{hint}", unknown)
            policy = policy.with_(**{name: plain_number(value) for name, value in changes.items()})
        return replace(self, **ours | {"policy": policy, "provider": provider})

    def columns(self, policy: Policy | None = None) -> Columns:
        """Return the columns that the engines read, under `policy` (default: the scenario's own)."""
        policy = policy or self.policy
        late = self.provider.latency
        return columns(
            self.workload,
            reserve_rule=policy.charge_rule,
            est_tokens_per_run=policy.est_tokens_per_run,
            charge_rule=self.provider.charge_rule,
            as_of=self.provider.as_of,
            finalize_max_tokens=policy.finalize_max_tokens,
            arrivals=self.arrivals,
            recorded_scale=late.scale if late.recorded else 0.0,
        )

    def provider_params(self) -> ProviderParams:
        """Return the provider's parameters for the engines."""
        return self.provider.params()

    def grant(self) -> Grant:
        """Return the provider's limits, as the lower bound on any schedule needs them."""
        return self.provider.grant()

    def charges(self) -> NDArray[np.float64]:
        """Return the provider's charge for each request, whole tokens, shape (requests,)."""
        return charges(self.workload, self.provider.charge_rule, self.policy.est_tokens_per_run, self.provider.as_of)

    def provenance(self) -> Provenance:
        """Return input -> (measured or assumed, source or method), for the workload and the provider."""
        found = self.provider.provenance() | self.workload.provenance
        if self.arrivals == "batch":
            found["arrivals"] = (ASSUMED, "all requests are there at the start")
        recorded = int((self.workload.recorded_s >= 0.0).sum())
        if not (recorded and self.provider.latency.recorded):
            found["latency"] = self._latency_provenance()
        elif recorded < len(self.workload) or self.provider.latency.scale != 1.0:
            label, text = self.provider.provenance()["latency"]
            both = f"{found['latency'][1]}, times {self.provider.latency.scale:g}; the rest {text}"
            found["latency"] = (MEASURED if label == MEASURED and self.provider.latency.scale == 1.0 else ASSUMED, both)
        return found

    def _latency_provenance(self) -> tuple[str, str]:
        """Return the provider's latency provenance, or "assumed" if it was measured on a model not requested here."""
        label, text = self.provider.provenance()["latency"]
        if label != MEASURED:
            return label, text
        models = self.workload.models
        named = {models} if isinstance(models, str) else set(models or ())
        # Requests without model names are taken to be for the published tier's model.
        tier = self.provider.preset.rpartition("-tier")[0]
        own = tier if self.provider.provenance()["limits"][0] == MEASURED else ""
        named = {SNAPSHOT.sub("", model) for model in named if model} or {own}
        others = sorted(named - {self.provider.latency.preset})
        if not others:
            return label, text
        why = (
            f"for want of a measurement of {', '.join(others[:3])}" if others[0] else "the requests do not name a model"
        )
        return ASSUMED, f"that of {text}; {why}"

    def fitted(self, *, skip_oversized: bool | None = None) -> Scenario:
        """Return this scenario with no request charged more than the provider's limit.

        Raise Oversized, naming the first such request. With `skip_oversized` (default: the scenario's own field) they
        are left out instead, and the provenance states how many; if none would remain, Oversized is raised all the
        same.
        """
        skip = self.skip_oversized if skip_oversized is None else skip_oversized
        limits = [limit for limit in (self.provider.tpm, self.provider.tpd) if limit]
        charged = self.charges()
        too_large = charged > min(limits, default=math.inf)
        count = int(too_large.sum())
        if not count:
            return self.with_(skip_oversized=skip)
        if not skip or count == len(charged):
            first = int(np.argmax(too_large))
            raise Oversized(
                request=first,
                custom_id=self.workload.custom_id(first),
                tokens=int(charged[first]),
                limit=min(limits),
                setting="the provider's limit (--tpm)",
            )
        label, text = self.workload.provenance.get("requests", (ASSUMED, "drawn"))
        left_out = f"{text}; {count:,} left out: charged more than the limit of {min(limits):,}"
        kept = self.workload.take(~too_large).with_(provenance={"requests": (label, left_out)})
        return self.with_(workload=kept, skip_oversized=True)

    # ------------------------------------------------------------ YAML

    def to_yaml(self, folder: str | Path | None = None) -> str:
        """Return the scenario as YAML, with paths relative to `folder` if given. Not for rows from standard input."""
        source = self.source
        if isinstance(source, FileSource) and source.path == "-":
            raise BadInput("rows from standard input have no file: write the scenario with `write`", "-")
        if folder is not None:
            start = os.path.abspath(folder)
            source = source.moved(lambda path: Path(os.path.relpath(path, start)).as_posix())
        document = {
            "workload": source.model_dump(mode="json", exclude_defaults=True),
            "provider": self.provider.model_dump(mode="json"),
            "policy": {knob.env: getattr(self.policy, knob.name) for knob in KNOBS},
            "seed": self.seed,
            "replications": self.replications,
            "arrivals": self.arrivals,
            "finalize": self.finalize,
            "skip_oversized": self.skip_oversized,
        }
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)

    @staticmethod
    def from_yaml(text: str, *, folder: str | Path = ".", name: str = "scenario") -> Scenario:
        """Return the scenario in a YAML text, whose paths are relative to `folder`. Raise BadInput, naming the key."""
        data = parsed_yaml(text, name, "a scenario (workload:, provider:, policy:, ...)")
        try:
            document = checked(Document, data, "")
            kind: type[FileSource | ModelSource] = FileSource if "path" in document.workload else ModelSource
            source: FileSource | ModelSource = checked(kind, document.workload, "workload")
            provider = checked(ProviderConfig, document.provider, "provider")
            policy = policy_of(document.policy)
        except BadSetting as error:
            raise BadInput(str(error), name) from None
        source = source.moved(lambda path: os.path.normpath(os.path.join(folder, path)))
        rest = {key: getattr(document, key) for key in ("seed", "replications", "arrivals", "finalize")}
        scenario = Scenario.of(source, provider=provider, policy=policy, **rest)
        return scenario.fitted(skip_oversized=True) if document.skip_oversized else scenario

    @staticmethod
    def read(path: str | Path | Source, stdin: BinaryIO | None = None) -> Scenario:
        """Return the scenario in a YAML file.

        Its paths are relative to the file, or to the working directory if it is standard input.
        """
        source = path if isinstance(path, Source) else Source.open(path, stdin)
        if source.kind() != SCENARIO:
            raise BadInput("this is a workload, not a scenario", source.name)
        with source.stream() as stream:
            raw = stream.read()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadInput(
                f"not UTF-8 text: {error.reason}", source.name, raw[: error.start].count(b"\n") + 1
            ) from None
        folder = Path(".") if source.path == "-" else Path(source.path).parent
        return Scenario.from_yaml(text, folder=folder, name=source.name)

    def write(self, path: str | Path, *, more: str = "") -> Scenario:
        """Write the scenario to a YAML file that re-runs it, and return the scenario as that file states it.

        `more`: further keys, as YAML. Rows from standard input are written beside it, to NAME.workload.csv. Each file
        is replaced atomically.
        """
        path = Path(path)
        written = self
        if isinstance(self.source, FileSource) and self.source.path == "-":
            rows = path.with_suffix(".workload.csv")
            save_rows(self.workload, rows)
            written = self.with_(source=FileSource(path=str(rows), provenance=dict(self.workload.provenance)))
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(written.to_yaml(path.parent) + more, encoding="utf-8")
        unfinished.replace(path)
        return written


# OPENAI_TPM_LIMIT has no value for "no limit"; its largest value never binds.
NO_TPM_LIMIT = int(KNOB_BY_NAME["tpm_limit"].high)

_CHANGEABLE = (*Scenario.__dataclass_fields__, "tpm", "rpm")


def plain_number(value: Any) -> Any:
    """Return NumPy numbers as Python numbers, as settings require; anything else unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def made_provider(
    provider: ProviderConfig | Mapping[str, Any] | str | None, base: ProviderConfig | None = None
) -> ProviderConfig:
    """Return a configuration, a published tier by name, or `base` (else the default tier) with these keys changed."""
    if isinstance(provider, Mapping):
        return (base or ProviderConfig.of()).with_(**provider)
    if isinstance(provider, str):
        return ProviderConfig.of(provider)
    if provider is None:
        return base or ProviderConfig.of()
    return is_a("provider", provider, ProviderConfig, "or the name of a tier, a file, or some keys")


def made_policy(policy: Policy | Mapping[str, Any] | str | None, base: Policy | None = None) -> Policy:
    """Return a policy, a preset by name, or `base` (else the defaults) with these knobs changed."""
    if isinstance(policy, str):
        return Policy.preset(policy)
    if isinstance(policy, Mapping):
        return (base or Policy()).with_(**{name: plain_number(value) for name, value in policy.items()})
    if policy is None:
        return base or Policy()
    return is_a("policy", policy, Policy, "or the name of a preset, or some knobs")


def limits_of(provider: ProviderConfig) -> dict[str, int]:
    """Return a policy's own limits per minute when they mirror the provider's."""
    return {"tpm_limit": provider.tpm or NO_TPM_LIMIT, "rpm_limit": provider.rpm}


def limits_moved(policy: Policy, before: ProviderConfig, after: ProviderConfig) -> dict[str, int]:
    """Return new values for the policy's limits per minute that equalled the provider's `before` and must follow it."""
    old = limits_of(before)
    return {
        name: limit
        for name, limit in limits_of(after).items()
        if limit != old[name] and getattr(policy, name) == old[name]
    }


def following(policy: Policy, provider: ProviderConfig) -> Policy:
    """Return the policy with the provider's limits per minute, unless its settings name their own."""
    named = policy.model_fields_set
    changes = {
        name: limit
        for name, limit in limits_of(provider).items()
        if name not in named and limit != getattr(policy, name)
    }
    return policy.with_(**changes) if changes else policy
