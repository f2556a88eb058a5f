"""Detects refusals that are not the fault of single requests: the first requests of a run all meet the same refusal.

A refusal normally ends its own request. But a model that does not exist, a base URL without /v1 or a key without rights
makes the provider refuse every request alike, and a run would send a whole file to find that out. So until a request
has succeeded, the driver sets refused requests aside undecided, and `Refusals` tells it to stop the run after enough
equal refusals. Requests set aside then stay pending, and the same command sends them again once the cause is fixed. The
first success of a request launched later ends them one by one; from a success on, each refusal ends its own request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable

from governor.model.errors import quoted
from governor.model.requests import Answer, Outcome, Request, Scope

# Equal refusals needed if the address, the account or the model is refused, which no content of a request influences.
SAME_REFUSALS = 3
# Equal bad requests needed: the first lines of a file may share a fault, and more refusals still cost nothing.
SAME_BAD_REQUESTS = 10
# Refusals of a line's content say nothing about the next line, however many come first: the longest may go first.
_OF_INPUT = re.compile(
    r"content.?(filter|policy|management)|moderation|flagged|safety|context.?(length|window)|too.(long|large)|"
    r"maximum.{0,20}length|invalid.prompt",
    re.IGNORECASE,
)
# The parts in which equal refusals differ: figures, ids, times.
_FIGURES = re.compile(r"\w*[0-9]\w*")
_BY_STATUS = {
    402: "check the account's credit, or lower max_tokens",
    403: "check what this key may use, and from where",
    404: "check the model's name, and that this account has access to it",
}
_ADDRESS = (
    "what is there is not the API: check the base URL (OPENAI_BASE_URL, --base-url or the pool's base_url; most end in "
    "/v1)"
)
THEN = "then the same command sends them again (--yes goes on as it is)"
_LINE = "check what these lines ask for"


class Refusals:
    """The refusals of one run, or of one batch. Not thread-safe.

    `models`: the models that the run asks for; refusals that may concern a model stop the run only after each of them
    has met enough. `answered`: an earlier run had answers, so that only the address is still in doubt. `halt(line)` is
    called once, when the run should stop: the line names the request, the refusal, what to check, and what to do
    `then`. `lasting`: another quota can serve the requests, so that address, account and model may be refused at any
    time, and not only before the first success.
    """

    def __init__(
        self,
        models: Iterable[str] = (),
        *,
        answered: bool = False,
        halt: Callable[[str], None],
        then: str = THEN,
        lasting: bool = False,
    ) -> None:
        self._models = frozenset(models)
        self._answered = answered
        self._halt = halt
        self._then = then
        self._lasting = lasting
        self._succeeded = self._halted = False
        # By model, "" for the address: the latest refusal, and how many equal ones have come in a row.
        self._alike: dict[str, tuple[tuple[str, ...], int]] = {}

    def succeeded(self) -> None:
        """Note that a request was answered: from now on a refusal ends its own request, unless the run is stopping."""
        self._succeeded = not self._halted
        self._alike.clear()

    def may_concern_all(self, answer: Answer) -> bool:
        """Return whether this refusal may concern every request, so that its own request is not yet lost."""
        of_input = bool(_OF_INPUT.search(f"{answer.error_code} {answer.message}"))
        if self._lasting and (answer.scope is Scope.ADDRESS or (answer.status in _BY_STATUS and not of_input)):
            return True
        if self._succeeded:
            return False
        if answer.scope is Scope.ADDRESS:
            return True
        if self._answered or answer.outcome is not Outcome.BAD_REQUEST:
            return False
        return answer.status in (402, 404) or not of_input

    def refused(self, request: Request, answer: Answer) -> None:
        """Count a refusal that may concern every request, and call `halt` if the count is sufficient.

        Requests in flight at that moment that are refused as well are set aside like the others.
        """
        if self._halted:
            return
        group = "" if answer.scope is Scope.ADDRESS else request.model
        words = (str(answer.status), answer.error_code, _FIGURES.sub("", answer.message))
        last, count = self._alike.get(group, (words, 0))
        self._alike[group] = words, (count + 1 if words == last else 1)
        enough = SAME_REFUSALS if group == "" or answer.status in _BY_STATUS else SAME_BAD_REQUESTS
        groups = [group] if group == "" else self._models | {group}
        if all(self._alike.get(each, (words, 0))[1] >= enough for each in groups):
            self._halted = True
            none_before = not self._succeeded
            self._halt(f"{halt_text(request, answer, enough, none_before=none_before)}; {self._then}")


def halt_text(request: Request, answer: Answer, count: int, *, none_before: bool = True) -> str:
    """Return why a run stops: the request, its refusal, and what to check. `none_before`: no request has succeeded."""
    check = _ADDRESS if answer.scope is Scope.ADDRESS else _BY_STATUS.get(answer.status, _LINE)
    said = " ".join((answer.message or answer.raw or json.dumps(answer.body or {})).split())[:300]
    what = " ".join(str(part) for part in (answer.status or "", answer.error_code) if part)
    who = f"the first {count} requests met the same and none has succeeded"
    if not none_before:
        who = f"{count} requests in a row met the same"
    return f"{who}: request {quoted(request.custom_id)}: {f'{what}: ' if what else ''}{said}: {check}"
