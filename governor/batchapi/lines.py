"""Lines of the Batch API's files: requests as input lines, output and error lines as answers, and when to try again."""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

from governor import law
from governor.batchapi.limits import BATCH_CANCELLED, BATCH_EXPIRED
from governor.law import Params, State
from governor.model.errors import FailureCode
from governor.model.estimate import EMBEDDINGS
from governor.model.keyed import JITTER_RETRY, keyed_uniform
from governor.model.needs import NOTHING_USED
from governor.model.requests import Answer, Outcome, Request, url_of
from governor.model.work import FINAL, SPENT, STOPPING, THROTTLES
from governor.provider.answers import classify, printable

_LIMIT = re.compile(r"[Ll]imit:? ([0-9][0-9,]{0,20})")


def input_line(request: Request) -> bytes:
    """Return a request as a line of an input file. A batch is in the background anyway: the field is left out."""
    body = {name: value for name, value in (request.body or {}).items() if name != "background"}
    record = {
        "custom_id": request.custom_id,
        "method": "POST",
        "url": url_of(request.sizes.endpoint),
        "body": body,
    }
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def inputs_of(request: Request) -> int:
    """Return how many inputs a request to embed has, 0 for other requests."""
    if request.sizes.endpoint != EMBEDDINGS:
        return 0
    given = (request.body or {}).get("input")
    # A list of numbers is one input, as tokens.
    return len(given) if isinstance(given, list) and given and not isinstance(given[0], int) else 1


class AnsweredLine(NamedTuple):
    """A line of an output or error file. `answer`: None if the line was cancelled, which no attempt was made of."""

    custom_id: str
    answer: Answer | None


def answered_in(raw: bytes, now_epoch: float, hide: str = "") -> AnsweredLine | None:
    """Return what a line of an output or error file says; None if it does not say of which request."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("custom_id"), str):
        return None
    custom_id, response, error = record["custom_id"], record.get("response"), record.get("error")
    if isinstance(response, dict):
        status = response.get("status_code")
        request_id = response.get("request_id")
        headers = {"x-request-id": request_id} if isinstance(request_id, str) else None
        status = status if type(status) is int else 200 if not error else 500
        return AnsweredLine(custom_id, classify(status, headers, response.get("body"), now_epoch=now_epoch, hide=hide))
    error = error if isinstance(error, dict) and error else {"code": "server_error"}
    if error.get("code") == BATCH_CANCELLED:
        return AnsweredLine(custom_id, None)
    if error.get("code") == BATCH_EXPIRED:
        return AnsweredLine(custom_id, expired(str(error.get("message") or "")))
    return AnsweredLine(custom_id, classify(500, None, {"error": error}, now_epoch=now_epoch))


def expired(message: str = "") -> Answer:
    """Return the answer to a request that its batch expired without."""
    return Answer(Outcome.TIMEOUT, error_code=BATCH_EXPIRED, message=printable(message) or "its batch expired")


class LineVerdict(NamedTuple):
    """What follows from an answer: the request has ended (`failure`, "" = answered), or is tried again at `retry_at`.

    `stops`: why nothing more is submitted, because the account is refused; "" otherwise.
    """

    failure: str = ""
    retry_at: float = -1.0
    stops: str = ""


def verdict(
    p: Params, answer: Answer, request: int, attempt: int, *, seed: int, launched_at: float, now: float
) -> LineVerdict:
    """Return what follows from an answer of attempt 1, 2, ...; the rules of retry are the law's.

    `p`: without a deadline, which counts from the first launch and is one of live requests.
    """
    outcome = answer.outcome
    if outcome is Outcome.OK:
        return LineVerdict()
    if outcome in STOPPING:
        return LineVerdict(stops=STOPPING[outcome])
    if outcome in FINAL:
        return LineVerdict(SPENT[outcome])
    u = keyed_uniform(seed, request, attempt, JITTER_RETRY)
    state = State()  # of its own: what happens in a batch is no news of the live limits
    wait_s = answer.retry_after_s
    if outcome in THROTTLES:
        at = law.throttled(p, state, NOTHING_USED, attempt, wait_s, launched_at, launched_at, now, u)
    else:
        at, _ = law.failed(p, state, request, attempt, 0, 1, wait_s, launched_at, launched_at, now, u)
    if at == math.inf:
        return LineVerdict(SPENT.get(outcome, FailureCode.CONNECTION_DROPPED))
    return LineVerdict(retry_at=at)


def metadata_of(run_id: str, wave: int) -> dict[str, str]:
    """Return the metadata by which a wave's batch is found in the account."""
    return {"paceline_run": run_id, "paceline_wave": str(wave)}


def prefix_of(run_id: str) -> str:
    """Return how the names of a run's input files begin."""
    return f"paceline-{run_id}-"


def name_of(run_id: str, wave: int) -> str:
    """Return the name of a wave's input file, by which it is found in the account."""
    return f"{prefix_of(run_id)}{wave:05d}.jsonl"


def limit_in(message: str) -> int:
    """Return the limit that the refusal of a full queue states, 0 if it states none."""
    found = _LIMIT.search(message)
    return int(found[1].replace(",", "")) if found else 0
