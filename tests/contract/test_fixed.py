"""Every `-fixed` preset: the fault is there in the original, and gone in its sibling."""

import dataclasses

import numpy as np
import pytest
from helpers import BACKENDS, kind_for, native, native_seeds

import maskgit
from maskgit import StepRule

ALL = ["reference", *BACKENDS]
SLOW_ON_JAX = [pytest.param(b, marks=pytest.mark.slow) if b == "jax" else b for b in ALL]
VOCAB = MASK = 20
TABLE = np.random.default_rng(0).normal(size=(3, 16, VOCAB)).astype(np.float32)


def states(backend, name, tokens=None, table=TABLE, steps=6, mask=MASK):
    """The tokens after every step of a loop, by the rule or rule's name."""
    kind = kind_for(backend, "float32")
    tokens = np.full(table.shape[:2], MASK) if tokens is None else tokens
    logits, seen = native(table, kind), [native(tokens, kind)]
    start = (seen[0] == mask).sum(1)
    for step in range(steps):
        out = maskgit.decode_step(
            logits, seen[-1], rule=name, mask_token_id=mask, step=step, num_steps=steps,
            num_masked_at_start=start, seeds=native_seeds(np.arange(len(tokens)), kind),
            backend=backend,
        )  # fmt: skip
        seen.append(out.next_tokens)
    return [np.asarray(x) for x in seen[1:]]


def left(tokens):
    return (tokens == MASK).sum(1).tolist()


def ragged():
    tokens = np.full((3, 16), MASK)
    tokens[1, :8] = tokens[2, :14] = 1
    return tokens


def test_there_are_no_others():
    fixed = {name for name in StepRule.presets() if name.endswith("-fixed")}
    tested = {"maskgit", "magvit", "maskbit", "open-muse", "titok", "vampnet", "llada", "factor"}
    tested |= {"dream-maskgit-plus", "dream-margin", "dream-entropy"}
    assert fixed == {f"{name}-fixed" for name in tested}


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("name", ["maskgit", "magvit", "maskbit"])
def test_nothing_is_masked_at_the_end(name, backend):
    """The originals never commit the last masked position of a state."""
    assert min(left(states(backend, name)[-1])) >= 1
    fixed = states(backend, f"{name}-fixed")
    assert left(fixed[-1]) == [0, 0, 0]
    lone = np.full((3, 16), 1)
    lone[:, 5] = MASK
    assert left(states(backend, name, lone)[-1]) == [1, 1, 1]
    assert left(states(backend, f"{name}-fixed", lone)[-1]) == [0, 0, 0]
    for s, tokens in enumerate(fixed[:-1]):  # and the schedule is otherwise the original's
        assert left(tokens) == left(states(backend, name)[s])


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("name", ["maskgit", "magvit", "maskbit"])
def test_the_whole_loop_ends_without_masks(name, backend):
    kind = kind_for(backend, "float32")
    for seed in range(5):
        out = maskgit.generate(
            lambda t: native(TABLE, kind), native(np.full((3, 16), MASK), kind),
            rule=f"{name}-fixed", mask_token_id=MASK, num_steps=5, backend=backend,
            seeds=native_seeds(np.arange(3) + 3 * seed, kind), record=True,
        )  # fmt: skip
        for tokens in (out.tokens, out.trajectory.next_tokens[-1]):
            assert (np.asarray(tokens) != MASK).all()


@pytest.mark.parametrize("name", ["titok", "maskbit", "vampnet"])
@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_each_row_has_its_own_count(name, backend):
    """Masked counts of a row beside others, against the same row alone."""
    together = [left(t) for t in states(backend, f"{name}-fixed", ragged())]
    original = [left(t) for t in states(backend, name, ragged())]
    for row in range(3):
        alone = [
            left(t)[0]
            for t in states(backend, f"{name}-fixed", ragged()[row : row + 1], TABLE[row : row + 1])
        ]
        assert [counts[row] for counts in together] == alone
    assert original != together


@pytest.mark.parametrize("name", ["dream-maskgit-plus", "dream-margin", "dream-entropy"])
@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_dream_ends_rows_of_different_lengths(name, backend):
    assert max(left(states(backend, name, ragged())[-1])) > 0
    assert left(states(backend, f"{name}-fixed", ragged())[-1]) == [0, 0, 0]


def test_open_muse_noise_falls_linearly():
    rule, fixed = StepRule.preset("open-muse"), StepRule.preset("open-muse-fixed")
    plans = [
        [
            maskgit.kernels.decode_step.rule.plan.resolve(
                r, s, 8, (1, 16)
            ).numbers.choice_temperature
            for s in range(8)
        ]
        for r in (rule, fixed)
    ]
    linear = [rule.choice_temperature * (1 - (s + 1) / 8) for s in range(8)]
    np.testing.assert_allclose(plans[1], linear, rtol=1e-6)
    np.testing.assert_allclose(plans[0], rule.choice_temperature * np.cumprod(
        [1 - (s + 1) / 8 for s in range(8)]), rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_llada_does_not_draw_the_mask_token(backend):
    table = TABLE.copy()
    table[:, 3, 7] = 30.0
    tokens = np.full((3, 16), 7)
    assert (states(backend, "llada", tokens, table, mask=7)[-1] == 7).any(1).all()
    assert (states(backend, "llada-fixed", tokens, table, mask=7)[-1] != 7).all()


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_factor_does_not_commit_a_failing_last_position(backend):
    """Confidences for which every number of positions passes but the last one."""
    rule = dataclasses.replace(StepRule.preset("factor"), sample_temperature=0.0)
    fixed = dataclasses.replace(rule, factor_tail=False)
    assert fixed == dataclasses.replace(
        StepRule.preset("factor-fixed"), name=rule.name, source=rule.source, sample_temperature=0.0
    )
    table = np.zeros((1, 3, VOCAB), np.float32)
    table[0, :, 0] = [12.0, 12.0, 0.5]  # sure, sure, and far from it
    tokens = np.full((1, 3), MASK)
    assert left(states(backend, rule, tokens, table, steps=2)[0]) == [0]
    assert left(states(backend, fixed, tokens, table, steps=2)[0]) == [1]
