"""Counts what the synthetic provider saw, for `GET /_stats`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from governor.law import DIMENSIONS
from sim.serving.wire import AnswerSpec


class Stats:
    """Counts of what the provider saw; never a body, never a key. Times in the provider's seconds."""

    def __init__(self) -> None:
        self.requests = 0
        self.outcomes: Counter[str] = Counter()
        self.endpoints: Counter[str] = Counter()
        self.retry_counts: Counter[str] = Counter()
        self.charged_tokens = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.billed: dict[str, Counter[str]] = {}
        self.in_flight = 0
        self.in_flight_max = 0
        self.came_again = 0
        self.first_s = -1.0
        self.last_s = -1.0
        self.used_max = [0.0] * DIMENSIONS
        self.used_ratio_max = [0.0] * DIMENSIONS

    def bill(self, a: AnswerSpec, tier: str) -> None:
        """Count what an answer is billed for, by model and tier."""
        sums = self.billed.setdefault(f"{a.model} {tier}", Counter())
        sums.update(answers=1, prompt=a.prompt_tokens, cached=a.cached_tokens, output=a.output_tokens)

    def as_dict(self) -> dict[str, Any]:
        """Return what `GET /_stats` prints; see `Desk.stats`."""
        names = [name for name in vars(self) if name not in ("used_max", "used_ratio_max")]
        return {name: dict(value) if isinstance(value := getattr(self, name), Counter) else value for name in names}
