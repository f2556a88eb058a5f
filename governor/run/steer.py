"""Steering of a live run from outside: signals, questions at a terminal, commands of other processes."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

from governor.journal.journal import PAUSE, RESUME, SET, UNSET, Journal
from governor.journal.rows import Command
from governor.model.errors import BadSetting, quoted
from governor.model.policy import KNOB_BY_ENV, KNOBS, Policy

# The prefix of a command's word that names the pool.
POOL_WORD = "pool="
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The same signal twice within this time is one: no one presses Ctrl-C so fast.
_TWICE_S = 0.1


class Signals:
    """SIGINT, SIGTERM, SIGHUP: the first asks to stop (`stopping`), a second cancels (`cancelling`). Use it in a loop.

    `names`: the signals received. A SIGHUP that is ignored stays ignored, as `nohup` needs.
    """

    def __init__(self, came: Callable[[str], None]) -> None:
        self.names: list[str] = []
        self.stopping = asyncio.Event()
        self.cancelling = asyncio.Event()
        self._came = came
        self._last = (-math.inf, 0)

    def _received(self, number: signal.Signals) -> None:
        """Take in a signal of the system. `timeout` sends its own twice at once, to the process and to its group."""
        now = time.monotonic()
        (last_at, last), self._last = self._last, (now, number)
        if number != last or now - last_at > _TWICE_S:
            self._on(number)

    def _on(self, number: signal.Signals) -> None:
        self.names.append(number.name)
        (self.cancelling if len(self.names) > 1 else self.stopping).set()
        self._came(number.name)

    @contextmanager
    def handled(self, stopper: Stopper | None = None) -> Iterator[None]:
        """Receive signals within this block; afterwards the former handlers are back. `stopper` acts like a Ctrl-C."""
        with stopper.bound(self._on) if stopper is not None else nullcontext(), self._signals():
            yield

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]
        for number in before:
            loop.add_signal_handler(number, self._received, number)
        try:
            yield
        finally:
            # The second of two at once must not meet a process that takes it for a new one, and loses its last words.
            time.sleep(max(0.0, self._last[0] + _TWICE_S - time.monotonic()))
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)


class Stopper:
    """Stops a run from any thread, at any time: `press` acts like a Ctrl-C on `paceline run`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._presses = 0
        self._then: Callable[[], object] | None = None

    @property
    def pressed(self) -> bool:
        """Return whether it was pressed."""
        return self._presses > 0

    def press(self) -> None:
        """Launch nothing more; on a second press, cancel what is in flight."""
        with self._lock:
            self._presses += 1
            if self._then is not None:
                self._then()

    @contextmanager
    def bound(self, on: Callable[[signal.Signals], None]) -> Iterator[None]:
        """Pass presses to `on` in the running loop within this block, earlier presses included."""
        loop = asyncio.get_running_loop()
        with self._lock:
            self._then = partial(loop.call_soon_threadsafe, on, signal.SIGINT)
            for _ in range(self._presses):
                self._then()
        try:
            yield
        finally:
            with self._lock:
                self._then = None


