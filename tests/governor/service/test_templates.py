"""Templates: what a prompt may do, what it may not, and the request that is made of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.journal.rows import Pending
from governor.model.errors import BadInput
from governor.model.requests import read_requests
from governor.model.work import Begun, Work
from governor.service.api.bodies import Template
from governor.service.api.templates import RENDERED_MOST, body_of, checked, lines_of, rendered
from governor.service.errors import ApiError
from governor.service.worker.feed import Cursor, Feed
from tests.governor.desks import work


def template(prompt: str, **rest: Any) -> Template:
    return Template(**({"name": "t", "model": "gpt-4o-mini", "prompt": prompt} | rest))


def prompt_of(prompt: str, /, **fields: Any) -> str:
    return rendered(checked(template(prompt)), fields, "input 0")


@pytest.mark.parametrize(
    ("text", "fields", "gives"),
    [
        ("Hello {{ name }}", {"name": "Ada"}, "Hello Ada"),
        ("{{a}}{{ b }}{{\n c\t}}", {"a": "1", "b": "2", "c": "3"}, "123"),
        ("{{ a.b.1.c }}", {"a": {"b": [0, {"c": "deep"}]}}, "deep"),
        # A column of a CSV may have a point in its name.
        ("{{ a.b }}", {"a.b": "column", "a": {"b": "inner"}}, "column"),
        ("{{ first-name }} {{ größe }} {{ 0 }}", {"first-name": "Ada", "größe": "7", "0": "zero"}, "Ada 7 zero"),
        ("{{ n }} {{ x }} {{ t }} {{ z }}", {"n": 3, "x": 0.5, "t": True, "z": None}, "3 0.5 true null"),
        ("{{ d }}", {"d": {"a": ["<", "é"]}}, '{"a": ["<", "é"]}'),
        # The fields of an input are data, whatever they are called and hold.
        ("{{ items }} {{ d.keys }}", {"items": "mine", "d": {"keys": "too"}}, "mine too"),
        ("{{ text }}", {"text": "{{ 7 * 7 }}{% x %}"}, "{{ 7 * 7 }}{% x %}"),
        ("<{{ html }}>\n", {"html": "<b>"}, "<<b>>\n"),
        ('JSON: {"a": {"b": 1}} and {x}', {}, 'JSON: {"a": {"b": 1}} and {x}'),
        ('{{ "{{" }} x {{ \'}}\' }} {{ "{%" }} {{ "{#" }}', {}, "{{ x }} {% {#"),
        ("no field", {}, "no field"),
    ],
)
def test_what_a_prompt_may_do(text: str, fields: dict[str, Any], gives: str) -> None:
    assert prompt_of(text, **fields) == gives


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\nb {% for x in xs %}{{ x }}{% endfor %}", r"prompt, line 2: '\{% for x in xs %\}' is template logic"),
        ("{% if a %}x{% endif %}", r"prompt, line 1: .* is template logic, .*prepare conditions and lists"),
        ("{# note #}", "is template logic"),
        ("{{ x | upper }}", r"line 1: 'x \| upper' is not the name of a field: .*without filters"),
        ("\n\n{{ a + 1 }}", "line 3: 'a \\+ 1' is not the name"),
        ("{{ x() }}", "is not the name"),
        ("{{ xs[0] }}", "is not the name"),
        ("{{ ''.__class__ }}", "is not the name"),
        ("{{ }}", "is not the name"),
        ("{{{ x }}}", "is not the name"),
        ("{{ a..b }}", "is not the name"),
        ("{{ first name }}", "is not the name"),
        ("ok {{", r"line 1: \{\{ without \}\}"),
        ('{{ "{{ }}', "is not the name"),
        ("{{ a }}" * 5_001, "more than 5,000 fields"),
    ],
)
def test_what_a_prompt_may_not_do_is_said_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        checked(template(text))
    assert (caught.value.status, caught.value.code) == (422, "BAD_TEMPLATE")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["x.__class__", "x.append", "x.y.z", "x.9", "x.-1", "nam", "x.²"])
def test_a_field_that_an_input_lacks_is_named_with_the_input(field: str) -> None:
    for value in ("text", [1], {"a": 1}, 7, None, True):
        with pytest.raises(BadInput, match=rf"input 0: the template fills in '{field}', which this input lacks"):
            prompt_of(f"Hello {{{{ {field} }}}}", x=value)


def test_what_is_rendered_is_bounded() -> None:
    with pytest.raises(BadInput, match="longer than 1,000,000 characters"):
        prompt_of("{{ t }}" * 500, t="x" * (RENDERED_MOST // 400))
    with pytest.raises(BadInput, match="nested too deeply"):
        prompt_of("{{ a }}", a=_nested(100_000))


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "unit", ["{{", "{{ x", '{{ "', "{{ ' ", "}}", "{{x}}", "{{ x }}{{", "{", "{ {", '{{"}}"}}', "{%"]
)
def test_any_template_takes_time_in_proportion_to_its_length(unit: str) -> None:
    """Work is counted, not time: the interpreter's steps in our functions, for a text and one twice as long."""

    def steps(length: int) -> int:
        count = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal count
            count += event == "line"
            return trace

        text = unit * (length // len(unit))
        sys.settrace(trace)
        try:
            with contextlib.suppress(ApiError, BadInput):
                rendered(checked(template(text)), {"x": "1"}, "input 0")
        finally:
            sys.settrace(None)
        return count

    assert steps(20_000) <= 2.2 * steps(10_000) + 2_000


@given(st.text(max_size=60))
def test_any_text_is_rendered_or_refused_and_nothing_else(text: str) -> None:
    with contextlib.suppress(ApiError, BadInput):
        rendered(checked(template(text or "x")), {"x": "1"}, "input 0")


@pytest.mark.parametrize(
    ("endpoint", "model", "expected"),
    [
        ("/v1/chat/completions", "gpt-4o", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}),
        (
            "/v1/chat/completions",
            "gpt-5-mini",
            {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9},
        ),
        ("/v1/responses", "gpt-4o", {"input": "hi", "max_output_tokens": 9}),
        ("/v1/completions", "davinci", {"prompt": "hi", "max_tokens": 9}),
        ("/v1/embeddings", "e-3", {"input": "hi"}),
    ],
)
def test_each_endpoint_gets_the_body_that_it_reads(endpoint: str, model: str, expected: dict[str, Any]) -> None:
    made = template("hi", endpoint=endpoint, model=model, parameters={"temperature": 0.5}, max_output_tokens=9)
    assert body_of(made, "hi") == {"model": model, "temperature": 0.5} | expected
    (request,) = read_requests(lines_of(made, [{}]), "inputs")
    assert request.sizes.max_tokens == (9 if endpoint != "/v1/embeddings" else -1)


