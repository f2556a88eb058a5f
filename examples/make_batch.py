"""Makes `examples/batch.jsonl`: a night's batch of one small company, in OpenAI's batch input format.

Six kinds of work share the night: contract review, meeting minutes, support tickets, supplier notes, invoices and
product reviews. Each kind has its own instruction, its own declared cap on the answer and its own log-normal length, so
that the batch has what makes pacing hard: prompts from 250 to 3,000 tokens (4 characters each), caps from 40 to 1,200.
The text is put together from the sentences and word lists in `phrases.json`; names, people and companies are invented.

Same seed and count, same bytes: only `random.Random` draws, and nothing reads a clock. Standard library only.

    python examples/make_batch.py [--count 200] [--seed 20] [--out examples/batch.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = "gpt-4o"
URL = "/v1/chat/completions"
CHARS_MIN, CHARS_MAX = 1_000, 12_000

Phrases = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of work. `share` of the batch; prompt length in characters: median and log-normal sigma; output cap."""

    name: str
    share: int
    chars_median: int
    chars_sigma: float
    max_tokens: int
    temperature: float
    json_answer: bool = False


KINDS = (
    Kind("contract-review", 20, 6_800, 0.35, 1_200, 0.1),
    Kind("meeting-minutes", 15, 5_200, 0.40, 700, 0.3),
    Kind("ticket-summary", 25, 3_000, 0.50, 300, 0.2),
    Kind("product-copy", 15, 1_700, 0.30, 450, 0.8),
    Kind("invoice-extract", 15, 2_000, 0.40, 400, 0.0, json_answer=True),
    Kind("review-label", 10, 1_300, 0.25, 40, 0.0, json_answer=True),
)


class Writer:
    """Fills sentence templates: `{word}` draws from the list of that name, `{2..60}` a whole number in that range.

    `fixed` holds what one document says the same way throughout (its parties, its product).
    """

    def __init__(self, phrases: Phrases, rng: random.Random) -> None:
        self.words: dict[str, list[str]] = phrases["words"]
        self.rng = rng
        self.decks: dict[str, list[str]] = {}
        self.fixed: dict[str, str] = {}
        for name in phrases["fixed"]:
            self.fixed[name] = self._slot(name)

    def fill(self, template: str) -> str:
        return re.sub(r"\{([a-z]+|-?\d+\.\.\d+)\}", lambda match: self._slot(match[1]), template)

    def _slot(self, slot: str) -> str:
        low, dots, high = slot.partition("..")
        if dots:
            return str(self.rng.randint(int(low), int(high)))
        return self.fixed.get(slot) or self.fill(self.rng.choice(self.words[slot]))

    def deal(self, templates: list[str]) -> str:
        """The next template of a shuffled deck, filled; none comes again before all were dealt."""
        deck = self.decks.setdefault(templates[0], [])
        if not deck:
            deck += self.rng.sample(templates, len(templates))
        line = self.fill(deck.pop())
        return line[:1].upper() + line[1:]

    def until(self, templates: list[str], chars: int, between: str) -> list[str]:
        """Sentences that reach `chars` characters when they are joined by `between`."""
        lines: list[str] = []
        while len(between.join(lines)) < chars:
            lines.append(self.deal(templates))
        return lines


def contract(writer: Writer, text: Phrases, chars: int) -> str:
    """Numbered sections of two to four sentences each."""
    sections: list[str] = []
    titles = writer.rng.sample(text["titles"], len(text["titles"]))
    while sum(map(len, sections)) < chars:
        number = len(sections) + 1
        title = titles[(number - 1) % len(titles)]
        sentences = writer.until(text["body"], writer.rng.randint(320, 760), " ")
        clauses = [f"{number}.{at} {sentence}" for at, sentence in enumerate(sentences, start=1)]
        sections.append("\n".join([f"{number}. {title}", *clauses]))
    return "\n\n".join(sections)


def thread(writer: Writer, text: Phrases, chars: int) -> str:
    """Two voices by turns, each with a time stamp and a few sentences: a ticket or a transcript."""
    turns: list[str] = []
    minute = writer.rng.randint(8 * 60, 11 * 60)
    while sum(map(len, turns)) < chars:
        voice = text["voices"][len(turns) % len(text["voices"])]
        lines = writer.until(voice["lines"], writer.rng.randint(120, 420), " ")
        turns.append(f"[{minute // 60 % 24:02d}:{minute % 60:02d}] {writer.fill(voice['name'])}: {' '.join(lines)}")
        minute += writer.rng.randint(1, text["minutes_between"])
    return "\n".join(turns)


def listing(writer: Writer, text: Phrases, chars: int) -> str:
    """One statement a line: supplier notes, invoice positions, reviews."""
    return "\n".join(writer.until(text["body"], chars, "\n"))


LAYOUTS = {
    "contract-review": contract,
    "meeting-minutes": thread,
    "ticket-summary": thread,
    "product-copy": listing,
    "invoice-extract": listing,
    "review-label": listing,
}


def request(kind: Kind, number: int, phrases: Phrases, rng: random.Random) -> dict[str, Any]:
    """One line of the batch: a length is drawn first, within 250 to 3,000 tokens, and the text written to it."""
    text = phrases["kinds"][kind.name]
    writer = Writer(phrases, rng)
    system = writer.fill(text["system"])
    head, tail = writer.fill(text["head"]), writer.fill(text["tail"])
    drawn = kind.chars_median * rng.lognormvariate(0.0, kind.chars_sigma)
    # The last section may overshoot by about 1,100 characters; the margin keeps the longest prompt in range.
    chars = min(max(round(drawn), CHARS_MIN), CHARS_MAX - 1_200) - len(system) - len(head) - len(tail)
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": "\n\n".join([head, LAYOUTS[kind.name](writer, text, chars), tail])},
        ],
        "max_tokens": kind.max_tokens,
        "temperature": kind.temperature,
    }
    if kind.json_answer:
        body["response_format"] = {"type": "json_object"}
    subject = re.sub(r"[^a-z0-9]+", "-", writer.fill(text["subject"]).lower()).strip("-")
    custom_id = f"{kind.name}-{number:04d}-{subject.removeprefix('the-')}"
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": body}


def batch(count: int, seed: int) -> str:
    """The whole batch as JSONL: `count` requests, the kinds by their shares, in shuffled order."""
    phrases: Phrases = json.loads((HERE / "phrases.json").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    total = sum(kind.share for kind in KINDS)
    # The first kind takes what rounding leaves over.
    counts = {kind: count * kind.share // total for kind in KINDS}
    counts[KINDS[0]] += count - sum(counts.values())
    order = [kind for kind in KINDS for _ in range(counts[kind])]
    rng.shuffle(order)
    # Each request has its own generator, so that a change to one kind leaves the others as they were.
    lines = (
        request(kind, number, phrases, random.Random(f"{seed}:{number}:{kind.name}"))
        for number, kind in enumerate(order, start=1)
    )
    return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the example batch.")
    parser.add_argument("--count", type=int, default=200, help="requests (default: 200)")
    parser.add_argument("--seed", type=int, default=20, help="same seed and count, same bytes (default: 20)")
    parser.add_argument("--out", type=Path, default=HERE / "batch.jsonl", help="default: beside this script")
    options = parser.parse_args()
    # Whole or not at all: make takes the file's presence for its completeness.
    part = options.out.with_name(options.out.name + ".part")
    part.write_text(batch(options.count, options.seed), encoding="utf-8", newline="\n")
    os.replace(part, options.out)
    print(f"{options.out.name}: {options.count} requests, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
