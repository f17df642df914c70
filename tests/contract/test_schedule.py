"""Mask schedules and planned counts, against values published with their formulas."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from maskgit.kernels.decode_step.rule.schedules import SCHEDULES

import maskgit
from maskgit import StepRule, gamma, plan_masked_counts

ALL = (*SCHEDULES, "pow0.5", "pow1.5", "pow4")
CONCAVE, CONVEX = ("cosine", "square", "cubic", "exp", "arccos", "pow4"), ("sqrt", "log", "pow0.5")


@pytest.mark.parametrize("schedule", ALL)
def test_continuous_decreasing_within_bounds_with_both_ends(schedule):
    ratio = np.linspace(0, 1, 100_001)
    values = gamma(ratio, schedule, 256)
    assert ((values > 0) & (values <= 1)).all()
    assert (np.diff(values) <= 0).all()
    interior = values[(values > 1e-6) & (values < 1 - 1e-9)]
    assert (np.diff(interior) < 0).all()
    # sqrt has an infinite slope at 0, log and arccos at their ends; the rest stay under 5
    steepest = {"sqrt": 0.004, "pow0.5": 0.004, "log": 0.05, "arccos": 0.004}.get(schedule, 6e-5)
    assert np.abs(np.diff(values)).max() < steepest
    assert values[0] == pytest.approx(1 - 1 / 256 if schedule == "exp" else 1.0)
    assert values[-1] == pytest.approx(1e-6)


@pytest.mark.parametrize("schedule", CONCAVE + CONVEX)
def test_curvature(schedule):
    ratio = np.linspace(0.02, 0.98, 997)
    bend = np.diff(gamma(ratio, schedule, 256), 2)
    assert (bend < 1e-12).all() if schedule in CONCAVE else (bend > -1e-12).all()


# floor(256 gamma((i + 1)/12)) clamped to [1, masked now - 1], float32
PUBLISHED = {
    "cosine": "253 247 236 221 203 181 155 127 97 66 33 1",
    "sqrt": "182 151 128 108 90 74 60 46 34 22 10 1",
    "square": "254 248 240 227 211 192 168 142 112 78 40 1",
    "cubic": "255 254 252 246 237 224 205 180 148 107 58 1",
    "log": "114 82 64 50 40 32 24 18 13 8 4 1",
    "exp": "254 253 252 249 245 240 230 215 192 154 94 1",
    "linear": "234 213 192 170 149 128 106 85 64 42 21 1",
}


@pytest.mark.parametrize("schedule", PUBLISHED)
def test_maskgit_counts(schedule):
    rule = dataclasses.replace(StepRule.preset("maskgit"), schedule=schedule)
    counts = plan_masked_counts(256, 12, rule)[:, 0]
    assert " ".join(map(str, counts)) == PUBLISHED[schedule]


def test_counts_of_other_codebases():
    assert plan_masked_counts(32, 8, "titok")[:, 0].tolist() == [29, 26, 24, 21, 18, 14, 10, 0]
    assert plan_masked_counts([10, 7], 4, "llada").T.tolist() == [[7, 4, 2, 0], [5, 3, 1, 0]]
    commits = -np.diff(plan_masked_counts(8, 8, "dream-entropy")[:, 0], prepend=8)
    assert commits.tolist() == [0, 1, 1, 1, 1, 1, 1, 2]  # as upstream's float32 truncation has it


@given(
    start=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    steps=st.integers(1, 20),
    rule=st.sampled_from(["maskgit", "amused", "open-muse", "titok", "llada", "dream-margin"]),
)
def test_counts_never_grow_and_stay_in_range(start, steps, rule):
    counts = plan_masked_counts(np.array(start), steps, rule)
    assert counts.shape == (steps, len(start))
    assert (counts >= 0).all()
    assert (np.diff(counts, axis=0, prepend=np.array([start])) <= 0).all()


@pytest.mark.parametrize("name", ["cosin", "pow", "pow0", "pow-1", "", None, "pow1e3"])
def test_unknown_schedules(name):
    with pytest.raises(ValueError, match="schedule: expected one of linear, cosine"):
        gamma(0.5, name)


def test_impossible_counts():
    with pytest.raises(ValueError, match="num_masked_at_start: expected non-negative"):
        plan_masked_counts(-1, 4)
    with pytest.raises(ValueError, match="num_steps: expected an integer >= 1, got 0"):
        plan_masked_counts(5, 0)
    with pytest.raises(ValueError, match="num_positions: expected at least the 5"):
        plan_masked_counts(5, 4, "titok", num_positions=3)
    with pytest.raises(ValueError, match="depend on the logits"):
        plan_masked_counts(5, 4, "threshold")
    with pytest.raises(ValueError, match="ratio: expected values in"):
        gamma(1.5)


def test_plan_is_what_the_loop_does(backend):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 24, 40)).astype(np.float32)
    tokens = np.full((2, 24), 40)
    tokens[1, :9] = 3
    for rule in ("maskgit", "llada", "titok", "dream-maskgit-plus"):
        result = maskgit.generate(
            lambda t: logits, tokens, rule=rule, mask_token_id=40, num_steps=6, seeds=[1, 2],
            backend=backend, record=True,
        )  # fmt: skip
        masked = [(t == 40).sum(1) for t in result.trajectory.next_tokens]
        assert (np.stack(masked) == plan_masked_counts([24, 15], 6, rule, 24)).all()
