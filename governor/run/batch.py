"""`paceline run`: a batch file in, results in the batch output format out, through a journal that survives anything."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Literal

from governor.forecast.forecast import (
    IDLE,
    Demand,
    Expectation,
    Foresee,
    Outlook,
    cost_forecast,
    cost_text,
    finish_text,
    fluid,
    held_back_text,
    promise_text,
    throttles_text,
)
from governor.forecast.guard import check_finish, check_fits, check_preflight
from governor.forecast.preflight import InUse, in_use
from governor.journal.facts import limits_found, tiers_of
from governor.journal.journal import Journal
from governor.law import DAY_S
from governor.model.errors import BadSetting, FailureCode, PacelineError, quoted
from governor.model.estimate import TOKENS_PER_FILE
from governor.model.files import check_writable
from governor.model.policy import Policy
from governor.model.pools import Connect, Pool, key_of
from governor.model.prices import Prices, Spending
from governor.model.words import plural
from governor.model.work import reserve_of
from governor.run.account import (
    RunOutcome,
    exit_code,
    lines_of,
    outcome_text,
    spent_before,
    summaries_of,
    worked,
)
from governor.run.intake import BatchBegun, prepare
from governor.run.live import Announcer, Ended, Leg, LiveRun
from governor.run.outputs import FollowedFiles, check_apart, claimed, errors_path, write_results
from governor.run.pool_run import RunOptions
from governor.run.scaledloop import loop_factory
from governor.run.steer import changes_text, held_settings, words_of
from governor.run.via.auto_run import AutoRun
from governor.run.via.guards import (
    check_both,
    check_line,
    check_manner,
    check_no_waves,
    guard_waves,
    mix_lines,
    open_waves,
    time_left,
)
from governor.run.via.wave_run import ConnectBatch, WaveLeg, WaveRun, connect_batch_with
from governor.telemetry.metrics import Metrics, checked_hook
from governor.telemetry.progress import Display

# Descriptors besides those of requests in flight: journal, files, closing connections, name look-ups.
OWN_DESCRIPTORS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """The options of `paceline run`. `out`: None = no result files. `journal`: a path or a database URL.

    `manner`: how the batch is run; its `follow` also receives results that ended before.

    `finish_by_s`: seconds from now in which the run must end by the forecast, None = a day; `finish_by`: the words for
    it, which `via` "auto" takes for the same time after a resume. `retry_failed`: None = no, "" = all that failed, else
    those with that failure code. `via`: the way on which requests go. `keep_files`: files at
    the Batch API are not deleted. `metrics_port`: None = none, 0 = any free one.
    """

    requests: Path
    out: Path | None
    journal: str | Path
    pools: Sequence[Pool]
    environment: Mapping[str, str] = field(repr=False)
    prices: Prices
    manner: RunOptions
    seed: int = 0
    yes: bool = False
    finish_by_s: float | None = None
    finish_by: str = ""
    skip_oversized: bool = False
    overwrite: bool = False
    retry_failed: str | None = None
    resend_changed: bool = False
    file_tokens: int = TOKENS_PER_FILE
    follow: bool = False
    via: Literal["live", "batch", "auto"] = "live"
    keep_files: bool = False
    metrics_port: int | None = None


def run_orders(
    orders: Orders,
    *,
    foresee: Foresee | None,
    connect: Connect,
    shown: Display,
    connect_batch: ConnectBatch | None = None,
) -> RunOutcome:
    """Run a batch, or resume it. Raise PacelineError, with its exit code, for every error that a user can fix.

    `connect_batch`: makes the client of a pool's Batch API, by default over the SDK.
    """
    _check(orders)
    started = {pool.name: pool.policy for pool in orders.pools}
    orders = _with_held(orders, shown)
    begun = prepare(
        orders.requests,
        orders.out,
        orders.journal,
        orders.pools,
        seed=orders.seed,
        skip_oversized=orders.skip_oversized,
        overwrite=orders.overwrite,
        retry_failed=orders.retry_failed,
        resend_changed=orders.resend_changed,
        file_tokens=orders.file_tokens,
        check={"live": check_fits, "batch": check_line, "auto": check_both}[orders.via],
    )
    journal = begun.journal
    try:
        with claimed(orders.out) if orders.out is not None else nullcontext():
            _say_what_is_left(begun, orders, shown)
            connect_batch = connect_batch or connect_batch_with(orders.environment)
            if orders.via == "batch":
                make = _wave_leg(begun, orders, started, connect_batch, shown)
            else:
                make = _live_leg(begun, orders, started, foresee, connect, connect_batch, shown)
            if begun.amended is not None:
                begun.amended.apply()
            if begun.retried:
                journal.retry_failed(orders.retry_failed or "")
            return _run(begun, orders, make, shown)
    except BaseException:
        if begun.is_new and _nothing_happened(journal):
            # A journal would only be in the way, and it holds prompts.
            journal.remove()
        raise
    finally:
        journal.close()


def _nothing_happened(journal: Journal) -> bool:
    """Return whether no request was launched or ended; False if unreadable: it may hold paid answers."""
    try:
        counts = journal.counts()
        return counts.pending == counts.requests and not journal.outcomes()
    except PacelineError:
        return False


# ---------------------------------------------------------------- before the start


def _check(orders: Orders) -> None:
    """Check everything that can be wrong before a line is read."""
    for pool in orders.pools:
        key_of(pool, orders.environment)
    if orders.retry_failed and orders.retry_failed not in list(FailureCode):
        codes = ", ".join(FailureCode)
        raise BadSetting(f"--retry-failed {quoted(orders.retry_failed)} is not a failure code: use one of {codes}")
    if orders.via != "live":
        check_manner(orders.manner, orders.via)
    if orders.manner.hook:
        checked_hook(orders.manner.hook)
    files = {"the input": orders.requests}
    if orders.out is not None:
        files |= {"--out": orders.out, "the errors file": errors_path(orders.out)}
    if "://" not in str(orders.journal):
        files["--journal"] = Path(orders.journal)
    if orders.manner.textfile is not None:
        files["--metrics-textfile"] = orders.manner.textfile
    check_apart(files)
    for what in files.keys() - {"the input", "--journal"}:
        check_writable(files[what])


def _with_held(orders: Orders, shown: Display) -> Orders:
    """Return the orders with the settings that `paceline set` has changed in the journal, which hold until `unset`."""
    if not Journal.exists(orders.journal):
        return orders
    with Journal.open(orders.journal) as journal:
        held = held_settings(journal.commands(), [pool.name for pool in orders.pools])
    pools = []
    for pool in orders.pools:
        words = words_of(held[pool.name])
        if words:
            of = "" if len(orders.pools) == 1 else f" of pool {pool.name}"
            shown.say(f"settings{of} held since `paceline set`: {', '.join(words)} (`paceline unset` withdraws them)")
        try:
            pools.append(replace(pool, policy=pool.policy.set_values(words)))
        except BadSetting as error:
            remedy = f"`paceline unset {orders.journal}` withdraws what `paceline set` changed ({', '.join(words)})"
            raise BadSetting(f"{error}; {remedy}") from None
    return replace(orders, pools=pools)


def _say_what_is_left(begun: BatchBegun, orders: Orders, shown: Display) -> None:
    """Say which requests this command takes up, if not all of the file."""
    if begun.oversized:
        shown.say(f"above the limit, recorded as failed and not sent: {plural(begun.oversized, 'request')}")
    if begun.is_new:
        return
    if orders.retry_failed is not None and not begun.retried:
        with_code = f" with {orders.retry_failed}" if orders.retry_failed else ""
        shown.say(f"note: no request failed{with_code}: --retry-failed has nothing to retry")
    counts = begun.journal.counts()
    left = counts.pending + counts.in_flight + begun.retried
    if begun.amended is not None:
        shown.say(begun.amended.amendment.text)
        left += begun.amended.amendment.more
    failed = counts.failed - begun.retried
    parts = [f"{counts.done:,} of {counts.requests:,} done"]
    parts += [f"{failed:,} failed"] if failed else []
    parts += [f"{begun.retried:,} that failed are tried again"] if begun.retried else []
    then = "looked for at the provider first" if open_waves(begun.journal) else "sent again"
    parts += [f"{counts.in_flight:,} in flight when the last process ended: {then}"] if counts.in_flight else []
    shown.inform(f"continues {begun.journal.name}: {', '.join(parts)}, {left:,} to do")
    before = {stated.pool: stated.policy for stated in begun.journal.settings()}
    for pool in orders.pools:
        changes = changes_text(before[pool.name], pool.policy) if pool.name in before else ""
        if changes:
            of = "" if len(orders.pools) == 1 else f" of pool {pool.name}"
            shown.say(f"settings{of} changed since then: {changes}")


def _guard(begun: BatchBegun, orders: Orders, foresee: Foresee | None, shown: Display) -> dict[str, Expectation]:
    """Compute and show the forecasts, and refuse a run that should not start as it is."""
    demands = begun.demands
    _check_prices(orders, demands)
    expectations = {}
    for pool in orders.pools:
        demand = demands[pool.name]
        if demand.requests:
            check_preflight(pool, demand)
        booked = _booked(begun, pool, orders.manner.time_scale)
        expectations[pool.name] = _expectation(pool, demand, orders, foresee, shown, booked)
    busy = [pool for pool in orders.pools if demands[pool.name].requests]
    if not busy:
        return expectations
    _check_descriptors(sum(min(pool.policy.max_concurrency, demands[pool.name].requests) for pool in busy))
    for pool in busy:
        for line in forecast_lines(pool, demands[pool.name], expectations[pool.name], orders, named=len(busy) > 1):
            shown.inform(line)
    last = max(busy, key=lambda pool: expectations[pool.name].finish_s)
    # A mix is done in time by calling less, or nothing, live.
    if not orders.yes and orders.via == "live":
        e = expectations[last.name]
        check_finish(e.finish_s, orders.finish_by_s, held_back_text(e, last))
    return expectations


def descriptors() -> int:
    """Return how many descriptors this process may have, after raising its limit as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft < most or soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft


