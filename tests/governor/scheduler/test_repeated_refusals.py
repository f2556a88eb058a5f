"""Who stops a run: refusals end single requests, unless the first of them are all alike and nothing succeeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from governor.model.errors import FailureCode
from governor.model.requests import Answer, Outcome
from governor.model.work import Work
from governor.scheduler.driver import Governor
from governor.scheduler.repeated_refusals import SAME_BAD_REQUESTS, SAME_REFUSALS, Refusals
from tests.governor.desks import Desk, Log, nothing_held, quiet, work
from tests.virtual_loop import run_virtual

NO_MODEL = Answer(Outcome.BAD_REQUEST, 404, error_code="model_not_found", message="The model 'gpt-9' does not exist")
FLAGGED = Answer(Outcome.BAD_REQUEST, 403, error_code="", message="Your input was flagged")
FILTERED = Answer(Outcome.BAD_REQUEST, 400, error_code="content_filter", message="The response was filtered")
CREDIT = Answer(Outcome.BAD_REQUEST, 402, message="Requires more credits, can only afford 512")
BAD_FIELD = Answer(Outcome.BAD_REQUEST, 400, error_code="unsupported_parameter", message="Unsupported: 'max_tokens'")
NO_PAGE = Answer(Outcome.BAD_REQUEST, 404, message="<html>Not Found</html>", misaddressed=True)
NO_HOST = Answer(Outcome.DROPPED, message="no answer from http://nowhere: Name or service not known", misaddressed=True)
LONG = Answer(Outcome.TOO_LARGE, 429, message="Request too large")


class Run:
    """A batch whose requests are answered as `script` says, by number, until it ends or stops."""

    def __init__(
        self,
        script: Mapping[int, Answer],
        requests: int = 20,
        models: Iterable[str] = ("m",),
        *,
        answered: bool = False,
        **settings: Any,
    ) -> None:
        names = list(models)
        self.desk = Desk(script={i: [(1.0, answer)] * 9 for i, answer in script.items()})
        self.log = Log()
        self.said: list[str] = []
        works = [_of_model(work(i), names[i * len(names) // requests]) for i in range(requests)]

        async def main() -> str:
            governor = Governor(quiet(**({"max_concurrency": 1} | settings)), observer=self.log)

            def halt(line: str) -> None:
                self.said.append(line)
                governor.stop("REFUSED")

            refusals = Refusals(names, answered=answered, halt=halt)
            ending = await governor.run(iter(works), self.desk.send, refusals=refusals)
            nothing_held(governor)
            return ending

        self.ending = run_virtual(main())
        self.failed = [i for i, failure, _ in self.log.ends if failure]
        self.done = [i for i, failure, _ in self.log.ends if not failure]
        self.sent = [i for _, i, _ in self.desk.sent]


def _of_model(each: Work, model: str) -> Work:
    return replace(each, request=replace(each.request, model=model))


@pytest.mark.parametrize("answer", [NO_MODEL, FLAGGED, FILTERED, CREDIT, BAD_FIELD, NO_PAGE, LONG])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_refusal_ends_its_own_request_wherever_it_stands(answer: Answer, concurrency: int) -> None:
    for places in ([0], [0, 1], [7], [19], [3, 9, 10, 11, 12]):
        run = Run(dict.fromkeys(places, answer), max_concurrency=concurrency)
        assert (run.ending, run.failed, len(run.done)) == ("", places, 20 - len(places)), places
        assert sorted(run.sent) == list(range(20))
        assert run.said == []


def test_different_refusals_at_the_beginning_are_single_requests_own() -> None:
    run = Run({0: NO_MODEL, 1: FLAGGED, 2: NO_MODEL, 3: CREDIT})
    # What is about the prompt is lost at once; the others when the first success has decided, as of their own time.
    assert [(i, at) for i, failure, at in run.log.ends if failure] == [(1, 2.0), (0, 1.0), (2, 3.0), (3, 4.0)]
    assert (run.ending, len(run.done)) == ("", 16)


@pytest.mark.parametrize(
    ("answer", "requests", "words"),
    [
        (NO_MODEL, SAME_REFUSALS, ("404 model_not_found: The model 'gpt-9' does not exist", "check the model's name")),
        (CREDIT, SAME_REFUSALS, ("402: Requires more credits", "check the account's credit")),
        (NO_PAGE, SAME_REFUSALS, ("404: <html>Not Found</html>", "check the base URL", "end in /v1")),
        (NO_HOST, SAME_REFUSALS, ("Name or service not known", "check the base URL")),
        (BAD_FIELD, SAME_BAD_REQUESTS, ("400 unsupported_parameter: Unsupported: 'max_tokens'", "check what these")),
    ],
)
def test_a_run_stops_where_the_first_are_all_refused_alike(
    answer: Answer, requests: int, words: tuple[str, ...]
) -> None:
    run = Run(dict.fromkeys(range(20), answer), max_attempts=1)
    assert (run.ending, len(run.sent), run.log.ends) == ("REFUSED", requests, [])
    (line,) = run.said
    assert all(word in line for word in (*words, f"the first {requests} requests", f"'q-{requests - 1}'")), line


def test_figures_and_ids_do_not_make_a_refusal_another() -> None:
    numbers = count(1)
    script = {
        i: replace(CREDIT, message=f"can only afford {next(numbers)}: request req_{next(numbers)}x") for i in range(20)
    }
    assert Run(script).ending == "REFUSED"


def test_ten_filtered_prompts_in_front_stop_nothing() -> None:
    for answer in (FILTERED, FLAGGED, LONG, replace(BAD_FIELD, error_code="context_length_exceeded")):
        run = Run(dict.fromkeys(range(15), answer))
        assert (run.ending, run.failed, len(run.done)) == ("", list(range(15)), 5)


def test_a_missing_model_stops_a_run_only_if_no_other_is_left() -> None:
    half = dict.fromkeys(range(10), NO_MODEL)
    run = Run(half, models=("gone", "there"))
    assert (run.ending, run.failed, run.done) == ("", list(range(10)), list(range(10, 20)))
    run = Run(dict.fromkeys(range(20), NO_MODEL), models=("gone", "gone-too"))
    assert (run.ending, len(run.sent), run.failed) == ("REFUSED", 10 + SAME_REFUSALS, [])
    # A wrong address is wrong for all of them.
    run = Run(dict.fromkeys(range(20), NO_PAGE), models=("a", "b"))
    assert (run.ending, len(run.sent)) == ("REFUSED", SAME_REFUSALS)


def test_too_few_to_be_sure_end_with_the_run() -> None:
    run = Run(dict.fromkeys(range(20), NO_MODEL), requests=2)
    assert (run.ending, run.failed, run.done) == ("", [0, 1], [])
    assert [failure for _, failure, _ in run.log.ends] == [FailureCode.BAD_REQUEST] * 2


def test_after_an_earlier_leg_had_answers_only_the_address_is_in_doubt() -> None:
    run = Run(dict.fromkeys(range(20), NO_MODEL), answered=True)
    assert (run.ending, len(run.failed)) == ("", 20)
    run = Run(dict.fromkeys(range(20), NO_PAGE), answered=True)
    assert (run.ending, len(run.sent), run.failed) == ("REFUSED", SAME_REFUSALS, [])


def test_a_host_that_is_not_there_loses_no_request() -> None:
    run = Run(dict.fromkeys(range(20), NO_HOST), max_concurrency=5)
    assert (run.ending, run.log.ends, len(run.said)) == ("REFUSED", [], 1)
    assert len(run.sent) < 5 + SAME_REFUSALS


@pytest.mark.parametrize("answer", [NO_MODEL, NO_PAGE, BAD_FIELD])
@pytest.mark.parametrize("last", [None, 14])
def test_what_was_in_flight_when_it_stopped_is_not_lost_either(answer: Answer, last: int | None) -> None:
    """The line says that the same command sends them again: also those that are refused, or answered, after it."""
    script = {i: answer for i in range(20) if i != last}
    run = Run(script, max_concurrency=15)
    assert (run.ending, run.failed, len(run.said)) == ("REFUSED", [], 1)
    assert len(run.sent) >= 15
    assert run.done == [last] * (last is not None)
