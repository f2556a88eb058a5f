"""What each form of answer means, row by row: see `forms`."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from governor.model.requests import Outcome
from governor.model.work import FINAL, SPENT, STOPPING
from governor.provider.answers import classify
from tests.answers.forms import FORMS, NOW, Form, error, rate


@pytest.mark.parametrize("form", FORMS, ids=[f"{i}: {form.source} {form.status}" for i, form in enumerate(FORMS)])
def test_what_it_means(form: Form) -> None:
    body = json.dumps(form.body) if isinstance(form.body, dict | list) else form.body
    for sent in (form.body, body, body.encode() if isinstance(body, str) else body):
        answer = classify(form.status, form.headers, sent, now_epoch=NOW)
        assert answer.outcome is form.outcome, answer
        assert answer.error_code == form.code, answer
        assert answer.retry_after_s == pytest.approx(form.wait_s)
        assert {limit.dimension: (limit.limit, limit.remaining) for limit in answer.limits} == form.limits
        assert (answer.used_prompt_tokens, answer.used_output_tokens) == form.used
        assert (answer.scope, answer.returns_at) == (form.scope, form.returns_at), answer
        assert (answer.has_text, answer.cut_off) == (form.has_text, form.cut_off)
        assert bool(answer.message) is (form.outcome is not Outcome.OK)
        assert "\n" not in answer.message


def test_a_success_that_cannot_be_read_keeps_what_came() -> None:
    """What is paid for is kept: as the body where it is an object, else as text."""
    for form in FORMS:
        if form.outcome is Outcome.MALFORMED:
            answer = classify(form.status, form.headers, form.body, now_epoch=NOW)
            if isinstance(form.body, dict):
                assert answer.body == form.body
            elif form.body != "":
                assert answer.raw == form.body
            assert answer.outcome in FINAL
            assert str(form.body)[:20] not in answer.message or not form.body


def test_the_table_is_large_and_shows_every_outcome() -> None:
    seen = Counter(form.outcome for form in FORMS)
    never_arrive = {Outcome.DROPPED, Outcome.LOCAL}
    assert len(FORMS) >= 150
    assert set(seen) == set(Outcome) - never_arrive
    assert min(seen.values()) >= 2, seen
    assert set(Outcome) - {Outcome.OK, Outcome.LOCAL} == {*SPENT, *STOPPING}


def test_quoted_refusals_are_waits(data_file: Callable[[str], Path]) -> None:
    """The 39 messages that were quoted in public, in OpenAI's wording: each passes after the wait that it states."""
    with data_file("openai-observed/http429_messages.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 39
    for row in rows:
        figures = (int(row[name]) for name in ("limit", "used", "requested"))
        message = rate(row["dimension"], *figures, row["try_again_in"])
        answer = classify(429, {}, error(message, "tokens", "rate_limit_exceeded"), now_epoch=NOW)
        assert (answer.outcome, answer.returns_at) == (Outcome.THROTTLED, None)
        assert answer.retry_after_s == pytest.approx(float(row["wait_s"]))
