"""Replay: what was decided is decided again, to the bit, and what differs is named.

The records come from a script that calls the law itself, at random or by hand, and writes down what it answered; the
replay under test never sees how they were made. What a database does to them is `test_journal`'s matter.
"""

from __future__ import annotations

import copy
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor import law
from governor.journal import verify
from governor.journal.verify import Decision, LawReplay, VerifyResult
from governor.law import Params, State
from governor.model import lawcalls
from governor.model.lawcalls import BEGAN, REPRICED, RESTORED
from governor.model.needs import of_amounts, of_tokens
from governor.model.policy import Policy
from governor.scheduler.quota import REPORTED

CALLS = 400


def bits(value: float) -> bytes:
    """The 64 bits of a number: unlike ==, they tell 0.0 from -0.0 and one NaN from another."""
    return struct.pack("<d", value)


class Scribe:
    """Calls the law on a state of its own, and writes down what a driver would report. Numbers are made here anew."""

    def __init__(self, policy: Policy, pool: str = "default", leg: int = 1) -> None:
        self.p = policy.params()
        self.s = State()
        self.pool, self.leg = pool, leg
        self.decisions = [Decision(pool, leg, -1, BEGAN, flat(self.p), ())]

    def write(self, name: str, arguments: tuple[Any, ...], result: Any = None) -> None:
        results = () if result is None else result if isinstance(result, tuple) else (result,)
        numbers = lawcalls.numbers_of(arguments), tuple(map(float, results))
        self.decisions.append(Decision(self.pool, self.leg, len(self.decisions) - 1, name, *numbers))

    def call(self, name: str, *arguments: Any) -> Any:
        result = getattr(law, name)(self.p, self.s, *arguments)
        self.write(name, arguments, result)
        return result

    def reprice(self, policy: Policy, now: float) -> None:
        params = policy.params()
        law.repriced(self.p, params, self.s, now)
        self.write(REPRICED, (*flat(params), now))
        self.p = params


def flat(p: Params) -> tuple[float, ...]:
    """The numbers of a policy, field by field as they stand in the class."""
    numbers: list[float] = []
    for name in Params.__slots__:
        value = getattr(p, name)
        numbers += value if isinstance(value, list) else [float(value)]
    return tuple(numbers)


def any_policy(r: random.Random) -> Policy:
    return Policy(
        max_concurrency=r.randint(1, 20),
        stagger_seconds=r.choice([0.0, 0.7]),
        tpm_limit=r.choice([3_000, 30_000]),
        tpm_headroom=r.choice([0.0, 0.15]),
        tpm_window=r.choice(["fixed", "sliding", "bucket"]),
        rpm_limit=r.choice([0, 50]),
        tpd_limit=r.choice([0, 1_000_000]),
        settle=r.random() < 0.5,
        backoff_keeps_permit=r.random() < 0.5,
        hold_on_throttle=r.random() < 0.5,
        sync_headers=r.random() < 0.5,
        refund_throttled=r.random() < 0.5,
        deadline_seconds=r.choice([0.0, 90.0]),
    )


EVERYTHING = {"admission", "launched", "settled", "throttled", "failed", "released", "synced", "paused", "repriced"}


def random_run(seed: int, pool: str = "default", leg: int = 1, calls: int = CALLS) -> Scribe:
    """A run in which everything happens: launches, every kind of end, counts from headers, pauses, new settings."""
    r = random.Random(seed)
    scribe = Scribe(any_policy(r), pool, leg)
    now = 0.0
    flights: list[tuple[float, float, int]] = []
    scribe.call("started", of_amounts({law.TPD: 10_000.0, law.RPD: 3.0}), now)
    # On until all has happened, too: settings may be drawn under which nothing can launch for a while.
    while len(scribe.decisions) < calls or not {d.name for d in scribe.decisions} >= EVERYTHING:
        assert len(scribe.decisions) < 100 * CALLS
        now += r.expovariate(1.0)
        reserve = float(r.randint(1, 2_500))
        if not flights or r.random() < 0.5:
            at, _ = scribe.call("admission", of_tokens(reserve), law.FIRST, now)
            if at < now + 60.0:
                now = max(now, at)
                scribe.call("launched", of_tokens(reserve), law.FIRST, now, r.random())
                flights.append((reserve, now, r.randint(1, 6)))
        else:
            reserve, launched_at, attempt = flights.pop(r.randrange(len(flights)))
            ended(scribe, r, reserve, launched_at, attempt, now)
        if r.random() < 0.05:
            scribe.call(r.choice(["paused", "resumed"]))
            scribe.call("resumed")
            scribe.reprice(any_policy(r), now)
    return scribe