async def answered(ask: Callable[[str], bool], question: str) -> bool:
    """Return the user's answer at the terminal.

    It is asked in a thread that is never awaited, so silence holds up nothing.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bool] = loop.create_future()

    def given(yes: bool) -> None:
        if not future.done():
            future.set_result(yes)

    def run() -> None:
        try:
            yes = ask(question)
        except (EOFError, OSError, KeyboardInterrupt):
            yes = False
        loop.call_soon_threadsafe(given, yes)

    threading.Thread(target=run, name="question", daemon=True).start()
    return await future


# ---------------------------------------------------------------- commands of other processes


class SteerablePool(Protocol):
    """One pool as commands see it."""

    policy: Policy

    def pause(self) -> None:
        """Launch nothing until `resume`."""

    def resume(self) -> None:
        """Launch again."""

    def change(self, policy: Policy) -> None:
        """Adopt other settings and record them."""


class Commands:
    """Carries out the commands of other processes. `started`: the policies without the changes of `set`."""

    def __init__(
        self,
        journal: Journal,
        pools: Mapping[str, SteerablePool],
        started: Mapping[str, Policy],
        say: Callable[[str], None],
    ) -> None:
        self._journal = journal
        self._pools = pools
        self._started = started
        self._held = held_settings(journal.commands(), pools)
        self._say = say

    def at_start(self, at_s: float) -> None:
        """Take up commands given while no process ran the journal: a pause of then is over, changed settings count."""
        for command in self._journal.asked():
            if command.name in (SET, UNSET):
                self._take(command, at_s)
            else:
                self._journal.taken(command, at_s, "no process was running the journal")

    def look(self, at_s: float) -> None:
        """Take up commands given since the last look."""
        for command in self._journal.asked():
            self._take(command, at_s)

    def _take(self, command: Command, at_s: float) -> None:
        outcome = ""
        try:
            self._obey(command)
        except BadSetting as error:
            outcome = str(error)
            self._say(f"{command.name} was refused: {outcome}")
        self._journal.taken(command, at_s, outcome)

    def _obey(self, command: Command) -> None:
        names, words = split_words(command.words, self._pools)
        pools = [self._pools[name] for name in names]
        if command.name == PAUSE:
            for pool in pools:
                pool.pause()
            self._say("paused by `paceline pause`: requests in flight continue, `paceline resume` launches again")
        elif command.name == RESUME:
            for pool in pools:
                pool.resume()
            self._say("resumed by `paceline resume`")
        else:
            held = {name: _with(self._held[name], command.name, words) for name in names}
            # Check all of them before changing the first.
            policies = {name: self._started[name].set_values(words_of(held[name])) for name in names}
            self._held |= held
            for pool, policy in zip(pools, policies.values(), strict=True):
                changes = changes_text(pool.policy, policy)
                pool.change(policy)
                nothing = "nothing: the settings already had these values"
                self._say(f"changed by `paceline {command.name}`: {changes or nothing}")


# ---------------------------------------------------------------- lasting settings


def held_settings(commands: Iterable[Command], pools: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return, by pool, the settings that `paceline set` has changed: name -> value. They hold until `unset`.

    Refused commands do not count; waiting commands do, since the next process takes them up.
    """
    held: dict[str, dict[str, str]] = {name: {} for name in pools}
    for command in commands:
        if command.name in (SET, UNSET) and not command.outcome:
            named = [word.removeprefix(POOL_WORD) for word in command.words if word.startswith(POOL_WORD)]
            words = [word for word in command.words if not word.startswith(POOL_WORD)]
            for name in named or held:
                if name in held:
                    held[name] = _with(held[name], command.name, words)
    return held


def _with(held: Mapping[str, str], command: str, words: Sequence[str]) -> dict[str, str]:
    """Return a pool's held settings after a `set` or an `unset`; without names, `unset` withdraws all."""
    if command == UNSET:
        return {name: value for name, value in held.items() if words and name not in words}
    pairs = (word.partition("=") for word in words)
    return dict(held) | {name.strip(): value for name, _, value in pairs}


def words_of(held: Mapping[str, str]) -> list[str]:
    """Return held settings as NAME=VALUE words."""
    return [f"{name}={value}" for name, value in held.items()]


def check_unset(names: Sequence[str], held: Mapping[str, str]) -> None:
    """Raise BadSetting for a name that is not a setting, or that `paceline set` has not changed."""
    for name in names:
        if name not in KNOB_BY_ENV:
            Policy().set_values([f"{name}=x"])  # its error names the nearest setting
        if name not in held:
            now = f"changed are {', '.join(held)}" if held else "no setting was changed"
            raise BadSetting(f"{name} was not changed by `paceline set`: {now}", name)


def split_words(words: tuple[str, ...], pools: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the pools that a command means (all, unless it names one) and its NAME=VALUE words."""
    names = [word.removeprefix(POOL_WORD) for word in words if word.startswith(POOL_WORD)]
    for name in names:
        if name not in pools:
            raise BadSetting(f"there is no pool {quoted(name)}: {', '.join(pools)}")
    return names or list(pools), [word for word in words if not word.startswith(POOL_WORD)]


def changes_text(old: Policy, new: Policy) -> str:
    """Return the settings that differ, as text: "OPENAI_STAGGER_SECONDS 15 -> 25"."""
    changed = []
    for knob in KNOBS:
        before, after = getattr(old, knob.name), getattr(new, knob.name)
        if before != after:
            changed.append(f"{knob.env} {knob.text(before)} -> {knob.text(after)}")
    return ", ".join(changed)
