"""Prompt templates: Jinja2 with everything taken out that a prompt does not need, and what a rendered one becomes.

What lives here: the check of a template, its rendering, and the request that is made of it. What must not: storage.

Sandboxed by what is allowed, not by what is forbidden. A template may name fields of its input, items of those, `if`,
`for` (two deep), comparisons, arithmetic, and the filters below. There are no attributes of Python objects, no calls,
no macros, no assignments, no includes, and no loader that could read a file.

Whatever is left ends soon, and stays small. A template has so many nodes, so deep, and an input so many values and
characters. A value that is made on the way has no more characters than a prompt may have, looked at wherever one can
grow: at a filter, at `+` and `~`, and where it is written. And an input has so much time of the processor, looked at
there and at each turn of a loop: two nested loops over a text of a million letters would go on for days.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateRuntimeError, Undefined, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from governor.errors import BadInput, quoted
from governor.service.bodies import Template
from governor.service.errors import BAD_TEMPLATE, ApiError

RENDERED_MOST = 1_000_000
VALUES_MOST = 2_000
LOOPS_MOST = 2
NODES_MOST, DEPTH_MOST = 5_000, 40
# Seconds of the processor's time for one input: a thousand times what the longest of ordinary prompts take.
RENDER_S = 1.0
FILTERS = (
    *("abs", "capitalize", "d", "default", "escape", "first", "float", "int", "last", "length", "list", "lower"),
    *("reverse", "round", "sort", "string", "title", "tojson", "trim", "unique", "upper", "wordcount"),
)
TESTS = (
    *("defined", "undefined", "none", "string", "number", "boolean", "true", "false", "mapping", "sequence"),
    *("eq", "ne", "lt", "le", "gt", "ge", "==", "!=", "<", "<=", ">", ">=", "in", "even", "odd", "divisibleby"),
)
_ALLOWED: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem),
    *(nodes.If, nodes.For, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Compare, nodes.Operand, nodes.Slice),
    *(nodes.And, nodes.Or, nodes.Not, nodes.Add, nodes.Sub, nodes.Div, nodes.FloorDiv, nodes.Neg, nodes.Pos),
    *(nodes.List, nodes.Tuple, nodes.Concat, nodes.Keyword),
)
# Fields of a request that the template itself fills in, or that a batch cannot have.
_OURS = ("model", "messages", "input", "prompt", "stream", "max_tokens", "max_completion_tokens", "max_output_tokens")
_FILTER_DEPTH = 20
_TOO_DEEP = "prompt: it is nested too deeply"
# Filters whose figures cost time or memory: ten to the power of it, so many spaces.
FIGURES, FIGURE_MOST = ("round", "tojson"), 12


# Under these names the tree calls them; a prompt cannot, since they are no names of filters that it may use.
_TURNS, _JOINED = "the turns of a loop", "the joined parts"


class _Clock(threading.local):
    """Until when this thread may render, on the clock of its own use of the processor."""

    until = float("inf")


_clock = _Clock()


def _in_time() -> None:
    if time.thread_time() > _clock.until:
        raise TemplateRuntimeError(f"it takes longer than {RENDER_S:g} s for one input")


def _chars(value: Any, left: int = RENDERED_MOST) -> int:
    """How many characters may still come after all texts of a value; below 0, not to the last, where they are more."""
    if isinstance(value, str):
        return left - len(value)
    if isinstance(value, Mapping):
        for name, each in value.items():
            left = _chars(each, left - len(name))
            if left < 0:
                return left
    elif isinstance(value, list | tuple):
        for each in value:
            left = _chars(each, left - 1)
            if left < 0:
                return left
    return left


def _bounded(value: Any) -> Any:
    """The value, in time and not too large."""
    _in_time()
    if _chars(value) < 0:
        raise TemplateRuntimeError(f"a value becomes longer than {RENDERED_MOST:,} characters")
    return value


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes and gives values that are not too large."""

    @wraps(function)
    def limited(*args: Any, **rest: Any) -> Any:
        for each in args:
            _bounded(each)
        return _bounded(function(*args, **rest))

    return limited


def _turns(values: Iterable[Any]) -> Iterator[Any]:
    """The turns of a loop, as long as there is time."""
    for each in values:
        _in_time()
        yield each


