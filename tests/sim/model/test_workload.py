"""Workloads as columns: charged as single requests are, blind to hidden answers, and drawn as theory says."""

from __future__ import annotations

import math
import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import expon, kstest, norm

from governor.model.errors import BadInput, BadSetting
from governor.model.estimate import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, RULES, Sizes, charge_of
from governor.model.keyed import OUTPUT_LENGTH, keyed_uniform
from sim.model import synthetic
from sim.model import workload as w
from sim.model.workload import Columns, Workload


def drawn_workload(seed: int, count: int = 200) -> Workload:
    """Every visible column drawn, all endpoints among them."""
    rng = np.random.default_rng(seed)

    def whole(low: int, high: int) -> np.ndarray[Any, Any]:
        return rng.integers(low, high, count)

    return Workload(
        endpoint=rng.choice([CHAT, RESPONSES, EMBEDDINGS, COMPLETIONS], count),
        prompt_tokens=whole(0, 9_000),
        chars=whole(0, 40_000),
        role_chars=whole(0, 60),
        messages=whole(0, 9),
        images=whole(0, 3),
        tools=whole(0, 4),
        n=whole(1, 4),
        max_tokens=np.where(rng.random(count) < 0.3, -1, whole(1, 9_000)),
        output_tokens=whole(1, 9_000),
        arrival_s=np.sort(rng.random(count)),
        recorded_s=np.where(rng.random(count) < 0.5, -1.0, rng.random(count)),
        has_arrivals=True,
    )


def columns(workload: Workload, **changes: Any) -> Columns:
    chosen: dict[str, Any] = {"reserve_rule": "fixed", "est_tokens_per_run": 7_000, "charge_rule": "auto", **changes}
    return w.columns(workload, **chosen)


def sizes_of_row(workload: Workload, row: int, **changes: int) -> Sizes:
    values = {name: int(getattr(workload, name)[row]) for name in Sizes.__slots__}
    return Sizes(**(values | changes))


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("as_of", ["", "2024-06-01"])
@pytest.mark.parametrize("rule", RULES)
def test_a_column_is_charged_as_its_requests_are_one_by_one(rule: str, as_of: str, seed: int) -> None:
    workload = drawn_workload(seed)
    c = columns(workload, reserve_rule=rule, charge_rule=rule, as_of=as_of, finalize_max_tokens=6_000)
    for row in range(len(workload)):
        sizes = sizes_of_row(workload, row)
        last = replace(sizes, max_tokens=6_000)
        assert c.reserve[row] == charge_of(rule, sizes, 7_000)
        assert c.finalize_reserve[row] == charge_of(rule, last, 7_000)
        assert c.charge[row] == charge_of(rule, sizes, 7_000, as_of)
        assert c.finalize_charge[row] == charge_of(rule, last, 7_000, as_of)


def test_nothing_that_is_known_at_submission_depends_on_the_hidden_answer(seed: int) -> None:
    workload = drawn_workload(seed)
    shuffled = np.random.default_rng(seed).permutation(len(workload))
    other = replace(workload, output_tokens=workload.output_tokens[shuffled], recorded_s=workload.recorded_s[shuffled])
    for rule in RULES:
        before, after = columns(workload, reserve_rule=rule), columns(other, reserve_rule=rule)
        for name in ("arrival_s", "prompt_tokens", "cap", "reserve", "charge", "finalize_reserve", "finalize_charge"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name), err_msg=name)


def test_the_cap_is_that_of_all_answers_and_absent_where_none_is_declared(seed: int) -> None:
    workload = drawn_workload(seed)
    expected = [
        -1 if cap < 0 else cap * n for cap, n in zip(workload.max_tokens.tolist(), workload.n.tolist(), strict=True)
    ]
    assert columns(workload).cap.tolist() == expected


def test_columns_have_the_types_that_engines_expect(seed: int) -> None:
    constants = synthetic.from_tokens(np.arange(10), np.arange(10))
    for workload in (drawn_workload(seed), constants):
        c = columns(workload)
        for f in fields(Columns):
            column = getattr(c, f.name)
            if f.name == "kind":
                assert column is None  # only where reservations learn
                continue
            whole = f.name in ("prompt_tokens", "output_tokens", "cap")
            assert column.dtype == (np.int64 if whole else np.float64), f.name
            assert column.flags.c_contiguous or column.strides == (0,), f.name  # dense, or one value for all rows
            assert not column.flags.writeable, f.name
            assert len(column) == len(c) == len(workload)


def test_rules_are_computed_once_for_many_policies(seed: int) -> None:
    workload = drawn_workload(seed)
    first = columns(workload, reserve_rule="auto")
    again = columns(workload, reserve_rule="auto", est_tokens_per_run=3_000)
    assert again.reserve is first.reserve
    assert again.charge is first.charge
    # A provider that follows the estimate per run changes with it.
    assert columns(workload, charge_rule="fixed", est_tokens_per_run=5).charge.tolist() == [5.0] * len(workload)


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(w, "CACHE_BYTES", 0)
    workload = drawn_workload(seed)
    for est in range(1, 50):
        assert columns(workload, est_tokens_per_run=est).reserve[0] == est
    assert len(w._CACHES[workload]) <= w.CACHE_MIN


