"""Commands that texts show: found in markdown, and held against the real command line without running anything."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer
import typer.main

from sim.app.cli import app

_FENCE = re.compile(r"^(```+|~~~+|:::+)(.*)$")
_SETS = re.compile(r"[A-Z][A-Z0-9_]*=\S*")


APP: Any = typer.main.get_command(app)


class Shown(NamedTuple):
    """A command as a text shows it. `whole`: on a line of its own, so that it must parse as it stands."""

    path: Path
    line: int
    words: list[str]
    whole: bool

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}: paceline {shlex.join(self.words)}"


def shown_in(path: Path) -> Iterator[Shown]:
    """Every `paceline ...` of a markdown file: in blocks, indented or fenced, and between single quotes of code."""
    text = path.read_text(encoding="utf-8")
    fence, going, began = "", "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        found = _FENCE.match(line.strip())
        if found and (not fence or found[1].startswith(fence)):
            if not fence and found[2].startswith("{ran} "):
                yield from _of(path, number, found[2].removeprefix("{ran} "))
            fence = "" if fence else found[1]
            continue
        if going or fence or line.startswith("    "):
            going, began = f"{going} {line.strip()}".strip(), began or number
            if going.endswith("\\"):
                going = going[:-1]
                continue
            yield from _of(path, began, going)
            going, began = "", 0
    prose = re.sub(r"^(```|~~~).*?^\1[^\n]*$", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for each in re.finditer(r"`(paceline [^`]*)`", prose):
        words = each[1].split()[1:]
        yield Shown(path, prose.count("\n", 0, each.start()) + 1, words, whole=False)


def _of(path: Path, number: int, line: str) -> Iterator[Shown]:
    """The command of one line in a block, without prompt, settings before it, comment and ampersand."""
    if "paceline " not in line or "pip install" in line:
        return
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return
    words = words[1:] if words[:1] == ["$"] else words
    while words and _SETS.fullmatch(words[0]):
        words = words[1:]
    if words[:1] == ["paceline"]:
        yield Shown(path, number, words[1 : -1 if words[-1] == "&" else None], whole=True)


def complaint(shown: Shown) -> str:
    """What the real command line has against a command; "" where it takes it."""
    usage_error: Any = typer.BadParameter.__mro__[2]
    group = APP
    words = list(shown.words)
    context = typer.Context(group, info_name="paceline")
    while words and hasattr(group, "commands"):
        name, *words = words
        if name.startswith("-"):
            return "" if any(name in parameter.opts for parameter in group.params) else f"{shown}: no option {name}"
        command = group.commands.get(name)
        if command is None:
            return f"{shown}: there is no command {name}"
        if hasattr(command, "commands"):
            group, context = command, typer.Context(command, info_name=name, parent=context)
            continue
        if shown.whole:
            try:
                command.make_context(name, words, parent=context)
            except usage_error as error:
                return f"{shown}: {error.format_message()}"
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        strange = [word for word in words if word.startswith("--") and word.partition("=")[0].rstrip(",.") not in known]
        return f"{shown}: no option {', '.join(strange)}" if strange else ""
    return ""


def leaves(group: Any = None, name: str = "paceline") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name."""
    for each, command in (group or APP).commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{name} {each}")
        else:
            yield f"{name} {each}", command
