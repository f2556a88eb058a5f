"""Requests to simulate, as columns: what is known of each at submission, and its answer, which is not known yet.

Theory of operation. A workload has a visible side (sizes as in `Sizes`) and a hidden one: the length the model would
write if nothing cut it, and a recorded latency. `columns` keeps them apart: reservations come from the visible side
alone, so that no policy can profit from an answer it could not know. The reserve and charge columns are cached
separately, by rule: a search over a hundred policies computes a handful of columns.

Every input carries its provenance, "measured" or "assumed". What no file states is drawn in `synthetic`.

Memory: 8 bytes per number; a column with one value for all rows takes 8 bytes in all (a view with stride 0).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from governor.model.errors import BadInput
from governor.model.estimate import LEARNED, Sizes, charge_of
from governor.model.requests import url_of

Whole = NDArray[np.int64]
Real = NDArray[np.float64]
Arrivals = Literal["batch", "trace"]
Provenance = dict[str, tuple[str, str]]

MEASURED = "measured"
ASSUMED = "assumed"

# More tokens than this in one request mean that the wrong column was read: no model comes within a factor of ten.
TOKENS_MAX = 100_000_000
# Rows processed at once: intermediate arrays stay small for any number of rows.
BLOCK = 65_536
# The cache of one workload: bytes of columns kept, and the fewest entries kept.
CACHE_BYTES = 64 * 2**20
CACHE_MIN = 6


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns that the engines read: read-only arrays of shape (requests,), in order of submission.

    `arrival_s`: zeros for a batch. `output_tokens`: uncapped output of the model (hidden), over all `n` answers. `cap`:
    declared maximum over all `n` answers, -1 = none. `reserve`, `charge`: our reservation and the provider's charge,
    whole tokens; `finalize_*`: the same with the finalize pass's cap. `recorded_s`: latency from the trace, -1 = none.
    `kind`: a number per model, endpoint and declared cap if our reservations learn by it, else None.
    """

    arrival_s: Real
    prompt_tokens: Whole
    output_tokens: Whole
    cap: Whole
    reserve: Real
    charge: Real
    finalize_reserve: Real
    finalize_charge: Real
    recorded_s: Real
    kind: Whole | None = None

    def __len__(self) -> int:
        return len(self.reserve)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Workload:
    """Requests in order of submission. Arrays of one length; see `Sizes` for the visible ones (`max_tokens` -1 = none).

    Hidden: `output_tokens` (uncapped, reasoning included, over all `n` answers) and `recorded_s` (seconds, -1 = none).
    `arrival_s` counts from the first arrival and never falls; zeros, and `has_arrivals` False, if unknown.
    `models`: one name, or one per request. `provenance`: input -> (MEASURED or ASSUMED, from where or how).
    """

    endpoint: Whole
    prompt_tokens: Whole
    chars: Whole
    role_chars: Whole
    messages: Whole
    images: Whole
    tools: Whole
    n: Whole
    max_tokens: Whole
    output_tokens: Whole
    arrival_s: Real
    recorded_s: Real
    custom_ids: list[str] | None = None
    models: str | list[str] | None = None
    has_arrivals: bool = False
    provenance: Provenance = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ARRAYS}
        assert len(set(lengths.values())) == 1, f"columns of different lengths: {lengths}"
        for rows in (self.custom_ids, self.models):
            assert not isinstance(rows, list) or len(rows) == len(self), f"{len(rows)} names for {len(self)} requests"
        for name in ARRAYS:
            # A view, so that the caller's own array stays writable.
            column = getattr(self, name).view()
            column.flags.writeable = False
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def custom_id(self, row: int) -> str:
        """Return the request's own id, or one made from its row number, counted from 1."""
        return self.custom_ids[row] if self.custom_ids is not None else f"request-{row + 1}"

    def model(self, row: int) -> str:
        """Return the model that the request names, "" if it names none."""
        return self.models[row] if isinstance(self.models, list) else self.models or ""

    def url(self, row: int) -> str:
        """Return the endpoint's path."""
        return url_of(int(self.endpoint[row]))

    def take(self, rows: NDArray[Any]) -> Workload:
        """Return the workload of these rows, in this order: row numbers, or one boolean per row."""
        picked = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return replace(
            self,
            **{name: _taken(getattr(self, name), picked) for name in ARRAYS},  # type: ignore[arg-type]
            custom_ids=_names_taken(self.custom_ids, picked),
            models=_names_taken(self.models, picked) if isinstance(self.models, list) else self.models,
        )

    def with_(self, **changes: Any) -> Workload:
        """Return this workload with some columns changed; `provenance` is merged into the existing one."""
        provenance = {**self.provenance, **changes.pop("provenance", {})}
        return replace(self, provenance=provenance, **changes)


ARRAYS = tuple(f.name for f in fields(Workload))[:12]
VISIBLE = ARRAYS[:9]


def constant(value: float, count: int, kind: type[np.generic] = np.int64) -> NDArray[Any]:
    """Return a read-only column with one value for all rows, 8 bytes in all, shape (count,)."""
    return np.broadcast_to(np.asarray(value, kind), (count,))