def _joined(parts: Iterable[Any]) -> str:
    """What `~` makes."""
    texts: list[str] = []
    left = RENDERED_MOST
    for each in parts:
        texts.append(str(_bounded(each)))
        left -= len(texts[-1])
        if left < 0:
            _bounded(texts)
    return "".join(texts)


class _Environment(ImmutableSandboxedEnvironment):
    """Items of mappings and lists, and nothing else of any object."""

    intercepted_binops = frozenset({"+"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return _bounded(super().call_binop(context, operator, _bounded(left), _bounded(right)))

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        try:
            if isinstance(obj, Mapping) and isinstance(argument, str | int):
                return obj[argument]
            if isinstance(obj, list | tuple | str) and isinstance(argument, int | slice):
                return obj[argument]
        except (LookupError, TypeError, ValueError):
            pass
        if isinstance(obj, Undefined):
            return obj
        if type(obj).__name__ == "LoopContext" and argument in ("index", "index0", "first", "last", "length"):
            return getattr(obj, argument)
        return self.undefined(obj=obj, name=argument)


def _environment() -> _Environment:
    made = _Environment(
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        cache_size=0,
        finalize=_bounded,
        # What it would work out beforehand costs time that nobody looks at.
        optimized=False,
    )
    made.globals.clear()
    made.filters = {name: _limited(made.filters[name]) for name in FILTERS} | {_TURNS: _turns, _JOINED: _joined}
    made.tests = {name: made.tests[name] for name in TESTS}
    made.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return made


_ENVIRONMENT = _environment()


def checked(template: Template) -> Any:
    """The template, ready to render. `ApiError` 422 for one that is wrong or wants more than it may have."""
    for name in template.parameters:
        if name in _OURS:
            raise _bad(f"parameters.{name}: the template fills that in itself")
    if len(json.dumps(template.parameters)) > 100_000:
        raise _bad("parameters are longer than 100,000 characters")
    try:
        tree = _ENVIRONMENT.parse(template.prompt)
        if len(list(tree.find_all(nodes.Node))) > NODES_MOST:
            raise _bad(f"prompt: more than {NODES_MOST:,} parts in it")
        _check(tree, 0, 0, 0)
        return _ENVIRONMENT.from_string(_watched(tree))
    except TemplateError as error:
        line = f"line {getattr(error, 'lineno', None) or 1}: "
        raise _bad(f"prompt, {line}{error.message or 'it cannot be read'}") from None
    except (RecursionError, SyntaxError):
        raise _bad(_TOO_DEEP) from None


def _watched(tree: nodes.Template) -> nodes.Template:
    """The same with somebody who looks at the time and at sizes, where the language itself would not."""
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, _TURNS, [], [], None, None, lineno=loop.lineno)
    for node in [tree, *tree.find_all(nodes.Node)]:
        for name, value in node.iter_fields():
            if isinstance(value, list):
                value[:] = map(_without_concat, value)
            else:
                setattr(node, name, _without_concat(value))
    tree.set_environment(_ENVIRONMENT)
    return tree


def _without_concat(node: Any) -> Any:
    if not isinstance(node, nodes.Concat):
        return node
    return nodes.Filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED, [], [], None, None, lineno=node.lineno)


def _check(node: nodes.Node, loops: int, filters: int, depth: int) -> None:
    """Every node of the tree is one that a prompt needs."""
    if depth > DEPTH_MOST:
        raise _bad(_TOO_DEEP)
    if not isinstance(node, _ALLOWED):
        raise _bad(f"prompt, line {node.lineno}: {type(node).__name__.lower()} is not allowed in a template")
    if isinstance(node, nodes.Filter) and node.name not in FILTERS:
        raise _bad(f"prompt, line {node.lineno}: there is no filter {quoted(node.name)}: {', '.join(FILTERS)}")
    if isinstance(node, nodes.Test) and node.name not in TESTS:
        raise _bad(f"prompt, line {node.lineno}: there is no test {quoted(node.name)}: {', '.join(TESTS)}")
    if isinstance(node, nodes.Filter) and node.name in FIGURES:
        _check_figures(node)
    filters += isinstance(node, nodes.Filter)
    if isinstance(node, nodes.For):
        loops += 1
        if node.recursive:
            raise _bad(f"prompt, line {node.lineno}: a recursive loop is not allowed in a template")
    if loops > LOOPS_MOST or filters > _FILTER_DEPTH:
        raise _bad(f"prompt, line {node.lineno}: loops more than {LOOPS_MOST} deep, or a chain of filters too long")
    for child in node.iter_child_nodes():
        _check(child, loops, filters, depth + 1)


