"""Output of the live commands: outcomes, verdicts and the state of a journal, as text and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from governor.forecast.preflight import Verdict
from governor.forecast.summary import Summary
from governor.model.prices import dollars_text
from governor.model.words import duration, percent, plural
from governor.run.account import RunOutcome, found_pairs, tiers_text
from governor.run.batch import Orders
from governor.run.outputs import errors_path

# Remedies for a run that stopped, by the reason.
REMEDIES = {
    "INSUFFICIENT_QUOTA": "the account's quota is used up: raise it, then run the same command again",
    "UNAUTHORIZED": "the provider rejected the key or the model: correct it, then run the same command again",
    "MAX_COST": "--max-cost is reached: raise it and run the same command again",
    "STOP_AFTER": "--stop-after is over: run the same command again to go on",
    "FINISH_BY": "the next launch would come after --finish-by: run the same command again then",
    "LONG_WAIT": "the next launch is more than a day away: run the same command again then, or add --yes to wait",
    "OUTWAITED": "the provider asks to wait longer than OPENAI_RETRY_AFTER_CAP_SECONDS or OPENAI_DEADLINE_SECONDS: "
    "run the same command again when access returns",
    "REFUSED": "all requests are refused alike: correct what the line above names, then run the same command again",
    "BATCH_CANCELLED": "a batch was cancelled in the account: run the same command again to submit the rest",
    "CANARY": "the canary was worse than forecast: change the settings, or add --yes",
    "SIGINT": "interrupted: run the same command again to go on",
    "SIGTERM": "terminated: run the same command again to go on",
    "SIGHUP": "the terminal was closed: run the same command again to go on",
}


def pairs_text(pairs: Sequence[tuple[str, str]]) -> str:
    """Return names with texts, the texts aligned."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in pairs)


# ---------------------------------------------------------------- run


def outcome_json(outcome: RunOutcome, *, several: bool) -> dict[str, Any]:
    """Return the `Summary`'s keys; with several pools, the same for each of them under `pools`.

    `tiers`, if one but the standard tier has answered: how many answers each gave. `limits_found`, if limits were
    sought: by pool and dimension, 0 = nothing was refused.
    """
    found = outcome.summary.to_json_dict()
    if any(outcome.tiers):
        found["tiers"] = dict(outcome.tiers)
    if outcome.found:
        found["limits_found"] = {name: dict(limits) for name, limits in outcome.found.items()}
    if several:
        found["pools"] = {name: summary.to_json_dict() for name, summary in outcome.by_pool.items()}
    return found


def outcome_text(outcome: RunOutcome, orders: Orders) -> str:
    """Return how a run went, and where its results are."""
    s = outcome.summary
    done = f"{s.completed:,} of {s.requests + outcome.pending:,}"
    if outcome.pending:
        done += f", {outcome.pending:,} not done yet"
    # Of a run that has come to no answer yet, the summary knows no time.
    took = "" if s.makespan_s else duration(outcome.worked_s)
    pairs = [("done", done), *((name, (took or text) if name == "took" else text) for name, text in summary_pairs(s))]
    if len(outcome.by_pool) > 1:
        pairs += [(f"pool {name}", _in_short(summary)) for name, summary in outcome.by_pool.items()]
    if any(outcome.tiers):
        pairs.append(("live answers", tiers_text(outcome.tiers)))
    if outcome.resent:
        pairs.append(("resent", f"{outcome.resent:,} that were in flight when a process ended"))
    pairs += found_pairs(outcome.found)
    for name, why in outcome.stopped.items():
        of = f"pool {name}: " if len(outcome.by_pool) > 1 else ""
        pairs.append(("stopped", of + REMEDIES.get(why, why)))
    if outcome.pending:
        pairs.append(("so far", f"paceline export {shlex.quote(outcome.journal)} --out FILE.jsonl"))
    elif orders.out is not None:
        pairs.append(("results", f"{orders.out} ({plural(s.completed, 'line')})"))
        if s.failed:
            pairs.append(("errors", f"{errors_path(orders.out)} ({plural(s.failed, 'line')})"))
    pairs.append(("journal", f"{outcome.journal} (holds prompts and answers: paceline purge removes them)"))
    return pairs_text(pairs)


def summary_pairs(s: Summary) -> list[tuple[str, str]]:
    """Return a summary, for people."""
    failed = f"{s.failed:,}"
    if s.failures:
        failed += ": " + ", ".join(f"{code} {count:,}" for code, count in s.failures.items())
    took = duration(s.makespan_s)
    if s.efficiency is not None:
        took += f" ({percent(s.efficiency)} of what the limits allow at best: {duration(s.bound_s)})"
    return [
        ("failed", failed),
        ("took", took),
        ("429s", f"{s.throttled:,} in {plural(s.attempts, 'attempt')}"),
        ("in flight, at most", f"{s.peak_in_flight:,}"),
        ("tokens", f"{s.reserved_tokens:,} reserved, {s.used_tokens:,} used"),
        ("cost", dollars_text(s.cost_usd)),
        ("waited for", waits_text(s.waits_s)),
    ]


def _in_short(s: Summary) -> str:
    return f"{s.completed:,} done, {s.failed:,} failed, {s.throttled:,} 429s, {duration(s.makespan_s)}"


def waits_text(waits_s: Mapping[str, float]) -> str:
    """Return the causes of waiting: shares of all waiting, the largest first."""
    total = sum(waits_s.values())
    if total <= 0.0:
        return "nothing"
    ranked = sorted(waits_s.items(), key=lambda item: -item[1])
    return ", ".join(f"{cause} {percent(wait / total)}" for cause, wait in ranked if wait / total >= 0.005)


# ---------------------------------------------------------------- preflight


def verdict_json(verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """Return the fields of the only verdict; of several, whether all may start and each under `pools`."""
    if len(verdicts) == 1:
        return asdict(next(iter(verdicts.values())))
    return {
        "ok": all(verdict.ok for verdict in verdicts.values()),
        "pools": {name: asdict(verdict) for name, verdict in verdicts.items()},
    }


def verdict_text(verdicts: Mapping[str, Verdict]) -> str:
    """Return each verdict in a few lines."""
    blocks = []
    for name, v in verdicts.items():
        of = f"pool {name}: " if len(verdicts) > 1 else ""
        finish = "never" if v.forecast_finish_s is None else duration(v.forecast_finish_s)
        by = "simulated" if v.forecast_by == "simulation" else "a rough estimate without simulation"
        pairs = [
            ("verdict", of + ("may start" if v.ok else f"503 {v.code}")),
            ("projected", f"{v.projected_tokens:,} tokens"),
            ("budget", f"{v.budget_tokens:,} tokens per minute, {v.in_use_tokens:,} in use"),
            ("finish", f"in {finish} ({by})"),
        ]
        if not v.ok:
            pairs.insert(1, ("reason", v.reason))
            wait = f"retry in {v.suggested_wait_s} s" if v.suggested_wait_s is not None else "waiting does not help"
            pairs.append(("wait", f"{wait}; {plural(v.max_runs_now, 'run')} could start now"))
        blocks.append(pairs_text(pairs))
    return "\n\n".join(blocks)
