"""The state of a run according to its journal, for any reader, during the run or afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from math import inf
from typing import Any

from governor.batchapi.outlook import ahead_of
from governor.batchapi.waves import WaveStage
from governor.forecast.forecast import Demand, Foresee, Outlook, fluid
from governor.forecast.preflight import InUse, in_use
from governor.journal.facts import limits_found, tiers_of
from governor.journal.journal import PAUSE, RESUME, Journal
from governor.journal.records import Records
from governor.model.policy import KNOBS, Policy
from governor.model.pools import Pool
from governor.model.requests import Outcome
from governor.model.words import duration, percent, plural
from governor.model.work import reserve_of
from governor.run.account import found_pairs, tiers_text, worked
from governor.run.steer import POOL_WORD, changes_text, held_settings, words_of


def status_json(journal: Journal, *, foresee: Foresee | None = None, scenario: str = "") -> dict[str, Any]:
    """Return a run's state as plain values, times in seconds of the run.

    `left_s`: the forecast of the remaining time, None if no work is left. `foresee`: the simulator, on the provider
    that the run's own forecast assumed or, if it is named, that of `scenario`; without it the estimate is rough
    (`left_by`).
    """
    run, counts, legs = journal.run(), journal.counts(), journal.legs()
    outcomes = journal.outcomes()
    settings = journal.settings()
    policies = {stated.pool: stated.policy for stated in settings}
    pools = {name: journal.counts(name) for name in policies}
    forecasts = [f for f in journal.forecasts() if f.launched_before == 0]
    is_running = journal.is_running()
    own = worked(journal)
    return {
        "journal": journal.name,
        "running": is_running,
        "paused": _paused(journal, pools, legs[-1].began_s) if is_running and legs else [],
        "requests": max(run.requests, 0),
        "done": counts.done,
        "failed": counts.failed,
        "pending": counts.pending,
        "in_flight": counts.in_flight,
        "resent": counts.resent,
        "failures": counts.failures,
        "attempts": sum(outcomes.values()),
        "throttled": outcomes.get(Outcome.THROTTLED, 0) + outcomes.get(Outcome.SLOW_DOWN, 0),
        "outage_s": _outages(journal, pools) if is_running else {},
        "began": datetime.fromtimestamp(run.epoch_s).astimezone().isoformat(timespec="seconds"),
        "legs": len(legs),
        "ending": "" if is_running else legs[-1].ending if legs else "",
        "worked_s": own.own(journal.last_s()),
        "forecast_finish_s": _forecast_finish(forecasts[-1].content) if forecasts else None,
        **_left(journal, policies, counts.pending + counts.in_flight, foresee, scenario),
        "tiers": tiers_of(journal),
        "limits_found": limits_found(journal, policies),
        "waves": [row._asdict() for row in journal.waves()],
        "pools": {
            name: {"done": c.done, "failed": c.failed, "pending": c.pending, "in_flight": c.in_flight}
            for name, c in pools.items()
        },
        "settings": {
            name: {k.env: getattr(policy, k.name) for k in KNOBS if getattr(policy, k.name) != k.guardrails}
            for name, policy in policies.items()
        },
        "held": {name: held for name, held in held_settings(journal.commands(), pools).items() if held},
        "changes": _changes(settings),
        "waiting_commands": [[c.name, *c.words] for c in journal.commands(waiting=True)],
        "purged": run.purged_epoch_s >= 0.0,
    }


def _paused(journal: Records, pools: Iterable[str], since_s: float) -> list[str]:
    """Return the pools that the run has paused in the leg that began at that time, according to its commands."""
    paused: set[str] = set()
    for command in journal.commands():
        if command.taken_s < since_s or command.outcome or command.name not in (PAUSE, RESUME):
            continue
        named = {word.removeprefix(POOL_WORD) for word in command.words if word.startswith(POOL_WORD)}
        paused = paused | (named or set(pools)) if command.name == PAUSE else paused - (named or set(pools))
    return sorted(paused)


def _outages(journal: Records, pools: Iterable[str]) -> dict[str, float]:
    """Return the seconds without an answer for each pool whose circuit breaker was open at its last commit."""
    found = {name: journal.checkpoint(name) for name in pools}
    return {
        name: last.at_s - last.state.outage_from
        for name, last in found.items()
        if last is not None and last.state.probe_at > -inf
    }


def _forecast_finish(content: dict[str, Any]) -> float | None:
    finishes = [pool.get("finish_s") for pool in content.values() if isinstance(pool, dict)]
    known = [float(finish) for finish in finishes if isinstance(finish, int | float)]
    return max(known) if known else None


def _left(
    journal: Journal, policies: dict[str, Policy], requests: int, foresee: Foresee | None, scenario: str
) -> dict[str, Any]:
    """Return the forecast of the remaining work, at the settings in force, and whether it is simulated."""
    is_running = journal.is_running()
    if not requests:
        return {"left_s": None, "left_by": None}
    waves = journal.waves()
    if (waves and waves[-1].planned_s >= journal.legs()[-1].began_s) or any(w.stage != WaveStage.CLOSED for w in waves):
        ahead = [ahead_of(journal, name, policy.batch_queue_tokens) for name, policy in policies.items()]
        latest = max(ahead, key=lambda each: each.finish_s)
        return {
            "left_s": latest.finish_s,
            "left_by": "measured turnaround" if latest.measured else "assumed turnaround",
        }
    written = journal.forecasts()
    before = written[-1].content if written else {}
    longest, by = 0.0, "simulation"
    for name, policy in policies.items():
        demand = Demand()
        for request in journal.unfinished(name):
            demand.add(request.model, request.sizes, reserve_of(policy, request.sizes))
        if not demand.requests:
            continue
        assumed = before.get(name, {}).get("assumed")
        pool, last = Pool(name=name, policy=policy, scenario=scenario), journal.checkpoint(name)
        # The clock speed of a run that stands still is unknown here, so it begins with an idle quota.
        booked = in_use(last.params, last.state, last.at_s) if is_running and last is not None else InUse()
        # Requests in flight are booked, and are counted among the remaining requests as well.
        flying = journal.counts(name).in_flight * demand.total / demand.requests
        booked = replace(booked, tokens=max(0.0, booked.tokens - flying))
        outlook = Outlook(pool=pool, demand=demand, assumed=assumed, booked=booked)
        try:
            found = fluid(outlook) if foresee is None else foresee(outlook)
        except ImportError:  # no simulator is installed
            found = fluid(outlook)
        longest = max(longest, found.finish_s)
        by = found.by if by == "simulation" else by
    return {"left_s": longest, "left_by": by}


def _changes(settings: list[Any]) -> list[str]:
    """Return each change of settings in the course of the run, with its time."""
    last: dict[str, Any] = {}
    found = []
    for stated in settings:
        if stated.pool in last:
            text = changes_text(last[stated.pool], stated.policy)
            if text:
                found.append(f"{duration(stated.at_s)} after the beginning, pool {stated.pool}: {text}")
        last[stated.pool] = stated.policy
    return found


def status_pairs(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the state as pairs of texts, for people."""
    total = found["requests"]
    share = f" ({percent(found['done'] / total)})" if total else ""
    state = "a process is working on it" if found["running"] else f"not running: {found['ending'] or 'it broke off'}"
    if not found["legs"]:
        state = "not begun"
    if found["paused"]:
        only = "" if len(found["paused"]) == len(found["pools"]) else f" (pool {', '.join(found['paused'])})"
        state += f", paused{only}: `paceline resume` goes on"
    pairs = [
        ("state", state),
        ("done", f"{found['done']:,} of {plural(total, 'request')}{share}"),
        ("in flight", f"{found['in_flight']:,}, {found['pending']:,} waiting"),
        ("429s", f"{found['throttled']:,} in {plural(found['attempts'], 'attempt')}"),
    ]
    if found["outage_s"]:
        pools = "; ".join(f"pool {name}, {duration(silent_s)}" for name, silent_s in found["outage_s"].items())
        pairs.append(("no answer", f"{pools}: it waits for the provider, attempts do not count"))
    if found["failed"]:
        codes = ", ".join(f"{code} {count:,}" for code, count in found["failures"].items())
        pairs.append(("failed", f"{found['failed']:,}: {codes}"))
    if found["resent"]:
        pairs.append(("resent", f"{found['resent']:,} that were in flight when a process ended"))
    time_text = f"{duration(found['worked_s'])} of work since {found['began']}"
    if found["legs"] > 1:
        time_text += f", in {found['legs']:,} legs"
    pairs.append(("time", time_text))
    if found["forecast_finish_s"] is not None:
        pairs.append(("forecast", f"{duration(found['forecast_finish_s'])} in all, before the start"))
    if found["left_s"] is not None:
        how = {"simulation": "simulated", "fluid": "a rough estimate"}.get(found["left_by"], found["left_by"])
        pairs.append(("left", f"about {duration(found['left_s'])} ({how})"))
    if any(found["tiers"]):
        pairs.append(("live answers", tiers_text(found["tiers"])))
    pairs += found_pairs(found["limits_found"])
    pairs += _wave_pairs(found["waves"])
    if len(found["pools"]) > 1:
        for name, c in found["pools"].items():
            pairs.append((f"pool {name}", f"{c['done']:,} done, {c['failed']:,} failed, {c['pending']:,} waiting"))
    for name, held in found["held"].items():
        of = f" of pool {name}" if len(found["pools"]) > 1 else ""
        pairs.append(("set", f"{', '.join(words_of(held))}{of}: until changed, or withdrawn by `paceline unset`"))
    pairs += [("changed", text) for text in found["changes"]]
    pairs += [("asked", " ".join(words)) for words in found["waiting_commands"]]
    if found["purged"]:
        pairs.append(("purged", "prompts and answers were removed"))
    return pairs


def _wave_pairs(waves: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the open waves of the Batch API one by one, and how many are over."""
    pairs = []
    for wave in waves:
        if wave["stage"] != WaveStage.CLOSED:
            parts = [f"{plural(wave['requests'], 'request')} to {wave['model']}: {wave['stage']}"]
            parts += [f"batch {wave['batch_id']} {wave['status']}".rstrip()] if wave["batch_id"] else []
            parts += [f"{wave['completed'] + wave['failed']:,} answered"] if wave["total"] else []
            pairs.append((f"wave {wave['wave']}", ", ".join(parts)))
    closed = len(waves) - len(pairs)
    return [*pairs, ("waves", f"{closed:,} of {len(waves):,} collected")] if waves else []
