"""The settings in force: those that the process was started with, and later changes, which outlive it.

A change is recorded by name, before and after; later changes win, and null resets a name to its value at the start.
Every replica reads the changes of all, in order, so all have the same settings within a second.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from governor.model.errors import BadSetting, quoted
from governor.model.policy import KNOB_BY_ENV, KNOBS, Policy
from governor.model.pools import Pool
from governor.service.store.store import Store

# Settings that a batch may have of its own: how its requests are reserved and ordered. All others are the quota's.
OF_A_BATCH = (
    "OPENAI_CHARGE_RULE",
    "OPENAI_EST_TOKENS_PER_RUN",
    "OPENAI_LAUNCH_ORDER",
    "FINALIZE_MAX_TOKENS",
    "PREFLIGHT_MODE",
)


# So many of the latest changes are checked again.
LATE = 50


class Policies:
    """The settings in force, per pool; see the module."""

    def __init__(self, pools: Sequence[Pool], store: Store) -> None:
        self._base = {pool.name: pool.policy for pool in pools}
        self._store = store
        self._known: set[int] = set()
        self._own: dict[str, dict[str, str]] = {name: {} for name in self._base}
        self._turn = threading.Lock()
        # Further checks of a change, given the policies that would be in force; and the listeners to changes.
        self.checks: list[Callable[[Mapping[str, Policy]], object]] = []
        self.changed: list[Callable[[Mapping[str, Policy]], None]] = []

    def refresh(self) -> bool:
        """Read changes made since, by any replica; return whether there were any. Blocks.

        Two changes made at once may become visible in the other order, so some are read again; then all are applied
        anew, by their numbers, as every other replica does.
        """
        with self._turn:
            found = self._store.changes(max(self._known, default=0) - LATE)
            if all(change.number in self._known for change in found):
                return False
            own: dict[str, dict[str, str]] = {name: {} for name in self._base}
            for change in (changes := self._store.changes()):
                of_pool = own.setdefault(change.pool, {})
                for name, (_, after) in change.changes.items():
                    if after is None:
                        of_pool.pop(name, None)
                    else:
                        of_pool[name] = after
            self._own, self._known = own, {change.number for change in changes}
        return True

    def in_force(self) -> dict[str, Policy]:
        """Return the settings of each pool."""
        found = {}
        for name, base in self._base.items():
            words = [f"{env}={value}" for env, value in self._own[name].items() if env in KNOB_BY_ENV]
            found[name] = base.set_values(words)
        return found

    def of(self, pool: str) -> Policy:
        """Return the settings of one pool. Raise BadSetting if there is no pool of that name."""
        if pool not in self._base:
            raise BadSetting(f"there is no pool {quoted(pool)}: {', '.join(self._base)}")
        return self.in_force()[pool]

    def change(self, who: str, pool: str, wanted: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
        """Check, record and return a change: name -> (before, after). Raise BadSetting for a value not allowed.

        Blocks.
        """
        before = self.of(pool)
        started = self._base[pool]
        changes: dict[str, tuple[str, str | None]] = {}
        words = []
        for env, value in wanted.items():
            knob = KNOB_BY_ENV.get(env)
            if knob is None:
                before.set_values([f"{env}=x"])  # its error says that there is none, and names the nearest
                raise AssertionError(env)
            old = knob.text(getattr(before, knob.name))
            new = knob.text(getattr(started, knob.name)) if value is None else words_of(value)
            words.append(f"{env}={new}")
            changes[env] = (old, None if value is None else new)
        after = before.set_values(words)
        for check in self.checks:
            check(self.in_force() | {pool: after})
        told: dict[str, tuple[str, str | None]] = {}
        for env, (old, new_text) in changes.items():
            knob = KNOB_BY_ENV[env]
            text = knob.text(getattr(after, knob.name))
            if text != old or new_text is None:
                told[env] = (old, None if new_text is None else text)
        if told:
            self._store.add_change(who, pool, told)
            self.refresh()
        return told


def words_of(value: Any) -> str:
    """Return a JSON value as an env file writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def checked_overrides(policy: Policy, wanted: Mapping[str, Any]) -> dict[str, str]:
    """Return a batch's own settings as texts. Raise BadSetting for a setting that a batch cannot have."""
    for env in wanted:
        if env in KNOB_BY_ENV and env not in OF_A_BATCH:
            raise BadSetting(
                f"{env} is the whole pool's, not one batch's: change it with PUT /settings; a batch may set "
                f"{', '.join(OF_A_BATCH)}",
                env,
            )
    words = [f"{env}={words_of(value)}" for env, value in wanted.items()]
    made = policy.set_values(words)
    return {env: KNOB_BY_ENV[env].text(getattr(made, KNOB_BY_ENV[env].name)) for env in wanted}


def values_of(policy: Policy) -> dict[str, Any]:
    """Return every setting by its environment name, as JSON values."""
    return {knob.env: getattr(policy, knob.name) for knob in KNOBS}