def test_arrivals_and_recorded_times(seed: int) -> None:
    workload = drawn_workload(seed)
    assert not columns(workload).arrival_s.any()
    np.testing.assert_array_equal(columns(workload, arrivals="trace").arrival_s, workload.arrival_s)
    known = workload.recorded_s >= 0
    doubled = columns(workload, recorded_scale=2.0).recorded_s
    np.testing.assert_array_equal(doubled[known], 2 * workload.recorded_s[known])
    assert (doubled[~known] == -1).all()
    assert (columns(workload, recorded_scale=0.0).recorded_s == -1).all()


def test_arrivals_that_nobody_knows_cannot_be_used() -> None:
    with pytest.raises(BadInput, match="--columns arrival=NAME"):
        columns(synthetic.from_tokens(np.arange(1, 3), np.arange(1, 3)), arrivals="trace")


def test_a_rule_that_does_not_exist(seed: int) -> None:
    with pytest.raises(BadSetting, match="prompt_plus_max"):
        columns(drawn_workload(seed), reserve_rule="prompt_plus")


# ---------------------------------------------------------------- the workload itself


def test_columns_are_read_only_and_the_callers_array_is_not() -> None:
    mine = np.arange(1, 4)
    workload = synthetic.from_tokens(mine, mine)
    with pytest.raises(ValueError, match="read-only"):
        workload.prompt_tokens[0] = 7
    mine[0] = 5


def test_take_keeps_rows_together_and_constants_small(seed: int) -> None:
    workload = drawn_workload(seed)
    ids = [f"q-{row}" for row in range(len(workload))]
    named = replace(workload, custom_ids=ids, models=[f"m-{row % 3}" for row in range(len(workload))])
    rows = np.random.default_rng(seed).permutation(len(workload))[:50]
    taken = named.take(rows)
    for name in w.ARRAYS:
        np.testing.assert_array_equal(getattr(taken, name), getattr(workload, name)[rows])
    assert [taken.custom_id(i) for i in range(50)] == [f"q-{row}" for row in rows]
    assert [taken.model(i) for i in range(50)] == [f"m-{row % 3}" for row in rows]
    flat = synthetic.from_tokens(np.arange(100), np.arange(100)).take(np.arange(100) > 40)
    assert len(flat) == 59
    assert flat.messages.strides == (0,)


def test_a_trace_is_charged_its_prompt_tokens_and_little_more() -> None:
    tokens = np.array([0, 1, 10, 1_000, 3_000])
    c = columns(synthetic.from_tokens(tokens, tokens))
    # 0.2504 x 4 characters per token + 1.0 for the message + 1.7, docs/explanation/provider.md#charge.
    np.testing.assert_allclose(c.charge, 1.0016 * tokens + 2.7, atol=0.5)


def test_a_workload_survives_the_way_between_processes(seed: int) -> None:
    workload = replace(drawn_workload(seed), custom_ids=None, models="gpt-4o", provenance={"a": ("measured", "b")})
    again = pickle.loads(pickle.dumps(workload))
    for f in fields(Workload):
        np.testing.assert_array_equal(getattr(again, f.name), getattr(workload, f.name))


# ---------------------------------------------------------------- chance

MANY = 20_000


def near(share: float, expected: float, count: int = MANY) -> bool:
    """Within four standard errors of the expected share: 1 in 16,000 by chance."""
    return abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_uniforms_are_those_of_the_single_draws(seed: int) -> None:
    drawn = synthetic.uniforms(seed, 500, OUTPUT_LENGTH)
    assert drawn.tolist() == [keyed_uniform(seed, row, 0, OUTPUT_LENGTH) for row in range(500)]


def test_two_quantiles_come_back_out_of_the_draw(seed: int) -> None:
    workload = synthetic.with_outputs_drawn(drawn_workload(seed, MANY), 120, 700, seed)
    drawn = workload.output_tokens[workload.endpoint != EMBEDDINGS]
    # The draw is rounded to whole tokens, so that a quantile is met up to half of one.
    assert near((drawn < 119.5).mean(), norm.cdf(math.log(119.5 / 120) / synthetic.sigma_of(120, 700)), len(drawn))
    assert near((drawn < 700.5).mean(), norm.cdf(math.log(700.5 / 120) / synthetic.sigma_of(120, 700)), len(drawn))
    assert not workload.output_tokens[workload.endpoint == EMBEDDINGS].any()
    assert workload.provenance["output tokens"][0] == "assumed"


def test_equal_quantiles_are_a_constant(seed: int) -> None:
    workload = synthetic.with_outputs_drawn(synthetic.from_tokens(np.arange(100), np.arange(100)), 64, 64, seed)
    assert set(workload.output_tokens.tolist()) == {64}


