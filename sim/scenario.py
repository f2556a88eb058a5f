"""A scenario: workload x provider x policy x seed, in and out of YAML so that it re-runs exactly.

What lives here: `Scenario`, and the stress set of conditions that a recommendation must survive. What must not: running
it (`experiment`), the keys of its file (`document`, `provider_config`), reading workloads (`readers`).

Theory of operation. Everything that a run depends on is in the scenario, and everything is written: a later change of a
default or a preset does not change an old scenario. Paths stand relative to the YAML file. Of the policy only our own
names are written, never anything else that an environment held. Rows that came from standard input have no file to be
read from again: `write` puts them beside the YAML as a CSV that reads back exactly.

What is drawn while the workload is read (`workload.seed`) is apart from the seed of the runs: another run seed does not
change the requests.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from numpy.typing import NDArray

from governor.errors import BadInput, BadSetting, Oversized
from governor.estimate import RULES
from governor.policy import KNOBS, Policy
from governor.summary import Grant
from sim.document import Document, FileSource, ModelSource, parsed_yaml, policy_of
from sim.provider import CHANGES, ProviderParams
from sim.provider_config import ProviderConfig, checked
from sim.readers import SCENARIO, Source, save_rows
from sim.workload import ASSUMED, MEASURED, Arrivals, Columns, Provenance, Workload, charges, columns


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that a run depends on. `workload` is what `source` holds, read once.

    `seed`: of the first replication. `replications`: 0 = as many as the precision asks for. `arrivals`: all at the
    start, or as the trace says. `finalize`: whether cut answers without text get a finalize pass. `skip_oversized`:
    requests that can never run are left out (see `fitted`).
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

    @staticmethod
    def of(
        source: FileSource | ModelSource | str | Path,
        *,
        provider: ProviderConfig | None = None,
        policy: Policy | None = None,
        opened: Source | None = None,
        **rest: Any,
    ) -> Scenario:
        """A scenario of a workload (a path suffices), with the default provider and policy where none is given.

        `opened`: the source's bytes where they were looked at already. `rest`: the other fields of `Scenario`.
        """
        if isinstance(source, str | Path):
            source = FileSource(path=str(source))
        workload = source.load(opened)
        return Scenario(source, workload, provider or ProviderConfig.of(), policy or Policy(), **rest)

    def with_(self, **changes: Any) -> Scenario:
        """This scenario with some fields changed; the workload stays as it was read."""
        return replace(self, **changes)

    def columns(self, policy: Policy | None = None) -> Columns:
        """What the engines read, under `policy` (the scenario's own if none is given)."""
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
        """The provider's numbers for the engines."""
        return self.provider.params()

    def grant(self) -> Grant:
        """What the bound on any schedule needs to know of the provider."""
        return self.provider.grant()

    def charges(self) -> NDArray[np.float64]:
        """The provider's charge for each request, whole tokens."""
        return charges(self.workload, self.provider.charge_rule, self.policy.est_tokens_per_run, self.provider.as_of)

    def provenance(self) -> Provenance:
        """Every input -> (measured or assumed, from where or how): the workload's and the provider's."""
        found = self.provider.provenance() | self.workload.provenance
        if self.arrivals == "batch":
            found["arrivals"] = (ASSUMED, "all requests are there at the start")
        recorded = int((self.workload.recorded_s >= 0.0).sum())
        if not (recorded and self.provider.latency.recorded):
            found["latency"] = self.provider.provenance()["latency"]
        elif recorded < len(self.workload) or self.provider.latency.scale != 1.0:
            label, text = self.provider.provenance()["latency"]
            both = f"{found['latency'][1]}, times {self.provider.latency.scale:g}; the rest {text}"
            found["latency"] = (MEASURED if label == MEASURED and self.provider.latency.scale == 1.0 else ASSUMED, both)
        return found

    def fitted(self, *, skip_oversized: bool | None = None) -> Scenario:
        """This scenario, once no request is charged more than the provider's limit.

        Raises Oversized, naming the first that is; with `skip_oversized` (its own field if not given) those are left
        out, and the provenance says how many. A scenario of which nothing would remain is refused in either case.
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
        """The scenario as YAML; with `folder`, paths are written relative to it. Not for rows from standard input."""
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
        """The scenario that a YAML text states; its paths are relative to `folder`. BadInput names the key."""
        data = parsed_yaml(text, name)
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
        """The scenario in a YAML file; paths in it are relative to the file, or to here where it is standard input."""
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

    def write(self, path: str | Path) -> Scenario:
        """Writes the scenario to a YAML file that re-runs it, and returns it as that file states it.

        Rows from standard input go beside it, into NAME.workload.csv. Each file appears whole or not at all.
        """
        path = Path(path)
        written = self
        if isinstance(self.source, FileSource) and self.source.path == "-":
            rows = path.with_suffix(".workload.csv")
            save_rows(self.workload, rows)
            written = self.with_(source=FileSource(path=str(rows), provenance=dict(self.workload.provenance)))
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(written.to_yaml(path.parent), encoding="utf-8")
        unfinished.replace(path)
        return written


def following(policy: Policy, provider: ProviderConfig) -> Policy:
    """The policy with the provider's limits per minute, where its settings do not name their own."""
    named = policy.model_fields_set
    changes: dict[str, int] = {}
    if "tpm_limit" not in named and provider.tpm:
        changes["tpm_limit"] = provider.tpm
    if "rpm_limit" not in named and provider.rpm:
        changes["rpm_limit"] = provider.rpm
    return policy.with_(**changes) if changes else policy


# ---------------------------------------------------------------- the stress set

COTENANT_SHARE = 0.25
COTENANT_BURST_S = 15.0
COTENANT_PERIOD_S = 60.0
HALVED_FROM_S = 120.0
HALVED_FOR_S = 600.0


def stress_set(scenario: Scenario) -> list[tuple[str, Scenario]]:
    """The conditions under which a recommendation must lose nothing, by name: each the scenario with one thing changed.

    Every other charge rule that charges this workload differently, settling the other way, a co-tenant that takes 25 %
    in bursts, per-second slices, latency doubled, no Retry-After, the limit halved for ten minutes. What could not be
    applied, because some request could then never run, is in `stress_notes`.
    """
    return [(name, changed) for name, changed, _ in _conditions(scenario) if changed is not None]


def stress_notes(scenario: Scenario) -> list[tuple[str, str]]:
    """Conditions of the stress set that were left out or softened, by name, and why."""
    return [(name, note) for name, _, note in _conditions(scenario) if note]


Condition = tuple[str, Scenario | None, str]


def _conditions(scenario: Scenario) -> Iterator[Condition]:
    """Name, changed scenario (None = cannot be applied), and what must be said about it."""
    provider = scenario.provider

    def changed(**changes: Any) -> Scenario:
        return scenario.with_(provider=provider.with_(**changes))

    largest = _largest_charge(scenario)
    yield from _other_charge_rules(scenario)
    yield ("does not settle" if provider.settles else "settles"), changed(settles=not provider.settles), ""
    cotenant = {
        "share": max(COTENANT_SHARE, provider.cotenant.share),
        "burst_s": COTENANT_BURST_S,
        "period_s": COTENANT_PERIOD_S,
    }
    yield f"co-tenant takes {cotenant['share']:.0%} in bursts", changed(cotenant=cotenant), ""
    if provider.slice_s == 0.0 and (provider.tpm or provider.rpm):
        # A slice of tokens below the largest charge would let that request through only by the limiter's grace.
        yield "per-second slices", changed(slice_s=1.0, slice_tokens=math.ceil(largest)), ""
    late = provider.latency.model_dump()
    yield "latency x 2", changed(latency={**late, "scale": min(1_000.0, 2.0 * provider.latency.scale)}), ""
    if provider.retry_after != "absent":
        yield "no Retry-After", changed(retry_after="absent"), ""
    if provider.tpm or provider.rpm:
        yield _limit_halved(scenario, largest)


def _largest_charge(scenario: Scenario) -> float:
    """The largest charge of any request under the scenario's rule, finalize passes included where there are any."""
    c = scenario.columns()
    largest = float(c.charge.max(initial=0.0))
    return max(largest, float(c.finalize_charge.max(initial=0.0))) if scenario.finalize else largest


def _other_charge_rules(scenario: Scenario) -> Iterator[Condition]:
    provider = scenario.provider
    limits = [limit for limit in (provider.tpm, provider.tpd) if limit]
    known = [scenario.charges()]
    for rule in RULES:
        # `fixed` is a policy's way to reserve; a provider that charges so is no condition to expect.
        if rule in ("fixed", provider.charge_rule):
            continue
        other = scenario.with_(provider=provider.with_(charge_rule=rule))
        charged = other.charges()
        if any(np.array_equal(charged, before) for before in known):
            continue
        known.append(charged)
        largest = _largest_charge(other)
        name = f"charge rule {rule}"
        if largest > min(limits, default=math.inf):
            yield name, None, f"left out: a request would be charged {largest:,.0f}, above the limit of {min(limits):,}"
        else:
            yield name, other, ""


def _limit_halved(scenario: Scenario, largest: float) -> Condition:
    """The limit halved for ten minutes inside the run; by less where half of it would refuse a request for good."""
    provider = scenario.provider
    factor, note = 0.5, ""
    if provider.tpm and largest > 0.5 * provider.tpm:
        factor = math.ceil(100.0 * largest / provider.tpm) / 100.0
        note = f"lowered to {factor:.0%} only: the largest request is charged {largest:,.0f} of {provider.tpm:,}"
    start_s = _inside(scenario)
    end_s = start_s + HALVED_FOR_S
    name = f"limit {'halved' if factor == 0.5 else f'x {factor:.2f}'} from {start_s:g} s to {end_s:g} s"
    before = [(change.at_s, change.factor) for change in provider.limit_changes]
    times = sorted({at_s for at_s, _ in before} | {start_s, end_s})
    if factor >= 1.0 or len(times) > CHANGES:
        why = note if factor >= 1.0 else f"left out: more than {CHANGES} changes of the limit"
        return name, None, why.replace(f"lowered to {factor:.0%} only", "left out")
    changes = []
    for at_s in times:
        own = [f for since_s, f in before if since_s <= at_s]
        lowered = factor if start_s <= at_s < end_s else 1.0
        changes.append({"at_s": at_s, "factor": lowered * (own[-1] if own else 1.0)})
    return name, scenario.with_(provider=provider.with_(limit_changes=changes)), note


def _inside(scenario: Scenario) -> float:
    """When the ten minutes begin: after two minutes, sooner where even the limits alone would let the run end by then.

    A quarter of the shortest time in which the limits let everything through, in whole seconds.
    """
    provider = scenario.provider
    fluid_s = 60.0 * len(scenario.workload) / provider.rpm if provider.rpm else 0.0
    if provider.tpm:
        fluid_s = max(fluid_s, 60.0 * float(scenario.charges().sum()) / provider.tpm)
    if scenario.arrivals == "trace":
        fluid_s = max(fluid_s, float(scenario.workload.arrival_s.max(initial=0.0)))
    return min(HALVED_FROM_S, math.floor(fluid_s / 4.0))