def _check_figures(node: nodes.Filter) -> None:
    """A filter that would take a figure to its power, or repeat spaces by it, gets small ones that stand there."""
    for given in (*node.args, *(each.value for each in node.kwargs)):
        value = -given.node.value if isinstance(given, nodes.Neg) and isinstance(given.node, nodes.Const) else None
        value = given.value if isinstance(given, nodes.Const) else value
        if (isinstance(value, int | float) and abs(value) > FIGURE_MOST) or value is None:
            raise _bad(
                f"prompt, line {node.lineno}: filter {node.name} takes figures of at most {FIGURE_MOST}, written out"
            )
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        raise _bad(f"prompt, line {node.lineno}: filter {node.name} takes figures that are written out")


def _bad(message: str) -> ApiError:
    return ApiError(422, BAD_TEMPLATE, message)


def _values(value: Any, left: int) -> int:
    """How many values may still come after this one."""
    if isinstance(value, Mapping):
        for each in value.values():
            left = _values(each, left - 1)
            if left < 0:
                return left
    elif isinstance(value, list):
        for each in value:
            left = _values(each, left - 1)
            if left < 0:
                return left
    return left


def rendered(made: Any, fields: Mapping[str, Any], place: str) -> str:
    """The prompt for one input. BadInput, naming the input, where that cannot be."""
    parts: list[str] = []
    size = 0
    _clock.until = time.thread_time() + RENDER_S
    try:
        if _values(fields, VALUES_MOST) < 0:
            raise BadInput(f"more than {VALUES_MOST:,} values in one input", place)
        if _chars(fields) < 0:
            raise BadInput(f"more than {RENDERED_MOST:,} characters in one input", place)
        for part in made.generate(dict(fields)):
            parts.append(part)
            size += len(part)
            if size > RENDERED_MOST:
                raise BadInput(f"the prompt becomes longer than {RENDERED_MOST:,} characters", place)
    except TemplateError as error:
        raise BadInput(
            f"the template cannot be filled in: {error.message or type(error).__name__}"[:300], place
        ) from None
    except (ArithmeticError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise BadInput(f"the template cannot be filled in: {type(error).__name__}", place) from None
    finally:
        _clock.until = float("inf")
    return "".join(parts)


# ---------------------------------------------------------------- requests


def lines_of(template: Template, inputs: Iterable[Mapping[str, Any]], runs: int) -> Iterator[str]:
    """The lines of the batch format that the inputs make: custom_id `i3-r0` is the first run of the fourth input."""
    made = checked(template)
    for i, fields in enumerate(inputs):
        body = body_of(template, rendered(made, fields, f"input {i}"))
        for run in range(runs):
            record = {"custom_id": f"i{i}-r{run}", "method": "POST", "url": template.endpoint, "body": body}
            yield json.dumps(record, separators=(",", ":"))


def body_of(template: Template, prompt: str) -> dict[str, Any]:
    """What is sent for a rendered prompt."""
    body: dict[str, Any] = {"model": template.model, **template.parameters}
    cap = template.max_output_tokens
    if template.endpoint == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": prompt}]
        if cap is not None:
            body["max_completion_tokens" if _reasons(template.model) else "max_tokens"] = cap
    elif template.endpoint == "/v1/responses":
        body["input"] = prompt
        if cap is not None:
            body["max_output_tokens"] = cap
    elif template.endpoint == "/v1/completions":
        body["prompt"] = prompt
        if cap is not None:
            body["max_tokens"] = cap
    else:
        body["input"] = prompt
    return body


def _reasons(model: str) -> bool:
    """Whether a chat model takes its cap under the newer name only."""
    return model.startswith(("o1", "o3", "o4", "gpt-5", "gpt-6"))
