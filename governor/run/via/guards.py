"""Before a run by the Batch API starts: what cannot go there, the forecast, and the budget of money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from math import inf
from typing import Any

from governor.batchapi.limits import TURNAROUND_S, usable_tokens
from governor.batchapi.outlook import Foreseen, foreseen
from governor.batchapi.waves import WaveStage
from governor.forecast.forecast import Demand, Expectation, assumed_answer, cost_forecast, cost_text
from governor.forecast.guard import check_finish, check_fits
from governor.journal.facts import deadline_of
from governor.journal.journal import Journal
from governor.journal.waves import WaveRow
from governor.model.errors import BadInput, BadSetting, Oversized, quoted
from governor.model.pools import Pool
from governor.model.prices import Prices, Spending, Usage, dollars_text
from governor.model.requests import BATCH, STANDARD, Request
from governor.model.words import duration, plural
from governor.run.pool_run import RunOptions
from governor.telemetry.progress import Display


def check_manner(manner: RunOptions, via: str = BATCH) -> None:
    """Raise BadSetting for options that a run by the Batch API has no use for."""
    for given, option in ((manner.finalize, "--finalize"), (manner.canary, "--canary")):
        if given:
            raise BadSetting(f"{option} is for live runs: leave it out with --via {via}")


def check_line(request: Request, reserve: int, pool: Pool) -> None:
    """Raise BadInput or Oversized for a request that no Batch file can hold. `reserve` is of no concern here."""
    if not request.model:
        what = f"request {request.index} ({quoted(request.custom_id)})"
        raise BadInput(f"{what} names no model in its body: a Batch file is for one model, so state it")
    limit = pool.policy.batch_queue_tokens
    if request.sizes.prompt_tokens > usable_tokens(limit):
        raise Oversized(
            request=request.index,
            custom_id=request.custom_id,
            tokens=request.sizes.prompt_tokens,
            limit=int(usable_tokens(limit)),
            setting="OPENAI_BATCH_QUEUE_TOKENS",
        )


def check_both(request: Request, reserve: int, pool: Pool) -> None:
    """Raise BadInput or Oversized for a request that live calls could not do, or that names no model."""
    if not request.model:
        check_line(request, reserve, pool)
    check_fits(request, reserve, pool)


def mix_lines(
    demands: Mapping[str, Demand], expectations: Mapping[str, Expectation], prices: Prices, by_s: float
) -> list[str]:
    """Return what a mix of live calls and the Batch API lies between, in words."""
    costs = []
    for tier in (BATCH, STANDARD):
        found = [
            cost_forecast(demand, expectations[name].answer_tokens, prices, date.today(), tier).expected
            for name, demand in demands.items()
        ]
        costs.append(dollars_text(None if None in found else sum(each or 0.0 for each in found)))
    p50, p95 = (duration(each) for each in TURNAROUND_S)
    return [
        f"auto: to be done within {duration(by_s)}; cost between {costs[0]} (all by the Batch API) and {costs[1]} (all "
        f"live); the Batch API's turnaround is assumed, {p50} (P50) to {p95} (P95), until three batches are measured"
    ]


def time_left(journal: Journal, words: str, by_s: float, time_scale: float, shown: Display) -> float:
    """Return the seconds until a mix is to be done: `by_s` from its first start by these words, 0 if that is over."""
    now = journal.now_s(time_scale)
    left_s = deadline_of(journal, words, now + by_s) - now
    if left_s <= 0.0:
        stated = f"--finish-by {words}" if words else "the day that a run has without --finish-by"
        shown.say(
            f"{stated} was over {duration(-left_s)} ago, counted from the first start: live calls do the rest at once; "
            "another --finish-by counts from now"
        )
    return max(0.0, left_s)


def open_waves(journal: Journal) -> list[WaveRow]:
    """Return the waves that are not over: with requests or files at the Batch API, as far as is on record."""
    return [row for row in journal.waves() if row.stage != WaveStage.CLOSED]


def check_no_waves(journal: Journal) -> None:
    """Raise BadInput if requests are at the Batch API, which a live run would not collect."""
    held = open_waves(journal)
    if held:
        raise BadInput(
            f"{plural(len(held), 'batch')} with {plural(sum(row.requests for row in held), 'request')} of it went to "
            "the Batch API and are not collected: add --via batch",
            journal.name,
        )


def guard_waves(
    journal: Journal,
    demands: Mapping[str, Demand],
    pools: Sequence[Pool],
    prices: Prices,
    shown: Display,
    *,
    finish_by_s: float | None,
    insist: bool,
) -> dict[str, Any]:
    """Show the forecast, and refuse a run that would end too late; return the forecast for the journal, by pool."""
    found = {}
    latest = 0.0
    for pool in pools:
        demand = demands[pool.name]
        if not demand.requests:
            continue
        ahead = foreseen_of(demand, pool, journal.waves(pool.name))
        cost = cost_forecast(demand, demand.answer_tokens, prices, date.today(), tier=BATCH)
        of = f"pool {pool.name}: " if len(pools) > 1 else ""
        shown.inform(f"{of}{plural(demand.requests, 'request')} by the Batch API; forecast: {ahead.text()}")
        shown.inform(f"{of}cost: {cost_text(cost, prices)}")
        found[pool.name] = {"finish_s": ahead.finish_s, "by": "turnaround", "via": BATCH, "measured": ahead.measured}
        latest = max(latest, ahead.finish_s)
    if not insist:
        check_finish(latest, finish_by_s, "the Batch API's queue and turnaround")
    return found


def foreseen_of(demand: Demand, pool: Pool, rows: Sequence[WaveRow] = ()) -> Foreseen:
    """Return the forecast of a pool's work by the Batch API. `rows`: earlier waves, by which turnaround is measured."""
    tokens: dict[str, float] = {}
    for (model, _, _), (prompt, *_) in demand.billed.items():
        tokens[model] = tokens.get(model, 0.0) + prompt
    left = [(model, requests, tokens[model]) for model, requests in demand.models.items()]
    return foreseen(left, pool.policy.batch_queue_tokens, rows)


class WaveBudget:
    """`--max-cost` for waves: what one may cost counts as committed, from its forming to its collection."""

    def __init__(self, spent: Spending, limit_usd: float) -> None:
        self._spent = spent
        self._limit_usd = limit_usd

    def cost_usd(self, request: Request) -> float:
        """Return what a request may cost: by its declared cap, else by an assumed answer; inf without a price."""
        price = self._spent.price(request.model, BATCH)
        if price is None:
            return inf
        sizes = request.sizes
        return price.cost_usd(price.most_used(sizes) or Usage(sizes.prompt_tokens, round(assumed_answer(sizes))))

    def left_usd(self) -> float:
        """Return how much may still be committed."""
        return self._limit_usd - self._spent.bound_usd

    def committed(self, wave: int, usd: float) -> None:
        """Count a wave."""
        self._spent.committed["wave", wave] = usd

    def text(self) -> str:
        """Return the line for a run that the budget has stopped."""
        spent = self._spent
        rest = spent.bound_usd - spent.cost_usd
        held = f", {dollars_text(rest)} committed to batches in the queue" if rest else ""
        limit = f"--max-cost {dollars_text(self._limit_usd)}"
        return f"{limit}: {dollars_text(spent.cost_usd)} spent{held}: nothing more is submitted"

    def released(self, wave: int) -> None:
        """A wave's answers are known, and what they cost."""
        self._spent.committed.pop(("wave", wave), None)
