"""Templates: what a prompt may do, what it may not, and the request that is made of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.driver import Begun, Work
from governor.errors import BadInput
from governor.records import Pending
from governor.requests import read_requests
from governor.service import templates
from governor.service.bodies import Template
from governor.service.errors import ApiError
from governor.service.feed import Cursor, Feed
from governor.service.templates import RENDERED_MOST, VALUES_MOST, body_of, checked, lines_of, rendered
from tests.governor.desks import work


def template(prompt: str, **rest: Any) -> Template:
    return Template(**({"name": "t", "model": "gpt-4o-mini", "prompt": prompt} | rest))


def prompt_of(prompt: str, /, **fields: Any) -> str:
    return rendered(checked(template(prompt)), fields, "input 0")


@pytest.mark.parametrize(
    ("text", "fields", "gives"),
    [
        ("Hello {{ name }}", {"name": "Ada"}, "Hello Ada"),
        ("{{ a.b[1].c }}", {"a": {"b": [0, {"c": "deep"}]}}, "deep"),
        ("{% for x in xs %}{{ loop.index }}{{ x }}{% endfor %}", {"xs": ["a", "b"]}, "1a2b"),
        ("{% for k in d %}{{ k }}={{ d[k] }};{% endfor %}", {"d": {"x": 1, "y": 2}}, "x=1;y=2;"),
        ("{{ x | default('none') | upper }}", {}, "NONE"),
        ("{{ d | tojson }}", {"d": {"a": ["<"]}}, '{"a": ["\\u003c"]}'),
        ("{% if n > 2 and n is even %}big{% else %}small{% endif %}", {"n": 4}, "big"),
        ("{{ a ~ '-' ~ b }}{{ n + 1 }}", {"a": "x", "b": "y", "n": 1}, "x-y2"),
        # The fields of an input are data, whatever they are called.
        ("{{ items }} {{ d.keys }}", {"items": "mine", "d": {"keys": "too"}}, "mine too"),
        ("{{ text }}", {"text": "{{ 7 * 7 }}"}, "{{ 7 * 7 }}"),
        ("<{{ html }}>\n", {"html": "<b>"}, "<<b>>\n"),
        ("{{ x | round(2) }} {{ x | round(-1, 'floor') }}", {"x": 123.456}, "123.46 120.0"),
        ("{{ d | tojson(indent=2) }}", {"d": [1]}, "[\n  1\n]"),
    ],
)
def test_what_a_prompt_may_do(text: str, fields: dict[str, Any], gives: str) -> None:
    assert prompt_of(text, **fields) == gives


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        # Ten to that power, or so many spaces: hours, with the interpreter held.
        "{{ 1 | round(1000000000, 'ceil') }}",
        "{{ 1 | round(-1000000000) }}",
        "{{ 1 | round(precision=x) }}",
        "{{ 1 | round(2 - -999999999) }}",
        "{{ x | tojson(indent=999999999) }}",
        "{{ x | tojson(*[999999999]) }}",
        "{{ x() }}",
        "{{ range(10) }}",
        "{{ cycler.__init__.__globals__ }}{{ cycler() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'a' %}",
        "{% from 'a' import b %}",
        "{% macro m() %}{% endmacro %}",
        "{% set x = 'a' %}",
        "{% set x %}a{% endset %}",
        "{% call m() %}{% endcall %}",
        "{% filter upper %}a{% endfilter %}",
        "{{ 'a' * 1000000000 }}",
        "{{ 2 ** 99 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ x | attr('__class__') }}",
        "{{ x | format(1) }}",
        "{{ x | replace('a', 'bb') }}",
        "{{ x | center(1000000000) }}",
        "{{ x | map('upper') }}",
        "{% for a in x %}{% for b in x %}{% for c in x %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in x recursive %}{{ loop(a) }}{% endfor %}",
        "{% for a in x %}{{ loop.cycle('a') }}{% endfor %}",
        "{% block a %}{% endblock %}",
        "{{ x is callable }}",
        "{% if a %}" * 101 + "{% endif %}" * 101,
        f"{{{{ {'not ' * 300}a }}}}",
        "{{ a }}" * 5_000,
        "{{",
        "{% nonsense %}",
    ],
)
def test_what_a_prompt_may_not_do(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        checked(template(text))
    assert (caught.value.status, caught.value.code) == (422, "BAD_TEMPLATE")


@pytest.mark.parametrize("text", ["{{ x.__class__ }}", "{{ x['__class__'] }}", "{{ x.y.z }}", "{{ x.append }}"])
def test_no_attribute_of_any_object_can_be_reached(text: str) -> None:
    for value in ("text", [1], {"a": 1}, 7, None, True):
        with pytest.raises(BadInput, match="input 0"):
            prompt_of(text, x=value)
    # Nor of what Jinja itself puts in.
    with pytest.raises(BadInput):
        prompt_of("{% for x in xs %}{{ loop.__init__ }}{% endfor %}", xs=[1])


def test_a_field_that_an_input_lacks_is_named_with_the_input() -> None:
    with pytest.raises(BadInput, match=r"input 0: .*'nam' is undefined"):
        prompt_of("Hello {{ nam }}", name="Ada")


def test_what_is_rendered_is_bounded() -> None:
    with pytest.raises(BadInput, match="longer than"):
        prompt_of("{% for a in xs %}{{ t }}{% endfor %}", xs=[0] * 1_000, t="x" * (RENDERED_MOST // 500))
    with pytest.raises(BadInput, match="values in one input"):
        prompt_of("{{ x }}", x=[[0] * 50] * (VALUES_MOST // 50))


def test_what_an_input_may_hold_is_bounded() -> None:
    with pytest.raises(BadInput, match="characters in one input"):
        prompt_of("{{ a[0] }}", a=["x" * (RENDERED_MOST // 2 + 1)] * 2)
    with pytest.raises(BadInput, match="RecursionError"):
        prompt_of("{{ a }}", a=_nested(1_500))


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # Two loops over a text: ten thousand million turns.
        ("{% for a in t %}{% for b in t %}{% if a < b %}{% endif %}{% endfor %}{% endfor %}", "takes longer than"),
        ("{{ t | list | sort | length }}" * 300, "takes longer than"),
        # A gigabyte on the way to a figure.
        (f"{{{{ ({'t ~ ' * 1_000}t) | length }}}}", "longer than"),
        (f"{{{{ [{'t, ' * 1_000}t] | string | length }}}}", "longer than"),
        (f"{{{{ [{'t, ' * 1_000}t] }}}}", "longer than"),
        (f"{{{{ ({'t + ' * 30}t) | length }}}}", "longer than"),
        (f"{{{{ t {'| tojson ' * 18} | length }}}}", "longer than"),
    ],
)
def test_no_prompt_takes_long_or_becomes_large_on_the_way(
    text: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "RENDER_S", 0.05)
    with pytest.raises(BadInput, match=says):
        prompt_of(text, t='"' * 40_000)


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
    (request,) = read_requests(lines_of(made, [{}], 1), "inputs")
    assert request.sizes.max_tokens == (9 if endpoint != "/v1/embeddings" else -1)


def test_parameters_cannot_take_the_places_that_the_template_fills() -> None:
    for name in ("model", "messages", "stream", "max_tokens"):
        with pytest.raises(ApiError, match=rf"parameters\.{name}"):
            checked(template("p", parameters={name: 1}))


def test_each_run_of_each_input_is_a_line() -> None:
    found = [json.loads(text) for text in lines_of(template("{{ n }}"), [{"n": 1}, {"n": 2}], 2)]
    assert [each["custom_id"] for each in found] == ["i0-r0", "i0-r1", "i1-r0", "i1-r1"]
    assert [each["body"]["messages"][0]["content"] for each in found] == ["1", "1", "2", "2"]


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
