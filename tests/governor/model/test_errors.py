"""The error tree: exit codes, one-line messages with figure and remedy, and safe passage between processes."""

from __future__ import annotations

import pickle

import pytest

from governor.model import errors

ONE_OF_EACH = [
    errors.PacelineError("it failed"),
    errors.BadInput("not JSON", "batch.jsonl", 7),
    errors.BadSetting("OPENAI_TPM_LIMIT=-1: from 0 up", "OPENAI_TPM_LIMIT"),
    errors.Oversized(request=812, custom_id="q-812", tokens=31_538, limit=30_000),
    errors.Refused("the window is full", retry_after_s=41.5),
    errors.QuotaExhausted("no credits remaining"),
    errors.BudgetExhausted("--max-cost 5.00 is spent"),
]


def test_exit_codes_are_the_published_ones() -> None:
    assert [error.exit_code for error in ONE_OF_EACH] == [1, 2, 2, 2, 3, 4, 5]


def test_oversized_names_request_figures_and_remedy() -> None:
    error = errors.Oversized(request=812, custom_id="q-812", tokens=31_538, limit=30_000)
    message = str(error)
    for part in ("request 812", "'q-812'", "31,538", "30,000", "raise OPENAI_TPM_LIMIT", "--skip-oversized"):
        assert part in message
    assert "\n" not in str(errors.Oversized(request=1, custom_id="a\nb", tokens=2, limit=1))


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("a.jsonl", 3, "a.jsonl:3: broken"),
        ("a.jsonl", 0, "a.jsonl: broken"),
        ("", 3, "line 3: broken"),
        ("", 0, "broken"),
    ],
)
def test_bad_input_says_where(path: str, line: int, message: str) -> None:
    error = errors.BadInput("broken", path, line)
    assert (str(error), error.path, error.line, error.reason) == (message, path, line, "broken")


def test_refused_is_retryable_only_where_waiting_helps() -> None:
    assert errors.Refused("full", retry_after_s=0.0).retryable
    assert not errors.Refused("larger than the limit").retryable


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda error: type(error).__name__)
def test_survives_the_way_between_processes(error: errors.PacelineError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_quoted_stays_short_and_on_one_line() -> None:
    assert errors.quoted("q-1") == "'q-1'"
    long = errors.quoted("x" * 1_000 + "\n")
    assert len(long) <= 60
    assert "\n" not in errors.quoted("a\nb")
    assert long.startswith("'xxx")
    assert long.endswith("...'")


def test_every_failure_code_has_a_fault_and_a_verdict() -> None:
    for code in errors.FailureCode:
        assert code.fault in {errors.CALLER, errors.PROVIDER, errors.OPERATOR}
    final = {code.value for code in errors.FailureCode if not code.retryable}
    assert final == {"REQUEST_TOO_LARGE", "INSUFFICIENT_QUOTA", "BAD_REQUEST", "UNREADABLE_ANSWER", "UNAUTHORIZED"}