def test_the_assumed_model_is_cut_as_often_as_it_says(seed: int) -> None:
    blank = synthetic.from_tokens(np.full(MANY, 100), np.zeros(MANY, np.int64), max_tokens=1_000)
    drawn = synthetic.with_outputs_assumed(blank, seed).output_tokens
    # The median is a quarter of the cap: P(X > cap) = P(Z > ln 4 / sigma), 4 %.
    cut = norm.sf(math.log(1_000.5 / 250) / synthetic.SIGMA_ASSUMED)
    assert 0.03 < cut < 0.05
    assert near((drawn > 1_000).mean(), cut)
    no_cap = synthetic.from_tokens(np.full(MANY, 100), np.zeros(MANY, np.int64), max_tokens=-1)
    free = synthetic.with_outputs_assumed(no_cap, seed).output_tokens
    assert near((free <= 200).mean(), norm.cdf(math.log(200.5 / 200) / synthetic.SIGMA_ASSUMED))


def test_an_answer_stays_with_its_row_whatever_follows(seed: int) -> None:
    short = synthetic.parametric(50, prompt_tokens=(900, 4_000), output_tokens=(100, 500), seed=seed)
    long = synthetic.parametric(500, prompt_tokens=(900, 4_000), output_tokens=(100, 500), seed=seed)
    assert short.prompt_tokens.tolist() == long.prompt_tokens[:50].tolist()
    assert short.output_tokens.tolist() == long.output_tokens[:50].tolist()
    assert (
        long.output_tokens.tolist()
        != synthetic.parametric(
            500, prompt_tokens=(900, 4_000), output_tokens=(100, 500), seed=seed + 1
        ).output_tokens.tolist()
    )


def test_prompts_and_answers_are_independent(seed: int) -> None:
    made = synthetic.parametric(MANY, prompt_tokens=(900, 4_000), output_tokens=(900, 4_000), seed=seed)
    both = np.corrcoef(np.log(made.prompt_tokens), np.log(made.output_tokens))[0, 1]
    assert abs(both) < 4 / math.sqrt(MANY)


def test_poisson_arrivals(seed: int) -> None:
    made = synthetic.parametric(MANY, prompt_tokens=(10, 20), output_tokens=(10, 20), arrival_rate_per_s=2.5, seed=seed)
    gaps = np.diff(made.arrival_s)
    assert made.has_arrivals
    assert kstest(gaps, expon(scale=1 / 2.5).cdf).pvalue > 1e-4


def test_missing_answers_come_from_similar_prompts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = rng.permutation(np.arange(1_000, 3_000))
    # An answer that follows from its prompt makes every draw checkable.
    known = np.where(rng.random(2_000) < 0.5, 10 * prompts, -1)
    filled = synthetic.similar_outputs(synthetic.from_tokens(prompts, np.zeros_like(prompts)), known, seed)
    assert (filled[known >= 0] == known[known >= 0]).all()
    drawn = filled[known < 0]
    assert set(drawn.tolist()) <= set(known[known >= 0].tolist())
    present = np.sort(prompts[known >= 0])
    for prompt, answer in zip(prompts[known < 0], drawn, strict=True):
        apart = abs(int(np.searchsorted(present, prompt)) - int(np.searchsorted(present, answer // 10)))
        assert apart <= synthetic.NEIGHBOURS
    assert len(set(drawn.tolist())) > 300


def test_missing_answers_come_from_requests_with_similar_caps(seed: int) -> None:
    """Answers that follow from the cap alone: two caps, then many."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(50, 1_000, 90)
    for caps, off in ((rng.choice([150, 2_000], 90), 0.0), (rng.integers(200, 2_000, 90), 0.5)):
        known = np.where(np.arange(90) % 2, caps // 2, -1)
        blank = synthetic.from_tokens(prompts, np.zeros_like(prompts), max_tokens=caps)
        filled = synthetic.similar_outputs(blank, known, seed)
        assert (np.abs(filled / (caps // 2) - 1.0)[known < 0]).mean() <= off


def test_one_known_answer_serves_all() -> None:
    blank = synthetic.from_tokens(np.array([5, 6, 7]), np.zeros(3, np.int64))
    assert synthetic.similar_outputs(blank, np.array([-1, 42, -1]), 0).tolist() == [42, 42, 42]


def test_resampling_keeps_rows_whole(seed: int) -> None:
    prompts = np.arange(1, 101)
    original = replace(synthetic.from_tokens(prompts, 7 * prompts), custom_ids=[str(p) for p in prompts])
    made = synthetic.resampled(original, 5_000, seed)
    assert (made.output_tokens == 7 * made.prompt_tokens).all()
    assert made.custom_ids is None
    assert not made.has_arrivals
    assert near((made.prompt_tokens <= 50).mean(), 0.5, 5_000)