def test_parameters_cannot_take_the_places_that_the_template_fills() -> None:
    for name in ("model", "messages", "stream", "max_tokens"):
        with pytest.raises(ApiError, match=rf"parameters\.{name}"):
            checked(template("p", parameters={name: 1}))


def test_each_input_is_a_line() -> None:
    found = [json.loads(text) for text in lines_of(template("{{ n }}"), [{"n": 1}, {"n": 2}])]
    assert [each["custom_id"] for each in found] == ["i0", "i1"]
    assert [each["body"]["messages"][0]["content"] for each in found] == ["1", "2"]


# ---------------------------------------------------------------- whose line is next


class Rows:
    """Records of a batch with equal lines."""

    def __init__(self, batch: int, count: int, tokens: float) -> None:
        self.rows = [Pending(work((batch << 24) + i, tokens), 0) for i in range(count)]

    def pending(self, pool: str, *, longest_first: bool, is_new: bool) -> Iterator[Pending]:
        return iter(self.rows)


def served(*batches: tuple[int, float]) -> list[int]:
    """The order in which batches (lines, tokens per line) get their turns, all of them there from the beginning."""
    order: list[int] = []

    async def main() -> None:
        feed = Feed(lambda: None, lambda error: None)

        def as_it_is(pending: Pending, begun: Begun) -> Work:
            return pending.work

        for batch, (count, tokens) in enumerate(batches, 1):
            rows: Any = Rows(batch, count, tokens)
            ways: dict[str, Any] = {"longest_first": False, "is_new": True, "work_of": as_it_is}
            feed.add(Cursor(batch, rows, "default", begun=(0.0, []), **ways))
        for _ in range(10_000):
            if not feed.cursors:
                return
            # Chunks are read in threads, and nobody here is as slow as a provider.
            if all(cursor.has_some for cursor in feed.cursors.values()):
                order.append(next(feed).request.index >> 24)
            else:
                await asyncio.sleep(0.001)
        raise AssertionError("it never ends")

    asyncio.run(main())
    return order


def test_batches_take_turns_by_their_tokens() -> None:
    order = served((200, 100.0), (50, 400.0))
    assert len(order) == 250
    # At every moment both have had the same tokens, to within one line of each.
    for end in range(len(order)):
        part = order[: end + 1]
        if part.count(1) < 200 and part.count(2) < 50:
            assert abs(part.count(1) * 100.0 - part.count(2) * 400.0) <= 500.0


def test_a_batch_alone_has_every_turn() -> None:
    assert served((300, 7.0)) == [1] * 300