def _check_descriptors(in_flight: int) -> None:
    available = descriptors()
    if in_flight + OWN_DESCRIPTORS > available:
        raise BadSetting(
            f"{in_flight:,} requests in flight need {in_flight + OWN_DESCRIPTORS:,} descriptors, and this process may "
            f"have {available:,}: lower OPENAI_MAX_CONCURRENCY to {max(1, available - OWN_DESCRIPTORS):,} in all, or "
            "raise `ulimit -n`",
            "OPENAI_MAX_CONCURRENCY",
        )


def _check_prices(orders: Orders, demands: Mapping[str, Demand]) -> None:
    if orders.manner.max_cost is None:
        return
    for demand in demands.values():
        unknown = orders.prices.unknown(demand.models, date.today())
        if unknown:
            raise BadSetting(f"--max-cost needs a price for model {unknown[0]!r}: add it to a file of --prices")


def _booked(begun: BatchBegun, pool: Pool, time_scale: float) -> InUse:
    """Return the use that earlier legs have made of the present minute."""
    last = None if begun.is_new else begun.journal.checkpoint(pool.name)
    return IDLE if last is None else in_use(last.params, last.state, last.now_s(time_scale))


def _expectation(
    pool: Pool,
    demand: Demand,
    orders: Orders,
    foresee: Foresee | None,
    shown: Display,
    booked: InUse = IDLE,
) -> Expectation:
    """Return this pool's expected course: simulated if there is a simulator, else by the fluid estimate."""
    outlook = Outlook(pool=pool, demand=demand, finalize=orders.manner.finalize, seed=orders.seed, booked=booked)
    if foresee is not None and demand.requests:
        try:
            return foresee(outlook)
        except ImportError:
            shown.say("note: no simulator is installed (paceline[sim]): the forecast is a rough estimate")
    return fluid(outlook)


