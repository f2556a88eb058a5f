"""Law, chance and provider stay compilable as they stand: read from the syntax trees, function by function.

Inside a function of these modules there are numbers, booleans, tuples of them, `math` and the fields of the bags it was
given: no strings but the docstring, no None, no dicts, lists or sets, no comprehensions, no classes, no exceptions. The
compiler would refuse most of it; this names the line, and knows the rest as well (a chance or a clock from outside,
NumPy's functions, whose last bit differs when compiled).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "governor/law.py",
    "governor/model/keyed.py",
    "sim/model/windows.py",
    "sim/model/latency.py",
    "sim/model/provider.py",
)
IMPORTS = {"math", "dataclasses"}
# The provider takes its chance and its windows from other compiled modules; what a window counts has no type there.
IMPORTS_TOO = {
    "sim/model/provider.py": {"governor.model.keyed", "sim.model.latency", "sim.model.windows"},
    "sim/model/windows.py": {"typing"},
    "sim/model/latency.py": {"typing", "governor.model.keyed"},
}
BUILTINS = {"abs", "float", "int", "max", "min", "range"}
STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.For, ast.If, ast.Pass, ast.Return, ast.While)
EXPRESSIONS = (
    *(ast.Attribute, ast.BinOp, ast.BoolOp, ast.Call, ast.Compare, ast.Constant, ast.IfExp, ast.Name, ast.Subscript),
    *(ast.Tuple, ast.UnaryOp),
)
# Those make the empty arrays of the dataclasses and are never compiled: `field(default_factory=...)` names them.
FACTORY_FIELD = "default_factory"


def factories(tree: ast.Module) -> set[str]:
    """Functions that only the dataclasses call, for a field's first value: directly, or in a lambda in the class."""
    named = set()
    for body in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for keyword in (k for k in ast.walk(body) if isinstance(k, ast.keyword) and k.arg == FACTORY_FIELD):
            named |= {name.id for name in ast.walk(keyword.value) if isinstance(name, ast.Name)}
    called = {
        node.func.id
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return named - called


def own_names(tree: ast.Module) -> set[str]:
    """What a function may call or read beside its own variables: the module's functions, constants and imports."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def faults_of_function(function: ast.FunctionDef, known: set[str]) -> Iterator[str]:
    """One line per thing that may not stand in a compiled function."""
    body = function.body
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        body = body[1:]
    if function.decorator_list or function.args.kwonlyargs or function.args.vararg or function.args.kwarg:
        yield f"line {function.lineno}: {function.name} has decorators, keyword-only or variable arguments"
    nodes = [node for part in [*body, *function.args.defaults] for node in ast.walk(part)]
    local = {arg.arg for arg in function.args.args}
    local |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.stmt | ast.expr) and not isinstance(node, STATEMENTS + EXPRESSIONS):
            yield f"line {node.lineno}: {type(node).__name__}"
        elif isinstance(node, ast.Constant) and type(node.value) not in (int, float, bool):
            yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Name) and node.id not in local | known | BUILTINS | {"math"}:
            yield f"line {node.lineno}: {node.id} from outside"
        elif isinstance(node, ast.Call):
            yield from faults_of_call(node, known)


def faults_of_call(node: ast.Call, known: set[str]) -> Iterator[str]:
    if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
        yield f"line {node.lineno}: a call with keywords or a star"
    if isinstance(node.func, ast.Name):
        if node.func.id not in known | BUILTINS:
            yield f"line {node.lineno}: calls {node.func.id}()"
    elif not (isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)):
        yield f"line {node.lineno}: calls {ast.unparse(node.func)}"
    elif node.func.value.id != "math":
        yield f"line {node.lineno}: calls {ast.unparse(node.func)}()"


def faults_of(source: str, imports: set[str]) -> list[str]:
    tree = ast.parse(source)
    faults = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        faults += [f"line {node.lineno}: imports {name}" for name in names if name not in imports]  # type: ignore[attr-defined]
    exempt, known = factories(tree), own_names(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name not in exempt:
            faults += faults_of_function(node, known)
        elif isinstance(node, ast.ClassDef):
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
            faults += [f"line {node.lineno}: {node.name} is a bag of numbers and has {name}()" for name in methods]
        elif isinstance(node, ast.AsyncFunctionDef):
            faults.append(f"line {node.lineno}: {node.name} is async")
    return faults


@pytest.mark.parametrize("module", MODULES)
def test_functions_know_numbers_only(module: str) -> None:
    source = (ROOT / module).read_text(encoding="utf-8")
    faults = faults_of(source, IMPORTS | IMPORTS_TOO.get(module, set()))
    assert not faults, "\n" + "\n".join(f"{module}, {fault}" for fault in faults)


@pytest.mark.parametrize("module", MODULES)
def test_the_bags_hold_numbers_and_lists_of_floats(module: str) -> None:
    """Every field is an int, a float or a list of floats: what a NumPy record can hold."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    kinds = {
        ast.unparse(part.annotation)
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.AnnAssign)
    }
    assert kinds <= {"int", "float", "list[float]"}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("x = 'text'", "'text'"),
        ("x = None", "None"),
        ("x = [1.0]", "List"),
        ("x = {}", "Dict"),
        ("x = {1.0}", "Set"),
        ("x = f'{a}'", "JoinedStr"),
        ("x = [y for y in range(3)]", "ListComp"),
        ("x = max(y for y in range(3))", "GeneratorExp"),
        ("x = lambda y: y", "Lambda"),
        ("raise a", "Raise"),
        ("assert a", "Assert"),
        ("try:\n        x = a\n    finally:\n        x = 2", "Try"),
        ("with a:\n        x = 1", "With"),
        ("import time", "imports time"),
        ("from random import random", "imports random"),
        ("x = np.exp(a)", "np from outside"),
        ("x = time()", "calls time()"),
        ("x = a.sort()", "calls a.sort()"),
        ("x = print(a)", "calls print()"),
        ("x = round(a)", "calls round()"),
        ("x = helper(a=1.0)", "a call with keywords or a star"),
        ("class X:\n        y: int", "ClassDef"),
        ("def inner() -> float:\n        return 1.0", "FunctionDef"),
        ("global helper", "Global"),
        ("yield a", "Yield"),
    ],
)
def test_the_guard_sees(line: str, fault: str) -> None:
    clean = "import math\n\ndef helper(a: float):\n    return a\n\ndef f(a: float):\n    {}\n    return a\n"
    assert faults_of(clean.format("x = math.floor(helper(min(a, 2.0)))"), IMPORTS) == []
    assert any(found.endswith(fault) for found in faults_of(clean.format(line), IMPORTS))


def test_the_guard_lets_a_factory_be_and_no_function_that_others_call() -> None:
    bag = "class B:\n    x: list[float] = field(default_factory=lambda: made(4))\n"
    bag += "def made(n: int):\n    return [0.0] * n\n"
    assert faults_of(bag, IMPORTS) == []
    assert faults_of(bag + "\n\ndef f(a: float):\n    return made(3)\n", IMPORTS) == ["line 4: List"]