def ended(scribe: Scribe, r: random.Random, reserve: float, launched_at: float, attempt: int, now: float) -> None:
    limit = scribe.p.limit[law.TPM]
    stated = r.choice([limit, limit / 2]), r.random() * limit / 2
    scribe.call("synced", law.TPM, *stated, reserve, r.randrange(2), r.random() * 500, launched_at, now)
    wait_s = r.choice([-1.0, 3.25])
    kind = r.randrange(4)
    if kind == 0:
        scribe.call("settled", of_tokens(reserve), of_tokens(reserve * r.random()), launched_at, now)
    elif kind < 3:
        standing = law.keeps_permit(scribe.p)
        if kind == 1:
            again_at = scribe.call(
                "throttled", of_tokens(reserve), attempt, wait_s, launched_at, launched_at, now, r.random()
            )
        else:
            history = r.randrange(3), attempt, r.randrange(3), r.randrange(2)
            again_at, standing = scribe.call("failed", *history, wait_s, launched_at, launched_at, now, r.random())
        if again_at < math.inf and standing == law.HOLDING:
            scribe.call("released")  # given up while it backed off: else its place would be taken for ever
    else:
        scribe.call("released")
        scribe.call("finalize_opened")
        scribe.call("finalize_closed")


# ---------------------------------------------------------------- numbers


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["launched", "admission", "x"]),
            st.lists(st.floats(), max_size=9).map(tuple),
            st.lists(st.floats(), max_size=3).map(tuple),
        )
    )
)
def test_stored_calls_come_back_to_the_bit(calls: list[tuple[str, tuple[float, ...], tuple[float, ...]]]) -> None:
    again = list(lawcalls.read_back(lawcalls.stored(calls)))
    assert [name for name, _, _ in again] == [name for name, _, _ in calls]
    for (_, *before), (_, *after) in zip(calls, again, strict=True):
        assert [[bits(x) for x in numbers] for numbers in before] == [[bits(x) for x in numbers] for numbers in after]


def test_stored_calls_that_are_cut_off_are_refused_and_not_misread() -> None:
    calls = [("launched", (1.0, math.inf), ()), ("admission", (-0.0,), (2.5, 3.0))]
    data = lawcalls.stored(calls)
    whole = {0, len(lawcalls.stored(calls[:1])), len(data)}
    for length in range(len(data) + 1):
        if length in whole:
            assert list(lawcalls.read_back(data[:length])) == calls[: sorted(whole).index(length)]
        else:
            with pytest.raises(ValueError, match="cut off"):
                list(lawcalls.read_back(data[:length]))


@pytest.mark.parametrize("number", range(20))
def test_policies_and_states_survive_as_numbers(number: int, seed: int) -> None:
    scribe = random_run(seed + number, calls=100)
    assert lawcalls.params_of(lawcalls.numbers_of((scribe.p,))) == scribe.p
    assert lawcalls.numbers_of((scribe.p,)) == flat(scribe.p)
    again = lawcalls.state_of(lawcalls.numbers_of((scribe.s,)))
    assert again == scribe.s
    for name in State.__slots__:
        assert type(getattr(again, name)) is type(getattr(State(), name)), name


@pytest.mark.parametrize("change", [-1, 1])
def test_numbers_of_another_version_s_policy_are_refused(change: int) -> None:
    numbers = flat(Policy().params())
    with pytest.raises(ValueError, match=f"{len(numbers) + change} numbers where {len(numbers)} should be"):
        lawcalls.params_of(numbers[:change] if change < 0 else (*numbers, 1.0))


# ---------------------------------------------------------------- replay