def forecast_lines(pool: Pool, demand: Demand, e: Expectation, orders: Orders, *, named: bool) -> list[str]:
    """Return the forecast of one pool, for people. `named`: there are several pools."""
    models = ", ".join(model or "no model" for model in sorted(demand.models)[:3])
    models += ", ..." if len(demand.models) > 3 else ""
    of = f"pool {pool.name}: " if named else ""
    to = f" to {models}" if models else ""
    wall_s = e.finish_s / orders.manner.time_scale
    at = time.strftime("%a %H:%M", time.localtime(time.time() + wall_s)) if wall_s < 1e9 else "never"
    cost = cost_forecast(demand, e.answer_tokens, orders.prices, date.today(), cached_share=e.cached_share)
    promise = promise_text(e)
    return [
        f"{of}{plural(demand.requests, 'request')}{to}; forecast: {finish_text(e)}, {at}; 429s: {throttles_text(e)}",
        *([f"{of}done in {promise}"] if promise else []),
        f"{of}held back by {held_back_text(e, pool)}; cost: {cost_text(cost, orders.prices)}",
    ]


# ---------------------------------------------------------------- the run


MakeLeg = Callable[[Spending, RunOptions], LiveRun | WaveRun]


def _live_leg(
    begun: BatchBegun,
    orders: Orders,
    started: Mapping[str, Policy],
    foresee: Foresee | None,
    connect: Connect,
    connect_batch: ConnectBatch,
    shown: Display,
) -> MakeLeg:
    """Refuse a run with live calls that should not start, and return how to make it."""
    if orders.via == "live":
        check_no_waves(begun.journal)
    expectations = _guard(begun, orders, foresee, shown)
    by_s = DAY_S if orders.finish_by_s is None else orders.finish_by_s
    if orders.via == "auto":
        by_s = time_left(begun.journal, orders.finish_by, by_s, orders.manner.time_scale, shown)
        for line in mix_lines(begun.demands, expectations, orders.prices, by_s):
            shown.inform(line)

    def made(spent: Spending, manner: RunOptions) -> LiveRun:
        left = {pool.name: begun.journal.counts(pool.name) for pool in orders.pools}
        leg = Leg(
            journal=begun.journal,
            pools={pool.name: pool for pool in orders.pools},
            started=started,
            left={name: (c.pending + c.in_flight, float(begun.demands[name].total)) for name, c in left.items()},
            models={name: frozenset(demand.models) for name, demand in begun.demands.items()},
            expectations=expectations,
            canaries=_canaries(begun, orders, foresee, shown) if manner.canary else {},
            spent=spent,
            request_usd=_request_usd(begun, orders, expectations),
        )
        if orders.via == "live":
            return LiveRun(leg, connect, shown, manner)
        keep = orders.keep_files
        return AutoRun(leg, connect, connect_batch, shown, manner, finish_by_s=by_s, keep_files=keep)

    return made


