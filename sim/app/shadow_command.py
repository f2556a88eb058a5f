"""The command `paceline shadow`: what the law would have made of the calls that a shadow recorded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from governor.model.env_files import policy_of
from governor.model.errors import BadSetting
from governor.model.files import write_atomically
from governor.model.policy import KNOBS, Policy
from sim.app.api import PlanResult, plan
from sim.app.options import ReplayOptions, ShadowOptions
from sim.app.outputs import check_file
from sim.app.replay_command import of_log
from sim.base.layout import facts, table, wrapped
from sim.base.words import duration, number
from sim.calibration.calibrate import calibrate, read_sources
from sim.model.windows import MINUTE_S
from sim.reporting.replay_text import CARRIED, replay_json
from sim.validation.counterfactual import Counterfactual, counterfactual
from sim.validation.replay import Stage

TODAY, RECOMMENDED = "today's settings", "recommended"


def shadowed(
    path: str, o: ShadowOptions, environment: Mapping[str, str], width: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """Replay the recorded calls under today's settings and under a plan made from them; return object and text."""
    check_file(o.out, "--out", (".env",))
    if o.out is not None and o.recommended is not None:
        raise BadSetting(
            "--out is where a plan's settings go, and with --recommended there is no plan: use one of them"
        )
    today = policy_of(o.env_file, assignments=o.assignments or (), environment=environment)
    given = None if o.recommended is None else policy_of(o.recommended, base=today)
    say("replays the calls under today's settings")
    name, stages = of_log(path, ReplayOptions(provider=o.provider, tpm=o.tpm))
    stages, notes = _trusted(stages)
    found = {TODAY: counterfactual(stages, lambda _: today, runs=o.replications, provider_from=name)}
    env = ""
    if given is None:
        say("plans from them")
        planned = _planned(path, today, stages[0].provider)
        given, env = planned.policy, planned.env
    found[RECOMMENDED] = counterfactual(stages, lambda _: given, runs=o.replications, provider_from=name)
    if o.out is not None:
        with write_atomically(o.out) as unfinished:
            Path(unfinished).write_text(env, encoding="utf-8")
    content: dict[str, Any] = {
        key: {**replay_json(path, each), "later_mean_s": later_s(each)} for key, each in found.items()
    }
    before, after = today.model_dump(), given.model_dump()
    settings = {k.env: k.text(after[k.name]) for k in KNOBS if after[k.name] != before[k.name]}
    text = _text(path, found, settings, [*found[TODAY].untold, *notes], width)
    return {**content, "settings": settings, "notes": notes}, text


def _trusted(stages: list[Stage]) -> tuple[list[Stage], list[str]]:
    """Return it without use by others if the calls span less than a minute: their pattern would be repeated."""
    if all(stage.lesson.makespan_s >= MINUTE_S for stage in stages):
        return stages, []
    alone = [
        Stage(replace(stage.lesson, counts=[]), stage.provider, arrivals=stage.arrivals, is_log=True)
        for stage in stages
    ]
    return alone, ["what others use of the quota: the calls span less than a minute"]


def _planned(path: str, today: Policy, provider: Any) -> PlanResult:
    """Return what a plan recommends for such traffic, with the provider of the replay."""
    learnt = calibrate(read_sources([path], {})).scenario
    scenario = replace(learnt, policy=today, provider=provider)
    objective = "p95_latency" if scenario.arrivals == "trace" else "makespan"
    return plan(scenario, objective=objective, effort="quick")  # type: ignore[arg-type]


def later_s(found: Counterfactual) -> float:
    """Return the mean delay of calls answered in both, seconds; negative: sooner, 0 if there are none."""
    both = [pair for pair in found.pairs if not pair.was_lost and pair.would_lost_ratio < 1.0]
    return math.fsum(pair.would_s - pair.was_s for pair in both) / len(both) if both else 0.0


def _text(
    path: str, found: Mapping[str, Counterfactual], settings: Mapping[str, str], untold: Sequence[str], width: int
) -> str:
    today = found[TODAY]
    rows = [["", "as it went", *found]]
    for label, of, write in (
        ("429s", lambda each: each.throttled, number),
        ("attempts", lambda each: each.launches, number),
        ("calls lost", lambda each: each.lost, number),
        ("last answer", lambda each: each.makespan_s, duration),
    ):
        rows.append([label, write(of(today).was), *(write(of(each).would) for each in found.values())])
    rows.append(["a call ends", "-", *(_later(later_s(each)) for each in found.values())])
    provider = f"{today.provider_from}: {today.provider.tpm:,} tokens per minute"
    pairs = [("carried over", CARRIED), ("provider", provider), *(("not told", text) for text in untold)]
    told = ", ".join(f"{env}={value}" for env, value in settings.items())
    pairs.append(("recommended", told or "today's settings"))
    title = f"{os.path.basename(path)}: {today.requests:,} calls, simulated {today.replications} times"
    parts = [wrapped(title, width), table(rows, width=width), facts(pairs, width)]
    return "\n\n".join([*parts, *(wrapped(_answer(key, each), width) for key, each in found.items())])


def _later(seconds: float) -> str:
    if abs(seconds) < 0.05:
        return "as soon"
    return f"{duration(abs(seconds))} {'later' if seconds > 0.0 else 'sooner'}"


def _answer(name: str, found: Counterfactual) -> str:
    """Return one sentence: 429s avoided, time added or saved, calls saved."""
    avoided = found.throttled.was - found.throttled.would
    count = f"{number(avoided)} of {number(found.throttled.was)} 429s" if avoided > 0.0 else "no 429"
    lost = found.lost.was - found.lost.would
    saved = f", {number(lost)} of {number(found.lost.was)} lost calls would have been answered" if lost >= 0.5 else ""
    whose = f"Under {name}" if name == TODAY else "Under the recommended settings"
    return (
        f"{whose} {count} would have been avoided{saved}; calls would have ended {_later(later_s(found))} in the mean."
    )
