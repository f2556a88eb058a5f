"""The Batch API as a model: input files are checked, and batches move from state to state as time advances.

Theory of operation. Time only comes in (`submit`, `cancel`, `advance`); no clock is read, and `next_at` says when
something happens next. A batch is validated for `VALIDATING_S`; then it fails (a bad file, or no room in its model's
queue of enqueued input tokens), or it is in progress and holds its tokens until it ends. Its turnaround, from creation
to completion, is log-normal with the stated P50 and P95. Its lines are answered at moments spread evenly over the time
in progress, in an order of their own. One that would take longer than 24 h expires with the lines answered so far; one
that is cancelled keeps them, too, and those that are in flight at that moment: they are answered, and billed, while it
is being cancelled. Chance is keyed by the content of the file and the count of its submissions.

Where the words of errors come from, and which are assumed: docs/explanation/provider.md#batch-files.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field, model_validator

from governor.batchapi.limits import (
    CANCELLED,
    CANCELLING,
    COMPLETED,
    ENDED,
    EXPIRED,
    EXPIRES_S,
    FAILED,
    FILE_LINES,
    FINALIZING,
    IN_PROGRESS,
    TOKEN_LIMIT_EXCEEDED,
    TURNAROUND_S,
    VALIDATING,
)
from governor.forecast.mixes import ASSUMED_FACTOR
from governor.model.keyed import BATCH_LINE, BATCH_TURNAROUND, keyed_uniform, normal_quantile
from sim.base.arguments import Config
from sim.model.synthetic import sigma_of

# As in the one batch object with all its times that was found; a batch of 9 lines.
VALIDATING_S = 3.0
FINALIZING_S = 2.0
# Documented as "up to 10 minutes".
CANCELLING_S = 60.0
PROBLEMS_MAX = 100
# Prompt caching, as documented.
CACHE_LEAST, CACHE_STEP = 1_024, 128

Turnaround = Annotated[float, Field(gt=0, le=10 * EXPIRES_S)]


class BatchApi(Config):
    """A provider's Batch API: enqueued input tokens per model (0 = no limit), and P50 and P95 of the turnaround.

    `known_within`: the factor within which the P50 is known; `measured`: from so many batches, 0 = it is assumed.
    """

    queue_tokens: Annotated[int, Field(ge=0, le=10**12)] = 0
    turnaround_s: Annotated[tuple[Turnaround, Turnaround], Field(strict=False)] = TURNAROUND_S
    known_within: Annotated[float, Field(ge=1, le=100)] = ASSUMED_FACTOR
    measured: Annotated[int, Field(ge=0, le=10**9)] = 0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        p50, p95 = self.turnaround_s
        if p95 < p50:
            raise ValueError(f"turnaround_s is P50 and P95: {p95:g} is below {p50:g}")
        return self


class ServiceTiers(Config):
    """How a provider serves live calls in its tiers, and what it finds cached; all of it is assumed unless measured.

    `cached_share`: of a prompt from `CACHE_LEAST` tokens on, in steps of `CACHE_STEP`. `flex_slower`: factor on the
    time of flex answers; `flex_refused_ratio`: share of flex attempts for which there is no capacity, uncharged.
    """

    cached_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    flex_slower: Annotated[float, Field(ge=1, le=1_000)] = 3.0
    flex_refused_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0

    def cached(self, prompt_tokens: int) -> int:
        """Return how many tokens of a prompt are found cached."""
        if prompt_tokens < CACHE_LEAST:
            return 0
        return int(self.cached_share * prompt_tokens) // CACHE_STEP * CACHE_STEP

    def share_of(self, prompt_tokens: Iterable[int]) -> float:
        """Return the share of all these prompts' tokens that is found cached."""
        prompts = [int(each) for each in prompt_tokens]
        return sum(map(self.cached, prompts)) / max(1, sum(prompts))