def test_a_recorded_run_comes_out_the_same(seed: int) -> None:
    for number in range(20):
        decisions = random_run(seed + number).decisions
        assert len({d.name for d in decisions}) >= 11, "the script exercises too little of the law"
        assert verify.verify(decisions) == VerifyResult(len(decisions) - 1, 1, None), f"seed {seed + number}"


def test_pools_and_legs_are_chains_of_their_own_however_they_are_interleaved(seed: int) -> None:
    r = random.Random(seed)
    chains = [random_run(seed + i, pool, leg).decisions for i, (pool, leg) in enumerate([("a", 1), ("b", 1), ("a", 2)])]
    total = sum(map(len, chains)) - 3
    mixed = []
    while any(chains):
        mixed.append(r.choice([chain for chain in chains if chain]).pop(0))
    found = verify.verify(iter(mixed))
    assert found == VerifyResult(total, 3, None)
    assert str(found) == f"{total:,} decisions in 3 chains repeated: all equal"


def test_every_single_bit_of_every_result_counts(seed: int) -> None:
    r = random.Random(seed)
    decisions = random_run(seed).decisions
    with_result = [i for i, d in enumerate(decisions) if d.result]
    for _ in range(200):
        place = r.choice(with_result)
        which, bit = r.randrange(len(decisions[place].result)), r.randrange(64)
        result = list(decisions[place].result)
        (result[which],) = struct.unpack(
            "<d", struct.pack("<Q", struct.unpack("<Q", bits(result[which]))[0] ^ 1 << bit)
        )
        tampered = [*decisions[:place], decisions[place]._replace(result=tuple(result)), *decisions[place + 1 :]]
        found = verify.verify(tampered)
        assert found.checked == place - 1, f"bit {bit} of number {which} of decision {place - 1}"
        assert found.difference is not None
        assert found.difference.decision.sequence == place - 1
        assert found.difference.now == decisions[place].result


def test_a_changed_input_shows_where_it_first_matters() -> None:
    """A bucket of 6,000 tokens a minute, 100 per second: 6,000 are gone, so 1,000 more may go 10 s later."""
    policy = Policy(stagger_seconds=0.0, tpm_limit=6_000, tpm_headroom=0.0, tpm_window="bucket", max_concurrency=9)
    scribe = Scribe(policy)
    scribe.call("launched", of_tokens(6_000.0), law.FIRST, 5.0, 0.5)
    scribe.call("released")
    assert scribe.call("admission", of_tokens(1_000.0), law.FIRST, 5.0) == (15.0, law.BY_TPM)
    changed = [
        d._replace(arguments=(5_000.0, *d.arguments[1:])) if d.name == "launched" else d for d in scribe.decisions
    ]
    difference = verify.verify(changed).difference
    assert difference is not None
    assert (difference.decision.sequence, difference.now) == (2, (5.0, float(law.NOTHING)))
    assert str(difference) == (
        "decision 2 of pool 'default', leg 1, at 5.000 s: "
        "admission(need[0]=1000.0, need[1]=1.0, need[2]=1000.0, need[3]=1.0, standing=0.0, now=5.0): "
        "the record says 15.0, 3.0, the law says 5.0, 0.0"
    )


