"""A batch in an event loop: its source, the meaning of its answers for the scheduler, and reports to the observer.

`BatchShell` carries out the scheduler's instructions: it pulls work from the source of `Governor.run`, hands attempts
to tasks (`attempts`) or to the callers that wait for a permit (`permits`), and reports each to the observer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from governor.law import FINALIZE, MAIN, RETRY, TPD, TPM, never_fits
from governor.model.errors import FailureCode, PacelineError, Refused
from governor.model.needs import STANDARD
from governor.model.phrases import amount_text
from governor.model.prices import Usage, usage_in
from governor.model.requests import Answer, Attempt, Limit, Outcome, Request
from governor.model.work import (
    FINAL,
    SPENT,
    STOPPING,
    THROTTLES,
    TURNED_AWAY,
    Begun,
    Job,
    Observer,
    Send,
    Work,
    attempt_of,
)
from governor.scheduler.interfaces import Stated
from governor.scheduler.learning import Learner
from governor.scheduler.repeated_refusals import Refusals

if TYPE_CHECKING:
    from governor.scheduler.driver import Governor

# The weight of the newest answer in the running mean of answer times.
ANSWER_WEIGHT = 0.1
# Outcomes that end a program's own request at once, with their failure codes.
SPENT_AT_ONCE: dict[Outcome, str] = {**{outcome: SPENT[outcome] for outcome in FINAL}, **STOPPING}


class BatchShell:
    """A scheduler's `Shell`, with the batch that the governor is running, if any."""

    def __init__(self, governor: Governor, learner: Learner | None) -> None:
        self._governor = governor
        self._learner = learner
        self.observe(governor.observer)
        self.answer_s = 0.0  # running mean of how long answers to permits have lately taken
        self._source: Iterator[Work] = iter(())
        self._begun: Begun = 0.0, []
        self._send: Send | None = None
        self._finalizes = False
        self._refusals: Refusals | None = None
        self._row: Attempt | None = None
        self.granted: set[Job] = set()  # jobs of permits that have not ended

    def observe(self, observer: Observer) -> None:
        """Report to this observer from now on."""
        self._observer = observer
        # Rows are made only if the observer reads them.
        self._shows = observer.hears("attempted")

    @property
    def is_open(self) -> bool:
        """Return whether a batch is under way."""
        return self._send is not None

    def begin(
        self, source: Iterator[Work], send: Send, begun: Begun, *, finalize: bool, refusals: Refusals | None
    ) -> None:
        """Start a batch. `begun`: since when its requests wait. Other arguments: see `Governor.run`."""
        assert self._send is None, "one batch at a time"
        self._source, self._send, self._begun = source, send, begun
        self._finalizes, self._refusals = finalize, refusals

    def end(self) -> None:
        """End the batch: nothing more is read or sent."""
        self._source, self._send = iter(()), None

    # ------------------------------------------------------------ work

    def next_work(self) -> Job | None:
        """Return the next new work of the source. Requests launched in an earlier run are taken up on the way."""
        while True:
            try:
                work = next(self._source, None)
            except Exception as error:
                self._governor.fail(error)
                return None
            if work is None:
                return None
            job = self._job(work)
            if work.first_launched_s < 0.0:
                return job
            job.lane, job.attempt, job.first_launched_s = work.lane, work.attempt, work.first_launched_s
            job.tries, job.outages = work.attempt - 1, work.outages
            if job.attempt > 1:
                job.standing = RETRY
            if work.roams:
                return job
            self._governor.scheduler.taken_up(job, work.retry_at_s)

    def _job(self, work: Work) -> Job:
        begun_s, clock = work.begun or self._begun
        reserve, charge = work.reserve, work.charge
        if work.lane == FINALIZE:
            reserve, charge = work.finalize_reserve, work.finalize_charge
        job = Job(work, work.request.index, reserve, work.expected, charge, begun_s, weights=self._governor.weights)
        job.since = clock
        return job

    def estimate(self, job: Job) -> tuple[float, float]:
        """Return what to reserve for a job by what has been learned, and what the job declares."""
        if self._learner is None or job.work is None or job.lane != MAIN:
            return job.reserve, job.reserve
        kind, prompt_tokens = kind_of(job.work.request)
        return self._learner.estimate(kind, prompt_tokens, job.work.reserve), job.work.reserve

    def reserved(self, reserve: float, request: Request | None, prompt: float = 0.0) -> float:
        """Return what to reserve for a program's own request by current knowledge; as declared if more would never fit.

        Raise PacelineError if the request can never be sent.
        """
        if not reserve >= 0.0:
            raise PacelineError(f"a request of {reserve} tokens: reserve a number of tokens from 0 up")
        prompt = prompt if request is None else float(request.sizes.prompt_tokens)
        p, weights = self._governor.p, self._governor.weights
        if never_fits(p, weights.of(reserve, prompt)):
            raise PacelineError(too_large(self._governor, reserve, weights.of(reserve, prompt)))
        if self._learner is None or request is None:
            return reserve
        found = self._learner.estimate(*kind_of(request), reserve)
        return reserve if never_fits(p, weights.of(found, prompt)) else found

    # ------------------------------------------------------------ answers

    def answered(self, job: Job, answer: Answer, *, is_last: bool = False) -> bool:
        """Report an attempt's answer to the scheduler, and return whether the request will be tried again.

        `is_last`: there is no other attempt, whatever the answer is.
        """
        governor, outcome = self._governor, answer.outcome
        scheduler, now = governor.scheduler, governor.now()
        job.answer = answer
        if job.alone:
            weight = ANSWER_WEIGHT if self.answer_s else 1.0
            self.answer_s += weight * (now - job.launched_s - self.answer_s)
        stated = stated_by(governor, answer.limits) if scheduler.quota.p.sync_headers else ()
        is_charged = outcome not in TURNED_AWAY
        if job.alone and (outcome == Outcome.OK or outcome in SPENT_AT_ONCE):
            used = self._used(job, answer)
            scheduler.returned(job, used, stated, now, is_charged=is_charged, is_answered=True)
            self.ended(job, now, SPENT_AT_ONCE.get(outcome, ""))
            return False
        refusals = None if job.alone else self._refusals
        if outcome == Outcome.OK:
            is_empty = answer.cut_off and not answer.has_text and self._finalizes and job.lane == MAIN
            is_empty = is_empty and job.work is not None and job.work.finalizes
            if refusals is not None:
                refusals.succeeded()
            scheduler.succeeded(job, self._used(job, answer) or job.need, stated, now, is_empty)
            return False
        in_doubt = refusals is not None and refusals.may_concern_all(answer)
        if outcome in STOPPING:
            scheduler.account_refused(job, stated, now, STOPPING[outcome])
            return False
        if outcome in FINAL:
            scheduler.rejected(job, stated, now, SPENT[outcome], is_charged=is_charged, in_doubt=in_doubt)
            return False
        if outcome in THROTTLES:
            return scheduler.throttled(job, answer.retry_after_s, stated, now, in_doubt=in_doubt, is_last=is_last)
        return scheduler.failed(
            job,
            answer.retry_after_s,
            stated,
            now,
            SPENT.get(outcome, FailureCode.CONNECTION_DROPPED),
            is_answer=400 <= answer.status < 500,
            is_local=outcome is Outcome.LOCAL,
            in_doubt=in_doubt,
            is_last=is_last,
        )

    def _used(self, job: Job, answer: Answer) -> list[float] | None:
        """Return what the answer used of each dimension; None if it does not say."""
        if answer.outcome != Outcome.OK or answer.used_prompt_tokens < 0 or answer.used_output_tokens < 0:
            return None
        used = float(answer.used_prompt_tokens + answer.used_output_tokens)
        if self._learner is not None and job.request is not None and job.lane == MAIN:
            kind, prompt_tokens = kind_of(job.request)
            self._learner.saw(kind, prompt_tokens, used)
        stated = usage_in(answer.body) if job.weights.per_cached or job.weights.per_written else Usage()
        tokens = answer.used_prompt_tokens, answer.used_output_tokens, stated.cached, stated.written
        return job.weights.used(*map(float, tokens))

    # ------------------------------------------------------------ the observer

    def tell(self, report: Callable[..., None], *arguments: Any) -> bool:
        """Report to the observer and return whether that succeeded.

        A failure ends the run but is not raised, so that the caller completes its step.
        """
        try:
            report(*arguments)
        except Exception as error:
            self._governor.fail(error)
            return False
        return True

    def tell_decision(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Report a call of the law to the observer."""
        self.tell(self._observer.decided, name, arguments, result)

    # ------------------------------------------------------------ instructions of the scheduler

    def launch(self, job: Job, now: float) -> None:
        """Send the attempt, or grant the permit."""
        governor = self._governor
        if self._shows:
            job.waits_s = governor.scheduler.waited(job)
        if job.granted is not None:
            self.granted.add(job)
            job.granted.set_result(True)
        elif self.tell(self._observer.launched, job, now):
            assert self._send is not None
            governor.attempts.start(job, self._send)
        else:
            governor.scheduler.drop(job)  # never send a request that was not recorded
        governor.late_s = -1.0

    def attempted(self, job: Job, now: float) -> None:
        """Make the row of an attempt, for `backed_off`."""
        self._row = self._row_of(job, now, "")

    def backed_off(self, job: Job, now: float, retry_at: float) -> None:
        """Report an attempt whose request is tried again."""
        if self._row is not None:
            self.tell(self._observer.attempted, self._row, job.answer, "")
            self.tell(self._observer.backed_off, self._row, job.answer, retry_at, job.attempt)

    def finalize(self, job: Job, now: float) -> Job:
        """Report the attempt, and return the job of the finalize pass."""
        self._record(job, now, "")
        work = job.work
        assert work is not None
        return Job(work, job.index, work.finalize_reserve, job.expected, work.finalize_charge, now, weights=job.weights)

    def suspended(self, job: Job, now: float, code: str) -> None:
        """Report an attempt whose request counts as not made."""
        row = self._row_of(job, now, code)
        if row is not None:
            self.tell(self._observer.attempted, row, job.answer, "")
            self.tell(self._observer.suspended, row, job.answer)

    def doubted(self, job: Job) -> None:
        """Count a refusal that may concern every request."""
        if self._refusals is not None and job.request is not None and job.answer is not None:
            self._refusals.refused(job.request, job.answer)

    def ended(self, job: Job, now: float, code: str) -> None:
        """Report the end of the attempt and of the request."""
        self._record(job, now, code)
        self.lost(job, now, code)

    def lost(self, job: Job, at: float, code: str) -> None:
        """Report the end of the request."""
        if job.request is not None:
            self.tell(self._observer.ended, job.request, code, job.answer, at)

    def given_up(self, job: Job, now: float, code: str) -> None:
        """Report the end of the request, also to the caller that waits for its permit."""
        if job.granted is None:
            job.answer = None
        elif code == FailureCode.REQUEST_TOO_LARGE:
            job.granted.set_exception(PacelineError(too_large(self._governor, job.reserve, job.need)))
        else:
            job.granted.set_result(False)
        self.lost(job, now, code)

    def deferred(self, cause: int) -> None:
        """Report a wait."""
        self.tell(self._observer.deferred, cause)

    def halted(self) -> None:
        """Raise an error in all callers that wait for a permit."""
        governor = self._governor
        for job in governor.scheduler.jobs():
            if job.granted is not None and not job.granted.done():
                job.granted.set_exception(no_more(governor))
        governor.soon()

    def _row_of(self, job: Job, now: float, code: str) -> Attempt | None:
        """Return the row of an attempt that is over, None if no observer reads it."""
        if not self._shows or job.request is None or job.answer is None:
            return None
        return attempt_of(job, self._governor.pool, job.answer, now, code)

    def _record(self, job: Job, now: float, code: str) -> None:
        row = self._row_of(job, now, code)
        if row is not None:
            self.tell(self._observer.attempted, row, job.answer, code)


def too_large(governor: Governor, reserve: float, need: list[float]) -> str:
    """Return the message for a request of that reservation, whose need never fits."""
    p = governor.p
    limit, d = min((p.largest[d], d) for d in range(p.dimensions) if need[d] > p.largest[d])
    which = next((name for name, place in governor.places.items() if place == d), "")
    if STANDARD.get(which) in (TPM, TPD) and need[d] == reserve:
        limited = "limited to"
        remedy = "raise OPENAI_TPM_LIMIT (OPENAI_TPD_LIMIT where that is the smaller one)"
    else:
        limited = f"limited in {which}, of which it takes {amount_text(need[d])}, to"
        remedy = f"raise its limit {which}"
    what = f"a request of {reserve:,.0f} tokens never fits: pool '{governor.pool}'"
    return f"{what} is {limited} {amount_text(limit)}: shorten it, or {remedy}"


def no_more(governor: Governor) -> Refused:
    """Return the error that says why nothing is launched any more."""
    return Refused(f"pool '{governor.pool}' launches nothing more: {governor.stopped}")


def stated_by(governor: Governor, limits: tuple[Limit, ...]) -> Stated:
    """Return the counts in an answer's headers, by the law's dimensions; of others it keeps no count."""
    places = governor.places
    return [(places[each.dimension], each.limit, each.remaining) for each in limits if each.dimension in places]


def kind_of(request: Request) -> tuple[tuple[str, int, int], float]:
    """Return a request's kind, for `Learner`, and its estimated prompt tokens."""
    sizes = request.sizes
    return (request.model, sizes.endpoint, sizes.max_tokens), float(sizes.prompt_tokens)