def _wave_leg(
    begun: BatchBegun, orders: Orders, started: Mapping[str, Policy], connect: ConnectBatch, shown: Display
) -> MakeLeg:
    """Refuse a run by the Batch API that should not start, and return how to make it."""
    journal, demands = begun.journal, begun.demands
    _check_prices(orders, demands)
    by_s = orders.finish_by_s
    ahead = guard_waves(journal, demands, orders.pools, orders.prices, shown, finish_by_s=by_s, insist=orders.yes)
    pools = {pool.name: pool for pool in orders.pools}
    return lambda spent, manner: WaveRun(
        WaveLeg(journal, pools, started, ahead, spent, orders.keep_files), connect, shown, manner
    )


def _run(begun: BatchBegun, orders: Orders, make: MakeLeg, shown: Display) -> RunOutcome:
    journal, manner = begun.journal, orders.manner
    if manner.follow is not None:
        for each in lines_of(journal):
            manner.follow.add(*each)
    spent = spent_before(journal, orders.prices, date.today())
    ended: Ended | None = None
    counts = journal.counts()
    if counts.pending + counts.in_flight or open_waves(journal):
        with ExitStack() as stack:
            if orders.metrics_port is not None or manner.textfile is not None:
                manner = replace(manner, metrics=Metrics())
            if manner.metrics is not None and orders.metrics_port is not None:
                endpoint = stack.enter_context(manner.metrics.serve(orders.metrics_port))
                shown.inform(f"metrics: {endpoint.url}")
            if orders.follow and orders.out is not None:
                followed = FollowedFiles(orders.out, lines_of(journal))
                stack.callback(followed.close)
                manner = replace(manner, follow=followed)
            live = make(spent, manner)
            try:
                with asyncio.Runner(loop_factory=manner.new_loop or loop_factory(manner.time_scale)) as runner:
                    ended = runner.run(live.run())
                journal.finish(ended.at_s, ended.ending)
            except PacelineError as error:
                live.tell("stopped", str(error))
                _delivered(live, shown)
                raise
            outcome = _closed(journal, orders, spent, ended, shown)
            live.write_textfile()
            live.tell("stopped" if outcome.pending else "finished", outcome_text(outcome))
            _delivered(live, shown)
            return outcome
    shown.inform("nothing is left to send: every request has ended")
    return _closed(journal, orders, spent, ended, shown)