def test_a_law_that_has_changed_since_is_found_at_the_first_decision_that_it_touches(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    decisions = random_run(seed).decisions
    # A stated wait is prolonged by 2 ms. It shows where it is obeyed, unless attempts or time are over (inf).
    first = next(
        i
        for i, d in enumerate(decisions)
        if d.name in ("throttled", "failed") and 3.25 in d.arguments and d.result[0] < math.inf
    )
    monkeypatch.setattr(law, "RETRY_AFTER_SLACK_S", 0.003)
    found = verify.verify(decisions)
    assert found.difference is not None
    # A request that is given up holds its pool for the same wait, which shows in the admission after it at the latest.
    assert 0 <= found.difference.decision.sequence <= first - 1
    assert found.difference.decision.name in ("throttled", "failed", "admission")


def test_what_is_missing_or_out_of_order_is_named() -> None:
    decisions = random_run(7).decisions
    for place in (1, 50, 200):
        found = verify.verify(decisions[:place] + decisions[place + 1 :])
        assert found.checked == place - 1
        assert found.difference is not None
        assert f"decision {place - 1:,} is expected here" in found.difference.reason
    found = verify.verify(decisions[1:])
    assert found.difference is not None
    assert found.difference.reason == "the policy at the start of this chain is not recorded"
    assert verify.verify([]) == VerifyResult(0, 0, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "forgotten"}, "this version's law has no function of that name"),
        ({"name": "_book"}, "this version's law has no function of that name"),
        ({"arguments": (1.0,)}, "this version's law takes 10 numbers there, not 1"),
        (
            {"arguments": (*[1.0] * 8, math.inf, 0.0)},
            "cannot convert float infinity to integer",
        ),
        ({"name": "synced", "arguments": (9.0, 9.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)}, "list index out of range"),
        ({"name": REPRICED, "arguments": (1.0, 2.0)}, "1 numbers where "),
        ({"name": RESTORED, "arguments": ()}, "0 numbers where"),
        ({"name": BEGAN, "arguments": ()}, "0 numbers where"),
    ],
)
def test_an_impossible_record_is_a_difference_and_no_crash(change: dict[str, Any], reason: str) -> None:
    scribe = Scribe(Policy.preset("paceline"))
    scribe.call("admission", of_tokens(100.0), law.FIRST, 0.0)
    decisions = [scribe.decisions[0], scribe.decisions[1]._replace(**change)]
    found = verify.verify(decisions)
    assert found.checked == 0
    assert found.difference is not None
    assert reason in found.difference.reason
    assert "\n" not in str(found)


def test_a_number_of_a_later_version_of_a_call_is_still_shown() -> None:
    scribe = Scribe(Policy())
    scribe.call("admission", of_tokens(100.0), law.FIRST, 0.0)
    more = scribe.decisions[1]._replace(arguments=tuple(float(i) for i in range(18)))
    found = verify.verify([scribe.decisions[0], more])
    assert "need[7]=7.0, standing=8.0, now=9.0, number 10=10.0, " in str(found)
    assert str(found).count("number ") == 3
    assert ", and 5 more)" in str(found)


# ---------------------------------------------------------------- a state that goes on


def test_a_state_that_was_restored_goes_on_as_the_old_one(seed: int) -> None:
    """Cut in two anywhere, with the state handed over as numbers, a run gives the same decisions as in one piece."""
    r = random.Random(seed)
    scribe = random_run(seed)
    for place in (r.randrange(2, CALLS - 1) for _ in range(10)):
        replay = LawReplay()
        for decision in scribe.decisions[:place]:
            assert replay.check(decision) is None
        head = [
            Decision("default", 2, -1, BEGAN, flat(replay.params), ()),
            Decision("default", 2, 0, RESTORED, lawcalls.numbers_of((replay.state,)), ()),
        ]
        rest = [d._replace(leg=2, sequence=i) for i, d in enumerate(scribe.decisions[place:], 1)]
        assert verify.verify(head + rest) == VerifyResult(len(rest) + 1, 1, None), f"seed {seed}, cut at {place}"


# ---------------------------------------------------------------- the table of calls


def test_every_call_that_changes_the_state_is_reported_and_can_be_repeated() -> None:
    assert {"admission", "launched", "settled"} <= set(REPORTED.values()) <= set(lawcalls.CALLS)


def without_effect(function: Callable[..., Any]) -> bool:
    return function.__name__.startswith("_") or not {"p", "s"} <= set(function.__annotations__)


def test_times_and_whole_numbers_are_known_for_what_they_are() -> None:
    call = lawcalls.CALLS["throttled"]
    assert call.columns[call.now] == "now"
    assert call.kinds == tuple({"attempt": int, "need": list}.get(name, float) for name in call.names)
    assert lawcalls.CALLS["released"].now == -1
    assert not [name for name, call in lawcalls.CALLS.items() if without_effect(call.function)]


def test_replaying_leaves_the_records_alone(seed: int) -> None:
    decisions = random_run(seed).decisions
    before = copy.deepcopy(decisions)
    verify.verify(decisions)
    assert decisions == before
