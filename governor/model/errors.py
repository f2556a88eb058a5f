"""The error tree: whose fault it is, whether trying again can help, and the command line's exit code.

A provider's fault is an `Answer`, not an exception (see `answers`); our own bugs are assertions. The remaining errors
are here: a caller's mistake, and a run that must not start or cannot go on. A message is one line and names the thing,
the figures and the remedy; the command line prints it as it stands, without a traceback.

    exit code   meaning                                     raised as
    0, 1        all requests succeeded, some failed         (no exception)
    2           bad input: the caller's to fix              BadInput, BadSetting, Oversized
    3           refused, or can never finish                Refused
    4           the account's quota is used up              QuotaExhausted
    5           a budget of money or time is used up        BudgetExhausted

`FailureCode` names, for records, why a request ended without an answer.
"""

# ruff: noqa: N818  (a name says what is wrong; that it is an error, the base class says)
from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

CALLER = "caller"
PROVIDER = "provider"
OPERATOR = "operator"


def quoted(value: object, width: int = 60) -> str:
    """Return `value` as Python writes it, on one line and cut to `width` characters: user input, safe in a message."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]}...{text[-1]}"


def _rebuilt(kind: type[PacelineError], args: tuple[Any, ...], state: dict[str, Any]) -> PacelineError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class PacelineError(Exception):
    """Base class of every error that Paceline reports to its user instead of a result.

    `exit_code`: the process's exit code. `fault`: who can fix it: the `caller` (input, settings), the `operator` (the
    account, the budget) or the `provider`. `retryable`: whether the same call, unchanged, can succeed later.
    """

    exit_code: ClassVar[int] = 1
    fault: ClassVar[str] = CALLER
    retryable: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        # A simulation's worker process pickles its error for the parent; the default rebuilds it from the message
        # alone.
        return _rebuilt, (type(self), self.args, self.__dict__)


class BadInput(PacelineError):
    """Raised for a file, or a line of one, that cannot be read: the message starts with `path:line:` as far as known.

    `path`: the name that the user gave, "" if there is none. `line`: counted from 1, 0 if no line is to blame.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, path: str = "", line: int = 0) -> None:
        self.path = path
        self.line = line
        self.reason = message
        place = f"{path}:{line}" if path and line else path or (f"line {line}" if line else "")
        super().__init__(f"{place}: {message}" if place else message)


class BadSetting(PacelineError):
    """Raised for a setting that is out of range, unknown or misspelt.

    `name`: the variable, "" if several are to blame.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, name: str = "") -> None:
        self.name = name
        super().__init__(message)


class Oversized(PacelineError):
    """Raised for a request whose charge exceeds the provider's limit: it can never run, whenever it is sent.

    `request`: its number, as in records. `tokens`: its charge, of what `what` counts. `limit`: the limit that `setting`
    grants.
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        *,
        request: int,
        custom_id: str,
        tokens: float,
        limit: float,
        setting: str = "OPENAI_TPM_LIMIT",
        what: str = "tokens",
    ) -> None:
        self.request = request
        self.custom_id = custom_id
        self.tokens = tokens
        self.limit = limit
        super().__init__(
            f"request {request} ({quoted(custom_id)}) needs {tokens:,} {what}, the limit is {limit:,}: shorten it, "
            f"raise {setting}, or leave it out with --skip-oversized"
        )


class Refused(PacelineError):
    """Raised when the run may not start, or could not finish in the time allowed.

    `retry_after_s`: seconds after which the same call may be granted, -1 if waiting does not help.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, retry_after_s: float = -1.0) -> None:
        self.retry_after_s = retry_after_s
        self.retryable = retry_after_s >= 0.0
        super().__init__(message)


class QuotaExhausted(PacelineError):
    """Raised when the account has no money or quota left: nothing more is launched. Pending requests resume later."""

    exit_code: ClassVar[int] = 4
    fault: ClassVar[str] = OPERATOR


class BudgetExhausted(PacelineError):
    """Raised when the run's own budget of money or time is used up: nothing more is launched.

    Pending requests resume later.
    """

    exit_code: ClassVar[int] = 5
    fault: ClassVar[str] = OPERATOR


class FailureCode(StrEnum):
    """The reason why a request ended without an answer, as written in records, summaries and error files."""

    RATE_LIMIT_EXHAUSTED = "OPENAI_RATE_LIMIT_EXHAUSTED"
    DEADLINE_EXCEEDED = "OPENAI_DEADLINE_EXCEEDED"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    INSUFFICIENT_QUOTA = "INSUFFICIENT_QUOTA"
    BATCH_RATE_LIMITED = "BATCH_RATE_LIMITED"
    SERVER_ERROR = "OPENAI_SERVER_ERROR"
    TIMEOUT = "OPENAI_TIMEOUT"
    CONNECTION_DROPPED = "OPENAI_CONNECTION_DROPPED"
    BAD_REQUEST = "BAD_REQUEST"
    UNREADABLE_ANSWER = "UNREADABLE_ANSWER"
    UNAUTHORIZED = "UNAUTHORIZED"
    BATCH_CANCELLED = "BATCH_CANCELLED"
    OUTWAITED = "OUTWAITED"

    @property
    def fault(self) -> str:
        """Return who can fix it: see `PacelineError`."""
        return _FAULT_AND_RETRYABLE[self][0]

    @property
    def retryable(self) -> bool:
        """Return whether the same request, sent again unchanged in a later run, can succeed."""
        return _FAULT_AND_RETRYABLE[self][1]


_FAULT_AND_RETRYABLE = {
    FailureCode.RATE_LIMIT_EXHAUSTED: (CALLER, True),
    FailureCode.DEADLINE_EXCEEDED: (CALLER, True),
    FailureCode.REQUEST_TOO_LARGE: (CALLER, False),
    FailureCode.INSUFFICIENT_QUOTA: (OPERATOR, False),
    FailureCode.BATCH_RATE_LIMITED: (CALLER, True),
    FailureCode.SERVER_ERROR: (PROVIDER, True),
    FailureCode.TIMEOUT: (PROVIDER, True),
    FailureCode.CONNECTION_DROPPED: (PROVIDER, True),
    FailureCode.BAD_REQUEST: (CALLER, False),
    FailureCode.UNREADABLE_ANSWER: (PROVIDER, False),
    FailureCode.UNAUTHORIZED: (OPERATOR, False),
    FailureCode.BATCH_CANCELLED: (CALLER, True),
    FailureCode.OUTWAITED: (OPERATOR, True),
}
