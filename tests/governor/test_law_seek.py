"""Unknown limits: the law finds what a provider without headers grants, and holds its edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from governor import law
from governor.model.policy import Policy
from sim.des import engines
from sim.experiment.experiment import case_of
from tests.governor.laws import Pool, Reply, free, sought
from tests.scenarios import Run, batch, run, scenario_of

TOKENS = 500.0


def seeking(**changes: float) -> law.Params:
    """Nothing limits but what the law finds for the tokens."""
    return sought(free(backoff_keeps_permit=0, max_attempts=8, **changes), law.TPM)


def found(count: int, find: str = "tokens", **provider: Any) -> Run:
    """What comes of so many requests of 500 tokens and ten seconds at a provider that states no counts."""
    policy = Policy.preset("paceline").with_(
        find_limits=find,
        tpm_limit=10**9,
        stagger_s=0.0,
        max_concurrency=500,
        sync_headers=False,
        charge_rule="prompt_plus_max",
    )
    return run(scenario_of(batch([500] * count, 10.0), policy, provider={"counts": "none", **provider}))


def accepted(done: Run, from_s: float, to_s: float) -> float:
    """The tokens that were launched within these seconds and answered."""
    return sum(TOKENS for row in done.rows if row.outcome == "ok" and from_s <= row.launched_s < to_s)


@pytest.mark.parametrize("retry_after", ["ms", "absent"])
@pytest.mark.parametrize("window", ["bucket", "anchored", "clock", "sliding"])
def test_an_unknown_limit_is_used_and_rarely_met(window: str, retry_after: str) -> None:
    """Nine tenths are used from the third minute on, at most two of a hundred attempts are refused, none is lost."""
    done = found(2_000, tpm=60_000, window=window, retry_after=retry_after)
    assert done.tally.completed == 2_000
    assert accepted(done, 120.0, 960.0) >= 0.9 * 60_000.0 * 14.0
    assert done.tally.throttled <= 0.02 * done.tally.attempts


@pytest.mark.parametrize("window", ["bucket", "anchored", "clock", "sliding"])
def test_few_large_requests_are_not_lost_where_refusals_count(window: str, seed: int) -> None:
    """A request that uses a twelfth of the minute is refused for itself, until it waits longer than its own refill."""
    sizes = np.random.default_rng(seed).integers(1_000, 3_000, 80)
    policy = Policy().with_(
        find_limits="tokens",
        stagger_seconds=0.0,
        max_concurrency=30,
        sync_headers=False,
        charge_rule="prompt_plus_max",
    )
    provider = {"counts": "none", "tpm": 30_000, "window": window, "retry_after": "ms", "failed_requests_count": True}
    done = run(scenario_of(batch(sizes.tolist(), 1.0), policy, provider=provider))
    assert (done.tally.completed, done.tally.failed) == (80, 0)


def test_unknown_requests_per_minute() -> None:
    done = found(1_500, "requests", rpm=100, retry_after="ms")
    assert done.tally.completed == 1_500
    assert accepted(done, 120.0, 840.0) >= 0.9 * 100.0 * 12.0 * TOKENS
    assert 90.0 < done.state.edge[law.RPM] < 130.0


@pytest.mark.parametrize("window", ["bucket", "clock"])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_limit_that_has_moved_is_found_again(window: str, factor: float) -> None:
    """Two minutes after the change, the next four use nine tenths of what is granted then."""
    changes = [{"at_s": 400.0, "factor": factor}]
    done = found(int(240 * (6.7 + 8 * factor)), tpm=120_000, window=window, limit_changes=changes)
    assert accepted(done, 520.0, 760.0) >= 0.9 * 120_000.0 * factor * 4.0


@pytest.mark.slow
@pytest.mark.parametrize("find", ["tokens", "requests", "both"])
def test_the_engines_seek_alike(find: str) -> None:
    """Compiled and SimPy, to the bit, with both limits unknown or either."""
    policy = Policy.preset("paceline").with_(find_limits=find, stagger_s=0.0)
    limits = {"tpm": 60_000, "rpm": 100, "counts": "none", "window": "sliding"}
    case = case_of(scenario_of(batch([300, 900] * 400, 5.0), policy, provider=limits))
    assert repr(engines.simulated(case, 1, engine="compiled")) == repr(engines.simulated(case, 1, engine="simpy"))


def test_one_cut_per_round_of_refusals() -> None:
    """Ten launches are refused together, and so is the first one after the cut: the limit falls once."""
    p, s = seeking(), law.State()
    need = [TOKENS] + [0.0] * 7
    for second in range(1, 60):
        law.launched(p, s, need, law.FIRST, float(second), 0.5)
    scales = []
    for i in range(10):
        law.throttled(p, s, need, 1, 5.0, 50.0 + i, 50.0 + i, 59.5 + i / 100.0, 0.5)
        scales.append(s.scale[law.TPM])
    assert len(set(scales)) == 1
    assert s.hold_until >= 64.5
    law.launched(p, s, need, law.RETRY, s.hold_until, 0.5)
    law.throttled(p, s, need, 2, 5.0, 50.0, s.hold_until, s.hold_until + 0.1, 0.5)
    assert s.scale[law.TPM] == scales[0]


@pytest.mark.parametrize("limit", ["concurrency", "stagger"])
def test_what_does_not_bind_does_not_grow(limit: str) -> None:
    """Where places in flight or the stagger hold launches back, ten minutes raise nothing."""
    slow = {"max_concurrency": 2} if limit == "concurrency" else {"stagger_s": 5.0}
    pool = Pool(seeking(**slow), [TOKENS] * 120, lambda job, now: Reply(10.0)).run()
    at_once = TOKENS * 60.0 / law.START_GAP_S
    assert pool.launches[-1].at > 500.0
    assert pool.s.scale[law.TPM] <= 2.0 * at_once


def test_a_stated_limit_ends_the_search() -> None:
    """What headers state is taken as it is; refusals no longer cut it."""
    p, s = seeking(sync_headers=1), law.State()
    need = [TOKENS] + [0.0] * 7
    for second in range(3):
        law.launched(p, s, need, law.FIRST, float(second), 0.5)
        law.settled(p, s, need, need, float(second), second + 0.5)
        law.synced(p, s, law.TPM, 90_000.0, 60_000.0, TOKENS, 0, 0.0, float(second), second + 0.5)
    assert s.scale[law.TPM] == 90_000.0
    law.launched(p, s, need, law.FIRST, 3.0, 0.5)
    law.throttled(p, s, need, 1, 1.0, 3.0, 3.0, 3.1, 0.5)
    assert s.scale[law.TPM] == 90_000.0


def test_settings_changed_in_mid_run() -> None:
    """A limit that becomes known is one from then on, with the last minute's use; an unknown one is sought."""
    s = law.State()
    need = [TOKENS] + [0.0] * 7
    for second in range(10):
        law.launched(seeking(), s, need, law.FIRST, float(second), 0.5)
    known = free(tpm=30_000)
    law.repriced(seeking(), known, s, 10.0)
    assert law.used_in(known, s, law.TPM, 10.0) == 10 * TOKENS
    law.repriced(known, seeking(), s, 11.0)
    assert law.admit_at(seeking(), s, need, law.FIRST, 11.0) == 11.0
    law.launched(seeking(), s, need, law.FIRST, 11.0, 0.5)
    assert s.scale[law.TPM] == TOKENS * 60.0 / law.START_GAP_S
