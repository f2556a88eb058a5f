"""One knob of the law: its name, unit, range and text; and which unknown names are nearly one of ours."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from governor.model.errors import BadSetting
from governor.model.phrases import whole_number

Value = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Knob:
    """One row of the table of knobs. `kind`: the schema's integer, number, boolean or string; the last has `choices`.

    `low`, `high`: the range of a number; `low_open`, `high_open`: that end itself is not allowed.
    """

    name: str
    env: str
    unit: str
    meaning: str
    kind: str
    guardrails: Value
    paceline: Value
    choices: tuple[str, ...]
    low: float
    high: float
    low_open: bool
    high_open: bool

    @property
    def allowed(self) -> str:
        """Return the allowed values, for people: "a whole number from 1 to 100,000 (requests)"."""
        if self.kind == "boolean":
            return "true or false"
        if self.kind == "string":
            return "one of " + ", ".join(self.choices)
        noun = "a whole number" if self.kind == "integer" else "a number"
        low = f"above {self.low:,}, " if self.low_open else f"from {self.low:,} "
        high = f"to below {self.high:,}" if self.high_open else f"to {self.high:,}"
        return f"{noun} {low}{high} ({self.unit})"

    def text(self, value: Value) -> str:
        """Return a value as an env file writes it; `parsed` gives it back exactly."""
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return str(value)

    def parsed(self, text: str) -> Value:
        """Return the value that a text means, ignoring surrounding blanks and letter case.

        Raise BadSetting if it is not allowed.
        """
        word = text.strip().lower()
        if self.kind == "boolean" and word in _SWITCH:
            return _SWITCH[word]
        if self.kind == "integer" and re.fullmatch(r"[+-]?[0-9]{1,30}", word) and self.holds(int(word)):
            return int(word)
        meant = whole_number(word) if word.endswith(("k", "m")) else None
        if self.kind in ("integer", "number") and meant is not None and self.holds(meant):
            return meant if self.kind == "integer" else float(meant)
        if self.kind == "number" and _NUMBER.fullmatch(word) and self.holds(float(word)):
            return float(word)
        if self.kind == "string" and word in self.choices:
            return word
        raise self.refused(text.strip())

    def holds(self, value: float) -> bool:
        """Return whether a number is in range."""
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def refused(self, value: object) -> BadSetting:
        """Return the error for a value that is not allowed."""
        return BadSetting(f"{self.env}={shown(str(value))} is not allowed: {self.allowed}", self.env)


_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?")
_SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def shown(text: str) -> str:
    """Return a user's text for a one-line message: control characters escaped, no longer than 60 characters."""
    shown = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    return f"'{shown[:57]}...'" if len(shown) > 60 else f"'{shown}'"


# ---------------------------------------------------------------- names that are nearly ours

# Words that other programs put into names like ours, and that are not misspellings of one of our words.
_OTHER_WORDS = frozenset(["API", "IPM", "LOG", "MODEL", "MODELS", "QPM", "QPS", "RPH", "RPS", "TPH", "TPS"])
# Names that look like ours with the unit left out or in milliseconds, but belong to other clients.
_FOREIGN = frozenset(("OPENAI_REQUEST_TIMEOUT", "OPENAI_REQUEST_TIMEOUT_MS"))
_UNITS = frozenset(["MIN", "MINS", "MINUTES", "MS", "RATIO", "S", "SEC", "SECOND", "SECONDS", "SECS"])
_OUR_PREFIXES = ("OPENAI", "PACELINE")
# Words that no other program uses: with our prefix, a name that holds one means a knob.
_OUR_WORDS = frozenset(("HEADROOM", "STAGGER"))


def nearest(env: str, known: Collection[str]) -> str | None:
    """Return the name of those known that `env` was probably meant to be; None for a name that is ours or foreign.

    A near miss differs from ours by letter case or separators; by one or two wrong letters (one in a short word); by
    the order of its words or another unit (OPENAI_STAGGER_MS); or by a prefix of ours that the knob does not have
    (OPENAI_PREFLIGHT_MODE). Every other name is foreign, above all those of the SDK and of other programs
    (OPENAI_API_KEY, OPENAI_TIMEOUT, OPENAI_MAX_RETRIES, OPENAI_RPM), names without a prefix (MAX_CONCURRENCY) and names
    with another prefix (AZURE_OPENAI_...).
    """
    if env in known or env in _FOREIGN:
        return None
    words = re.findall("[A-Z0-9]+", env.upper())
    names = {name: name.split("_") for name in known}
    for name, ours in names.items():
        if "".join(words) == "".join(ours) or _bare(words) == _bare(ours):
            return name
    wrong = {name: _wrong_letters(words, ours) for name, ours in names.items()}
    nearest = min(wrong, key=wrong.__getitem__)
    if wrong[nearest] <= 2:
        return nearest
    if words and words[0] in _OUR_PREFIXES and not _OUR_WORDS.isdisjoint(words):
        return difflib.get_close_matches("_".join(words), known, 1, 0.0)[0]
    return None


def _bare(words: list[str]) -> tuple[list[str], bool]:
    """Return the words without our prefix and unit, sorted, and whether the name is in our name space."""
    named_ours = bool(words) and (words[0] in _OUR_PREFIXES or words[0] in ("FINALIZE", "PREFLIGHT"))
    rest = words[1:] if words and words[0] in _OUR_PREFIXES else words
    return sorted(word for word in rest if word not in _UNITS), named_ours


def _wrong_letters(words: list[str], ours: list[str]) -> float:
    """Return how many letters are wrong in all; inf if a word has more than 2 (1 in words of up to 6)."""
    if len(words) != len(ours):
        return math.inf
    wrong = 0
    for word, our in zip(words, ours, strict=True):
        if word != our:
            slips = _slips(word, our)
            wrong += slips
            if word in _OTHER_WORDS or slips > (1 if len(our) <= 6 else 2):
                return math.inf
    return wrong


def _slips(a: str, b: str) -> int:
    """Count letters inserted, omitted, replaced or swapped with a neighbour."""
    matching = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return max(len(a), len(b)) - sum(block.size for block in matching)
