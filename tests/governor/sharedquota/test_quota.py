"""A shared pool, decided: only by calls of the law, once for each event, and again from what the living know."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields
from math import inf
from typing import Any

import pytest

from governor import law
from governor.journal.verify import LawReplay
from governor.law import FIRST, HOLDING, MAIN, RETRY, Params, State
from governor.model.lawcalls import CALLS, PATCHED, numbers_of, packed, patch_of, result_of, state_of
from governor.model.needs import of_amounts, of_tokens
from governor.sharedquota.image import (
    CALL,
    HERE,
    LEAVE,
    REPRICE,
    WANT,
    WITHDRAW,
    Event,
    Image,
    Join,
    OwnerNews,
    UnreadableImageError,
)
from governor.sharedquota.quota import begun, decide, rebuilt
from governor.sharedquota.shared import TIMES
from tests.governor.laws import params

SERVER = b"a" * 40
LEASE_S = 10.0


def some(**changes: Any) -> Params:
    return params(
        **({"max_concurrency": 4, "stagger_s": 0.0, "tpm": 6_000, "headroom": 0.0, "window": law.BUCKET} | changes)
    )


SETTLED = [CALL, "settled", [of_tokens(1_000.0), of_tokens(10.0), 0.0, 1.0], 1]


def join(p: Params | None, number: int = 1, **changes: Any) -> Join:
    stated = numbers_of((p,)) if p is not None else None
    base: dict[str, Any] = {"last": 0, "params": stated, "holds": 0, "finalizes": 0, "calls": [], "wants": []}
    return Join(number=number, **(base | {"launches": [], "lineage": 7} | changes))


def want(ticket: int, reserve: float = 1_000.0, *, standing: int = FIRST, attempt: int = 1) -> Event:
    return [WANT, ticket, MAIN, attempt, standing, -1.0, reserve, of_tokens(reserve), 0.5]


def pool(p: Params, owners: str = "ab", now: float = 0.0) -> Image:
    """A pool that these owners have entered."""
    joins = {name: join(p) for name in owners}
    image, _ = rebuilt(joins, begun(joins, now), SERVER, now, LEASE_S, by=owners[0])
    return image


def alive(image: Image, now: float) -> dict[str, float]:
    return dict.fromkeys(image.owners, now + LEASE_S)


def granted(news: dict[str, OwnerNews]) -> dict[str, list[int]]:
    return {name: [ticket for ticket, _ in each.grants] for name, each in news.items() if each.grants}


def story(rng: random.Random, image: Image) -> Iterator[tuple[float, list[tuple[str, int, list[Event]]]]]:
    """A plausible life of a pool: owners want, end in every way, and change the settings."""
    now, numbers, tickets = 0.0, dict.fromkeys(image.owners, 1), dict.fromkeys(image.owners, 0)
    for _ in range(120):
        now += rng.choice([0.0, 0.01, 1.0, 7.0])
        batches = []
        for name in image.owners:
            events: list[Event] = []
            for _ in range(rng.randrange(3)):
                tickets[name] += 1
                events.append(want(tickets[name], float(rng.randrange(100, 3_000))))
            if image.owners[name].holds and rng.random() < 0.6:
                u, launched = rng.random(), max(0.0, now - 1.0)
                ends: list[Event] = [
                    [CALL, "settled", [of_tokens(1_000.0), of_tokens(400.0), launched, now], 1],
                    [CALL, "released", [], 1],
                    [CALL, "throttled", [of_tokens(1_000.0), 1, 2.0, launched, launched, now, u], 1],
                    [CALL, "synced", [law.TPM, 6_000.0, 3_000.0, 1_000.0, 0, 0.0, launched, now], 0],
                ]
                events.append(rng.choice(ends))
            if rng.random() < 0.05:
                events.append([REPRICE, list(numbers_of((some(tpm=rng.choice([30_000, 60_000]), sync_headers=1),)))])
            if events:
                batches.append((name, numbers[name], events))
                numbers[name] += len(events)
        yield now, batches


def test_a_decision_is_calls_of_the_law_and_nothing_else(seed: int) -> None:
    """Led through the calls that are reported, another state becomes the same, to the bit; so each can be verified."""
    rng = random.Random(seed)
    p = some(tpm=60_000, settles=1, hold_on_throttle=1, sync_headers=1, backoff_keeps_permit=0)
    image = pool(p, "abc")
    replay = LawReplay()
    replay.params = p
    replay.state = state_of(numbers_of((image.s,)))
    calls = 0
    for now, batches in story(rng, image):
        for name, arguments, result in decide(image, batches, alive(image, now), now, LEASE_S).calls:
            assert packed(replay.decide(name, numbers_of(arguments))) == packed(result_of(result)), name
            calls += 1
        assert numbers_of((replay.state,)) == numbers_of((image.s,))
        assert image.s.in_flight == sum(owner.holds for owner in image.owners.values())
        # What is kept is what there was, exactly.
        assert numbers_of((Image.decoded(image.encoded()).s,)) == numbers_of((image.s,))
        assert Image.decoded(image.encoded()) == image
    assert calls > 100


def test_it_is_known_of_every_argument_of_the_law_whether_it_is_a_time() -> None:
    others = {"d", "limit", "remaining", "amount", "is_refused", "booked_since", "need", "used", "standing", "u"}
    others |= {"attempt", "retry_after_s", "tokens_used", "requests_used", "cause"}
    others |= {"request", "outages", "is_answer"}
    named = {name for call in CALLS.values() for name in call.names}
    assert named >= TIMES
    assert named - TIMES <= others, "another argument: say in governor/sharedquota/shared.py whether it is a time"


def test_a_patch_makes_one_state_of_another(seed: int) -> None:
    rng = random.Random(seed)
    before = numbers_of((State(),))
    after = tuple(rng.random() if rng.random() < 0.01 else each for each in before)
    replay = LawReplay()
    replay.decide(PATCHED, patch_of(before, after))
    assert numbers_of((replay.state,)) == tuple(
        float(int(new)) if isinstance(old, float) and i in WHOLE else new
        for i, (old, new) in enumerate(zip(before, after, strict=True))
    )


# Places of the fields that are whole numbers.
WHOLE = {
    i
    for i, is_whole in enumerate(
        each
        for field in fields(State)
        for value in [getattr(State(), field.name)]
        for each in ([False] * len(value) if isinstance(value, list) else [isinstance(value, int)])
    )
    if is_whole
}


def test_events_that_arrive_twice_count_once() -> None:
    image = pool(some())
    batch = ("a", 1, [want(1), want(2)])
    found = decide(image, [batch, batch], alive(image, 0.0), 0.0, LEASE_S)
    assert granted(found.news) == {"a": [1, 2]}
    again = decide(
        image,
        [batch, ("a", 3, [SETTLED])] * 2,
        alive(image, 1.0),
        1.0,
        10.0,
    )
    assert granted(again.news) == {}
    assert (image.s.in_flight, image.owners["a"].holds) == (1, 1)


def test_owners_take_turns_and_who_came_late_catches_up() -> None:
    """One at a time: ten of a's, before b is there; then as many of b's, and from there on one of each."""
    image = pool(some(max_concurrency=1, tpm=0))
    now, holder, numbers, order = 0.0, "", {"a": 1, "b": 1}, []

    def step(*events: tuple[str, Event]) -> None:
        nonlocal now, holder
        now += 1.0
        batches = []
        for name, event in [*events, *([(holder, [CALL, "released", [], 1])] if holder else [])]:
            batches.append((name, numbers[name], [event]))
            numbers[name] += 1
        found = decide(image, batches, alive(image, now), now, LEASE_S)
        (holder,) = granted(found.news)
        order.append(holder)

    step(*[("a", want(i)) for i in range(50)])
    for _ in range(9):
        step()
    step(*[("b", want(i)) for i in range(50)])
    for _ in range(39):
        step()
    assert order[:10] == ["a"] * 10
    assert order[10:19] == ["b"] * 9
    assert sorted(order[19:21]) == ["a", "b"]
    assert all({*order[i : i + 2]} == {"a", "b"} for i in range(21, 49, 2))


def test_a_dead_owner_gives_back_its_permits_and_its_place_but_not_its_bookings() -> None:
    image = pool(some(max_concurrency=2, finalize_lowers=0))
    wants = [("a", 1, [want(1), want(2), want(3)]), ("b", 1, [want(1)])]
    assert granted(decide(image, wants, alive(image, 0.0), 0.0, LEASE_S).news) == {"a": [1], "b": [1]}
    used = law.used_in(image.p, image.s, law.TPM, 0.0)
    decide(image, [], {"b": 100.0}, 5.0, LEASE_S)
    assert image.living() == ["b"]
    assert image.s.in_flight == image.owners["b"].holds == 1
    assert [w.owner for w in image.waiters] == []
    assert law.used_in(image.p, image.s, law.TPM, 0.0) == used
    # What it reports after that is nobody's, until it enters again and says what it holds.
    late = [("a", 4, [[CALL, "released", [], 1]])]
    decide(image, late, {"a": 100.0, "b": 100.0}, 6.0, LEASE_S)
    assert image.s.in_flight == 1
    back = join(None, 2, last=4, holds=0, calls=[(4, [CALL, "settled", [of_tokens(1e3), of_tokens(1e3), 0.0, 5.0], 1])])
    decide(image, [("a", 4, [back.packed()])], {"a": 100.0, "b": 100.0}, 7.0, LEASE_S)
    assert (image.s.in_flight, image.owners["a"].holds, image.owners["b"].holds) == (1, 0, 1)


def test_a_grant_that_was_never_delivered_is_taken_back_and_made_again() -> None:
    image = pool(some())
    decide(image, [("a", 1, [want(1)])], alive(image, 0.0), 0.0, LEASE_S)
    again = join(None, 2, last=1, wants=[want(1)])
    found = decide(image, [("a", 1, [again.packed()])], alive(image, 1.0), 1.0, LEASE_S)
    assert granted(found.news) == {"a": [1]}
    assert image.s.in_flight == 1
    # The first booking stays: whether it was sent is not known here.
    assert law.used_in(image.p, image.s, law.TPM, 1.0) == pytest.approx(2_000 - 100)


def test_who_leaves_holds_nothing_and_who_withdraws_waits_for_nothing() -> None:
    image = pool(some(max_concurrency=1))
    decide(image, [("a", 1, [want(1), want(2)]), ("b", 1, [want(1)])], alive(image, 0.0), 0.0, LEASE_S)
    decide(image, [("b", 2, [[WITHDRAW, 1]])], alive(image, 1.0), 1.0, LEASE_S)
    assert [(w.owner, w.ticket) for w in image.waiters] == [("a", 2)]
    decide(image, [("a", 3, [[LEAVE]])], alive(image, 2.0), 2.0, LEASE_S)
    assert list(image.owners) == ["b"]
    assert image.s.in_flight == 0


def test_the_head_hears_when_it_may_launch_and_only_once() -> None:
    image = pool(some(tpm=6_000))
    found = decide(image, [("a", 1, [want(1, 6_000.0), want(2, 1_000.0)])], alive(image, 0.0), 0.0, LEASE_S)
    assert found.news["a"].wake == (2, 10.0, law.BY_TPM)
    assert decide(image, [], alive(image, 1.0), 1.0, LEASE_S).news == {}
    assert image.is_due(10.0)
    assert granted(decide(image, [], alive(image, 10.0), 10.0, LEASE_S).news) == {"a": [2]}
    # Time never goes back, whatever the server's clock does.
    decide(image, [], alive(image, 3.0), 3.0, LEASE_S)
    assert image.now == 10.0


def test_what_never_fits_is_refused() -> None:
    image = pool(some(tpm=6_000))
    found = decide(image, [("a", 1, [want(1, 7_000.0), want(2)])], alive(image, 0.0), 0.0, LEASE_S)
    assert found.news["a"].refused == [1]
    assert granted(found.news) == {"a": [2]}


def test_changed_settings_order_the_queue_anew() -> None:
    image = pool(some(max_concurrency=1, tpm=0))
    long = [WANT, 3, MAIN, 1, FIRST, 500.0, 100.0, of_tokens(100.0), 0.5]
    decide(image, [("a", 1, [want(1), want(2), long])], alive(image, 0.0), 0.0, LEASE_S)
    assert [w.ticket for w in image.waiters] == [2, 3]
    p = some(max_concurrency=1, tpm=0, longest_first=1)
    decide(image, [("b", 1, [[REPRICE, list(numbers_of((p,)))]])], alive(image, 1.0), 1.0, LEASE_S)
    assert image.p == p
    assert [w.ticket for w in image.waiters] == [3, 2]


# ---------------------------------------------------------------- a memory that was lost


def test_a_pool_is_rebuilt_from_what_the_living_know(seed: int) -> None:
    """Whatever came after the newest image that somebody has: nothing that is booked is forgotten, and all permits."""
    rng = random.Random(seed)
    for _ in range(50):
        image = pool(some(max_concurrency=50, tpm=60_000))
        images = {name: image.encoded() for name in image.owners}
        launches: dict[str, list[Any]] = {name: [] for name in image.owners}
        holds = dict.fromkeys(image.owners, 0)
        numbers = dict.fromkeys(image.owners, 1)
        unheard: dict[str, list[Any]] = {name: [] for name in image.owners}
        for now in range(1, rng.randrange(3, 12)):
            name = rng.choice("ab")
            event = want(numbers[name], float(rng.randrange(1, 50) * 100))
            reserve = event[6]
            if holds[name] and rng.random() < 0.4:
                event = [CALL, "released", [], 1]
                holds[name] -= 1
                unheard[name].append((numbers[name], event))
            found = decide(image, [(name, numbers[name], [event])], alive(image, now), float(now), LEASE_S)
            numbers[name] += 1
            for to, news in found.news.items():
                for _ in news.grants:
                    launches[to].append((image.incarnation, image.version, of_tokens(reserve), FIRST, float(now), 0.5))
                    holds[to] += 1
            if rng.random() < 0.5:  # the decider keeps what it made; the other may be behind by any number of versions
                images[name] = image.encoded()
                unheard[name] = []
        images[name] = image.encoded()
        unheard[name] = []
        known = [Image.decoded(data) for data in images.values()]
        best = max(known, key=lambda each: each.version)
        joins = {
            each: join(None, 2, last=numbers[each] - 1, holds=holds[each], calls=unheard[each], launches=launches[each])
            for each in image.owners
        }
        again, _ = rebuilt(joins, best, b"b" * 40, 20.0, LEASE_S, by="a")
        assert again.s.in_flight == image.s.in_flight == sum(holds.values())
        assert law.used_in(again.p, again.s, law.TPM, 20.0) == law.used_in(image.p, image.s, law.TPM, 20.0)
        assert again.incarnation > image.incarnation
        assert again.cuts[image.incarnation] == image.version


def test_launches_that_came_after_the_newest_image_are_booked_again() -> None:
    old = pool(some())
    data = old.encoded()
    found = decide(old, [("a", 1, [want(1, 2_500.0)])], alive(old, 5.0), 5.0, LEASE_S)
    assert granted(found.news) == {"a": [1]}
    launch = (old.incarnation, old.version, of_tokens(2_500.0), FIRST, 5.0, 0.5)
    joins = {"a": join(None, 2, last=1, holds=1, launches=[launch]), "b": join(None, 2)}
    again, _ = rebuilt(joins, Image.decoded(data), b"b" * 40, 5.0, LEASE_S, by="a")
    assert again.s.in_flight == 1
    assert law.used_in(again.p, again.s, law.TPM, 5.0) == law.used_in(old.p, old.s, law.TPM, 5.0) == 2_500.0
    # Who comes late to the rebuilt pool is booked as well, once.
    assert again.owners["a"].holds == 1
    decide(
        again, [("a", 1, [join(None, 3, last=1, holds=1, launches=[launch]).packed()])], alive(again, 6.0), 6.0, 10.0
    )
    assert again.s.in_flight == 1


def test_whoever_is_missing_may_have_launched_what_was_left() -> None:
    image = pool(some(tpm=6_000))
    again, found = rebuilt({"a": join(None, 2, last=1, wants=[want(1)])}, image, b"b" * 40, 1.0, LEASE_S, by="a")
    assert law.used_in(again.p, again.s, law.TPM, 1.0) == pytest.approx(6_000)
    assert granted(found.news) == {}
    assert found.news["a"].wake == (1, pytest.approx(11.0), law.BY_TPM)


def test_only_who_is_heard_of_after_a_rebuilding_is_granted_anything() -> None:
    """The grant of one that never finds the rebuilt pool would be lost from the budget."""
    joins = {name: join(some(), 2, wants=[want(1)]) for name in "ab"}
    image, found = rebuilt(joins, pool(some()), b"b" * 40, 1.0, LEASE_S, by="b")
    assert granted(found.news) == {"b": [1]}
    assert [w.owner for w in image.waiters] == ["a"]
    assert granted(decide(image, [], alive(image, 2.0), 2.0, LEASE_S).news) == {}
    assert granted(decide(image, [("a", 1, [[HERE]])], alive(image, 3.0), 3.0, LEASE_S).news) == {"a": [1]}


def test_a_pool_that_nobody_knows_begins_with_what_an_earlier_run_had_used() -> None:
    joins = {"a": join(some(tpm=6_000), before=tuple(of_amounts({law.TPM: 4_000.0})))}
    image, _ = rebuilt(joins, begun(joins, 3.0), SERVER, 3.0, LEASE_S, by="a")
    assert law.used_in(image.p, image.s, law.TPM, 3.0) == pytest.approx(4_000)
    assert image.s.in_flight == 0


def test_launches_of_any_earlier_incarnation_are_booked_once(seed: int) -> None:
    """Two halves of a split brain, emptied again and again: what either launched is in use when they meet, once."""
    rng = random.Random(seed)
    for _ in range(30):
        launches: dict[str, list[Any]] = {name: [] for name in "abcd"}
        entries, numbers = dict.fromkeys("abcd", 1), dict.fromkeys("abcd", 0)

        def joins_of(names: str, seen: int, launches=launches, entries=entries, numbers=numbers) -> dict[str, Join]:
            found = {}
            for name in names:
                entries[name] += 1
                mine = list(launches[name])
                found[name] = join(None, entries[name], last=numbers[name], holds=len(mine), launches=mine, seen=seen)
            return found

        # Sliding: what was launched within the minute is in use, to the token.
        whole = pool(some(max_concurrency=10_000, tpm=60_000_000, window=law.SLIDING), "abcd")
        halves = {}
        for names, others in (("ab", "cd"), ("cd", "ab")):
            halves[names] = Image.decoded(whole.encoded())
            for other in others:
                halves[names].owners[other].gone_at = 0.0
        # The one half stays where it was; the other finds itself on another server.
        halves["cd"], _ = rebuilt(joins_of("cd", 0), halves["cd"], b"b" * 40, 0.0, 1e9, by="c", chance=9)
        for step in range(1, 25):
            names = rng.choice(["ab", "cd"])
            image, old = halves[names], Image.decoded(halves[names].encoded())
            name = rng.choice(names)
            for _ in range(rng.randrange(1, 4)):
                numbers[name] += 1
                event = want(numbers[name], float(rng.randrange(1, 50) * 100))
                found = decide(image, [(name, numbers[name], [event])], alive(image, step), step, 1e9)
                assert granted(found.news) == {name: [numbers[name]]}
                launches[name].append((*image.age, of_tokens(event[6]), FIRST, float(step), 0.5))
            if rng.random() < 0.5:  # emptied: the newest image that somebody has may be older
                joins = joins_of(names, image.incarnation)
                best = rng.choice([image, old])
                halves[names], _ = rebuilt(joins, best, SERVER, step, 1e9, by=names[0], chance=rng.getrandbits(32))
        best = max(halves.values(), key=lambda each: each.age)
        both, _ = rebuilt(joins_of("abcd", best.incarnation), best, SERVER, 25.0, 1e9, by="a", chance=1)
        spent = sum(launch[2][law.TPM] for each in launches.values() for launch in each)
        assert law.used_in(both.p, both.s, law.TPM, 25.0) == spent
        assert both.s.in_flight == sum(map(len, launches.values()))


def test_what_is_no_image_of_this_version_is_told_apart() -> None:
    data = pool(some()).encoded()
    place = data.index(b"paceline ", 56) + len(b"paceline ")
    other = data[:place] + b"zzz" + data[place + 3 :]
    with pytest.raises(UnreadableImageError, match="another version of Paceline shares this pool") as found:
        Image.decoded(other)
    assert found.value.is_foreign
    for garbage in (b"", b"x", b"x" * 200, data[:56], data[:-1], data[:100], data[:56] + b"\x93\x01\x02\x03"):
        with pytest.raises(UnreadableImageError, match="no state of a pool") as found:
            Image.decoded(garbage)
        assert not found.value.is_foreign


def test_a_retry_that_kept_its_place_takes_no_second_one() -> None:
    image = pool(some(backoff_keeps_permit=1))
    decide(image, [("a", 1, [want(1)])], alive(image, 0.0), 0.0, LEASE_S)
    back_off = [CALL, "throttled", [of_tokens(1_000.0), 1, -1.0, 0.0, 0.0, 0.5, 0.5], 0]
    found = decide(image, [("a", 2, [back_off, want(2, standing=HOLDING, attempt=2)])], alive(image, 3.0), 3.0, LEASE_S)
    assert granted(found.news) == {"a": [2]}
    assert image.owners["a"].holds == image.s.in_flight == 1
    assert RETRY != HOLDING
    assert image.wake_at == inf