class Problem(NamedTuple):
    """Why a batch fails. `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


# ---------------------------------------------------------------- the input file


class BatchLine(NamedTuple):
    """A line that can be executed."""

    custom_id: str
    body: dict[str, Any]


def check_file(raw: bytes, endpoint: str) -> tuple[list[BatchLine], list[Problem]]:
    """Return the lines of an input file and what is wrong with it, at most `PROBLEMS_MAX` things.

    Whether a body suits its endpoint is not asked here: such a line is executed, and answered with an error.
    """
    lines: list[BatchLine] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    for number, text in enumerate(raw.split(b"\n"), 1):
        if not text.strip():
            continue
        if len(lines) == FILE_LINES:
            message = f"The number of requests in the input file exceeds the maximum allowed value of {FILE_LINES:,}."
            return lines, [Problem("too_many_tasks", message)]
        record = _parsed(text)
        if record is None:
            found = [Problem("invalid_json_line", "This line is not parseable as valid JSON.", number)]
        else:
            model = lines[0].body["model"] if lines else ""
            wrong = _wrong_with(record, endpoint, model, seen)
            found = [Problem(code, message, number, param) for code, message, param in wrong]
        if not found and record is not None:
            lines.append(BatchLine(record["custom_id"], record["body"]))
            seen.add(record["custom_id"])
        problems += found
        if len(problems) >= PROBLEMS_MAX:
            return lines, problems[:PROBLEMS_MAX]
    if not lines and not problems:
        message = "The input file is empty. Please ensure that the batch contains at least one request."
        problems.append(Problem("empty_file", message))
    return lines, problems


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        # As text: of bytes, json would accept a byte-order mark, which the real API refuses.
        record = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _wrong_with(record: dict[str, Any], endpoint: str, model: str, seen: set[str]) -> list[tuple[str, str, str]]:
    """Code, message and parameter of each thing that is wrong with a line; `model`: that of the lines before, or ""."""
    found = []
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        value = record.get(name)
        if value is None:
            found.append(("missing_required_parameter", f"Missing required parameter: '{name}'.", name))
        elif not isinstance(value, kind) or value == "":
            wanted = "an object" if kind is dict else "a non-empty string"
            found.append(("invalid_type", f"Invalid type for '{name}': expected {wanted}.", name))
    if found:
        return found
    custom_id = record["custom_id"]
    if custom_id in seen:
        message = (
            f"The custom_id '{custom_id}' for this request is a duplicate of another request. "
            "The custom_id parameter must be unique for each request in a batch."
        )
        found.append(("duplicate_custom_id", message, "custom_id"))
    if record["method"] != "POST":
        found.append(("invalid_method", "The HTTP method for this request must be 'POST'.", "method"))
    if record["url"] != endpoint:
        message = "The URL provided for this request does not match the batch endpoint."
        found.append(("invalid_url", message, "url"))
    own = record["body"].get("model")
    if not isinstance(own, str) or not own:
        found.append(("missing_required_parameter", "Missing required parameter: 'body.model'.", "body.model"))
    elif model and own != model:
        message = (
            f"The model '{own}' for this request does not match the rest of the batch. "
            "Each batch must contain requests for a single model."
        )
        found.append(("mismatched_model", message, "body.model"))
    return found


# ---------------------------------------------------------------- batches over time


@dataclass(slots=True, eq=False)
class Batch:
    """One batch. Times are the provider's seconds; `entered`: when it came into each state that it has been in.

    `tokens`: of its input. `order`: its lines, as indices from 0, in the order in which they are answered. `due_at`: at
    which moments. Both are empty for a file that cannot be executed.
    """

    model: str
    tokens: int
    problems: list[Problem]
    turnaround_s: float
    created_at: float
    order: list[int]
    due_at: list[float]
    status: str = VALIDATING
    holds_tokens: bool = False
    entered: dict[str, float] = field(default_factory=dict)

    @property
    def expires_at(self) -> float:
        """Return the latest time at which the batch ends."""
        return self.created_at + EXPIRES_S

    def answered(self, now: float) -> int:
        """Return how many lines have been answered: the first ones of `order`."""
        if IN_PROGRESS not in self.entered:
            return 0
        stopped_at = self.entered.get(CANCELLED, self.entered.get(EXPIRED, math.inf))
        return bisect_right(self.due_at, min(now, stopped_at))

    def next_step(self) -> tuple[float, str]:
        """Return when it leaves its state, and for which (validation may fail it instead); inf once it has ended."""
        if self.status == VALIDATING:
            return self.created_at + VALIDATING_S, IN_PROGRESS
        if self.status == IN_PROGRESS:
            if self.turnaround_s > EXPIRES_S:
                return self.expires_at, EXPIRED
            return self.created_at + self.turnaround_s - FINALIZING_S, FINALIZING
        if self.status == FINALIZING:
            return self.created_at + self.turnaround_s, COMPLETED
        if self.status == CANCELLING:
            return self.entered[CANCELLING] + CANCELLING_S, CANCELLED
        return math.inf, self.status


class BatchQueue:
    """All batches of one account. `organization` is named in the error of a full queue.

    Times must not go back from call to call; each call first applies what has happened until then.
    """

    def __init__(self, terms: BatchApi, seed: int, organization: str) -> None:
        self.terms = terms
        self.seed = seed
        self.organization = organization
        self.enqueued: Counter[str] = Counter()
        self.enqueued_max: Counter[str] = Counter()
        self._under_way: list[Batch] = []

    def submit(
        self, key: int, *, model: str, tokens: int, lines: int, problems: Sequence[Problem] = (), now: float
    ) -> Batch:
        """Add a batch whose file has been checked. `key` (63 bits at most) keys its chance."""
        self.advance(now)
        p50, p95 = self.terms.turnaround_s
        score = normal_quantile(keyed_uniform(self.seed, key, 0, BATCH_TURNAROUND))
        turnaround_s = max(p50 * math.exp(sigma_of(p50, p95) * score), VALIDATING_S + FINALIZING_S)
        begin_at, span_s = now + VALIDATING_S, turnaround_s - VALIDATING_S - FINALIZING_S
        due = [(begin_at + span_s * keyed_uniform(self.seed, key, i, BATCH_LINE), i) for i in range(lines)]
        due.sort()
        batch = Batch(
            model=model,
            tokens=tokens,
            problems=list(problems),
            turnaround_s=turnaround_s,
            created_at=now,
            order=[i for _, i in due],
            due_at=[at for at, _ in due],
        )
        batch.entered[VALIDATING] = now
        self._under_way.append(batch)
        return batch

    def cancel(self, batch: Batch, now: float) -> bool:
        """Cancel a batch that is validated or in progress, or is being cancelled already; return whether it was."""
        self.advance(now)
        if batch.status in (VALIDATING, IN_PROGRESS):
            self._enter(batch, CANCELLING, now)
        return batch.status == CANCELLING

    def next_at(self) -> float:
        """Return when a batch next changes its state; inf if none is under way."""
        return min((batch.next_step()[0] for batch in self._under_way), default=math.inf)

    def advance(self, now: float) -> None:
        """Apply all that has happened until `now`, in its order in time."""
        while self._under_way:
            # At one and the same moment ends come before beginnings: tokens that are free are free.
            batch = min(self._under_way, key=lambda each: (each.next_step()[0], each.status == VALIDATING))
            at, state = batch.next_step()
            if at > now:
                return
            if state == IN_PROGRESS and (problem := self._no_room(batch)) is not None:
                batch.problems.append(problem)
            self._enter(batch, FAILED if state == IN_PROGRESS and batch.problems else state, at)

    def _no_room(self, batch: Batch) -> Problem | None:
        """Return the error of a full queue; none for a file that fails anyway."""
        limit = self.terms.queue_tokens
        if batch.problems or not limit or self.enqueued[batch.model] + batch.tokens <= limit:
            return None
        message = (
            f"Enqueued token limit reached for {batch.model} in organization {self.organization}. Limit: {limit:,} "
            "enqueued tokens. Please try again once some in_progress batches have been completed."
        )
        return Problem(TOKEN_LIMIT_EXCEEDED, message)

    def _enter(self, batch: Batch, state: str, at: float) -> None:
        batch.status = state
        batch.entered[state] = at
        if state == IN_PROGRESS:
            batch.holds_tokens = True
            self.enqueued[batch.model] += batch.tokens
            self.enqueued_max[batch.model] = max(self.enqueued_max[batch.model], self.enqueued[batch.model])
        if state in ENDED:
            self._under_way.remove(batch)
            if batch.holds_tokens:
                batch.holds_tokens = False
                self.enqueued[batch.model] -= batch.tokens