def _request_usd(begun: BatchBegun, orders: Orders, expectations: Mapping[str, Expectation]) -> float:
    """Return the expected mean cost of a remaining request in US dollars; 0 if unknown."""
    total, count = 0.0, 0
    for name, demand in begun.demands.items():
        e = expectations[name]
        found = cost_forecast(demand, e.answer_tokens, orders.prices, date.today(), cached_share=e.cached_share)
        total += found.expected or 0.0
        count += demand.requests
    return total / max(1, count)


def _delivered(live: Announcer, shown: Display) -> None:
    """Wait for the webhook's messages; a lost message is no reason to fail."""
    for notice in live.notices:
        if not notice.wait():
            shown.say(f"note: the message to {notice.host} was not delivered: {notice.error}")


def _canaries(begun: BatchBegun, orders: Orders, foresee: Foresee | None, shown: Display) -> dict[str, Expectation]:
    """Return the expected course of the first requests of each pool."""
    found = {}
    for pool in orders.pools:
        part = begun.demands[pool.name].first(
            orders.manner.canary,
            lambda sizes, pool=pool: reserve_of(pool.policy, sizes),  # type: ignore[misc]
        )
        found[pool.name] = _expectation(pool, part, orders, foresee, shown)
    return found


def _closed(journal: Journal, orders: Orders, spent: Spending, ended: Ended | None, shown: Display) -> RunOutcome:
    """Write the results if all is done; return the figures and the exit code."""
    counts = journal.counts()
    pending = counts.pending + counts.in_flight
    if not pending and orders.out is not None:
        write_results(orders.out, lines_of(journal))
    granted = ended.granted if ended is not None else {}
    whole = ended is not None and ended.began_s == 0.0
    tallies = ended.tallies if whole and ended is not None else {}
    summary, by_pool = summaries_of(journal, orders.pools, granted, tallies, spent.total_usd())
    stopped = {name: why for name, why in ended.why.items() if why} if ended is not None else {}
    signals = ended.signals if ended is not None else ()
    return RunOutcome(
        summary=summary,
        by_pool=by_pool,
        exit_code=exit_code(counts.failed, pending, stopped, signals),
        stopped=stopped,
        pending=pending,
        resent=counts.resent,
        journal=journal.name,
        tiers=tiers_of(journal),
        worked_s=worked(journal).own(journal.last_s()),
        found=limits_found(journal, {pool.name: pool.policy for pool in orders.pools}),
    )