def _taken(column: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    if len(column) and column.strides == (0,):
        return constant(column[0], len(rows), column.dtype.type)
    return column[rows]


def _names_taken(names: list[str] | None, rows: NDArray[Any]) -> list[str] | None:
    return None if names is None else [names[row] for row in rows.tolist()]


# ---------------------------------------------------------------- what the engines read

_CACHES: WeakKeyDictionary[Workload, dict[Hashable, tuple[NDArray[Any], ...]]] = WeakKeyDictionary()


def columns(
    workload: Workload,
    *,
    reserve_rule: str,
    est_tokens_per_run: int,
    charge_rule: str,
    as_of: str = "",
    finalize_max_tokens: int = 6_000,
    arrivals: Arrivals = "batch",
    recorded_scale: float = 1.0,
) -> Columns:
    """Return the columns under one reserve rule (ours) and one charge rule (the provider's, as of YYYY-MM-DD).

    Our rule uses the newest formulas, as it does live. `recorded_scale` multiplies recorded latencies; 0 leaves them
    out. Raise BadInput if `arrivals` is trace and the workload has none, BadSetting if a rule does not exist.
    """
    if arrivals == "trace" and not workload.has_arrivals:
        raise BadInput(
            "the workload has no arrival times: use --arrivals batch, or name their column with --columns arrival=NAME"
        )
    est = est_tokens_per_run
    reserved = _charged(workload, reserve_rule, est, "", finalize_max_tokens)
    charged = _charged(workload, charge_rule, est, as_of, finalize_max_tokens)
    cap, zeros = _cached(workload, "cap", lambda: _cap_and_zeros(workload))
    (recorded,) = _cached(workload, ("recorded", recorded_scale), lambda: (_recorded(workload, recorded_scale),))
    return Columns(
        arrival_s=workload.arrival_s if arrivals == "trace" else zeros,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        cap=cap,
        reserve=reserved[0],
        finalize_reserve=reserved[1],
        charge=charged[0],
        finalize_charge=charged[1],
        recorded_s=recorded,
        kind=_cached(workload, "kind", lambda: (_kinds(workload),))[0] if reserve_rule == LEARNED else None,
    )


def _kinds(workload: Workload) -> Whole:
    """Return a number per model, endpoint and declared cap, shared by the requests of a template (see `Learner`)."""
    models = np.zeros(len(workload), np.int64)
    if isinstance(workload.models, list):
        models = np.unique(np.array(workload.models), return_inverse=True)[1].astype(np.int64)
    rows = np.column_stack([models, workload.endpoint, workload.max_tokens])
    kinds: Whole = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return kinds


def _cached(workload: Workload, key: Hashable, make: Any) -> tuple[NDArray[Any], ...]:
    """Return the arrays under `key`, made once while they are kept; the least recently used are evicted first."""
    cache = _CACHES.setdefault(workload, {})
    arrays = cache.pop(key, None)
    if arrays is None:
        arrays = make()
        for array in arrays:
            array.flags.writeable = False
        room = max(CACHE_MIN, CACHE_BYTES // (16 * max(1, len(workload))))
        while len(cache) >= room:
            del cache[next(iter(cache))]
    cache[key] = arrays
    return arrays


def _cap_and_zeros(workload: Workload) -> tuple[Whole, Real]:
    most, n = workload.max_tokens, workload.n
    zeros = constant(0.0, len(workload), np.float64)
    if len(workload) and most.strides == n.strides == (0,):
        return constant(-1 if most[0] < 0 else most[0] * n[0], len(workload)), zeros
    return np.where(most < 0, -1, most * n), zeros


def _recorded(workload: Workload, scale: float) -> Real:
    if scale == 1.0:
        return workload.recorded_s
    if scale <= 0.0:
        return constant(-1.0, len(workload), np.float64)
    return np.where(workload.recorded_s < 0.0, -1.0, workload.recorded_s * scale)


def _charged(workload: Workload, rule: str, est: int, as_of: str, finalize_cap: int) -> tuple[NDArray[Any], ...]:
    """Return charges under one rule, with the declared caps and with the finalize pass's; one array if both agree."""
    key = (rule, est if rule in ("fixed", LEARNED) else 0, as_of if rule == "auto" else "", finalize_cap)

    def make() -> tuple[Real, Real]:
        main = charges(workload, rule, est, as_of)
        cap = constant(finalize_cap, len(workload))
        blocks = _charge_blocks(workload, rule, est, as_of, cap)
        same = all(np.array_equal(main[block], tokens) for block, tokens in blocks)
        return main, main if same else charges(workload, rule, est, as_of, cap)

    return _cached(workload, key, make)


def charges(workload: Workload, rule: str, est: int = 0, as_of: str = "", max_tokens: Whole | None = None) -> Real:
    """Return whole tokens that one rule charges per request; `max_tokens`, if given, replaces the declared caps."""
    tokens = np.empty(len(workload))
    for block, charged in _charge_blocks(workload, rule, est, as_of, max_tokens):
        tokens[block] = charged
    return tokens


def _charge_blocks(
    workload: Workload, rule: str, est: int, as_of: str, max_tokens: Whole | None
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Yield the charges block by block: (rows, tokens)."""
    visible = {name: getattr(workload, name) for name in VISIBLE}
    if max_tokens is not None:
        visible["max_tokens"] = max_tokens
    # At least one block, even for no rows, so that an unknown rule is reported.
    for start in range(0, max(1, len(workload)), BLOCK):
        block = slice(start, start + BLOCK)
        rows = {name: column[block].astype(np.int64, copy=False) for name, column in visible.items()}
        charged: Any = charge_of(rule, Sizes(**rows), est, as_of)
        yield block, charged
