"""`generate(scores=...)`: a fixed order, and critics that score the candidates."""

import dataclasses

import numpy as np
import pytest
from helpers import BACKENDS, kind_for, native, native_seeds
from maskgit.kernels.head_sample import chunked
from toys import MASK, VOCAB, Toy, run, start

import maskgit
from maskgit import StepNoise, StepRule

ALL = ["reference", *BACKENDS]
SLOW_ON_JAX = [pytest.param(b, marks=pytest.mark.slow) if b == "jax" else b for b in ALL]
COUNTS = [1, 3, 2, 3]


def by_hand(backend, rule, scores, num_commit=None):
    """The loop written out with `decode_step`: candidates drawn by a step of their own."""
    toy = Toy(backend)
    tokens, seeds = start(toy.kind), native_seeds(np.arange(3) + 5, toy.kind)
    options = {"mask_token_id": MASK, "num_steps": 4, "seeds": seeds, "backend": backend}
    options["num_masked_at_start"] = (tokens == MASK).sum(1)
    options["eligible"] = tokens == MASK if rule.touches_known else None
    draw = dataclasses.replace(
        rule, score="prob", revise="no", count="quota", remask="none", choice_temperature=0.0
    )
    for step in range(4):
        logits = toy(tokens)
        drawn = maskgit.decode_step(logits, tokens, rule=draw, step=step, **options)
        commit = {} if num_commit is None else {"num_commit": num_commit[step]}
        given = scores(step, tokens, drawn.candidate_tokens)
        out = maskgit.decode_step(
            logits, tokens, rule=rule, scores=given, step=step, **options, **commit
        )
        is_final = step == 3 and rule.count == "masked"
        tokens = out.candidate_tokens if is_final else out.next_tokens
    return np.asarray(tokens)


@pytest.fixture
def rows(monkeypatch):
    seen, product = [], chunked._product
    monkeypatch.setattr(
        chunked, "_product", lambda h, w, b: seen.append(len(h)) or product(h, w, b)
    )
    return seen


@pytest.mark.parametrize("backend", ALL)
def test_a_fixed_order(backend, rows):
    """Halton: each step's positions are the order's, and the head runs on them alone."""
    kind = kind_for(backend, "float32")
    rank = np.random.default_rng(1).permutation(12)
    order = native(np.tile(-rank.astype(np.float32), (3, 1)), kind)
    options = {"num_commit": COUNTS, "scores": order}
    out = run(backend, "halton", record=True, **options)
    wanted = by_hand(backend, StepRule.preset("halton"), lambda *_: order, COUNTS)
    np.testing.assert_array_equal(np.asarray(out.tokens), wanted)
    left, before = [int(i) for i in np.argsort(rank) if i >= 3], np.asarray(start(kind))
    for after, count in zip(out.trajectory.next_tokens, COUNTS, strict=True):
        changed = np.flatnonzero((np.asarray(after) != before)[0])
        assert sorted(changed) == sorted(left[:count])
        left, before = left[count:], np.asarray(after)
    hidden = run(backend, "halton", Toy(backend, hidden=True), **options)
    np.testing.assert_array_equal(np.asarray(hidden.tokens), wanted)
    committed = [3 * count for count in COUNTS]
    if kind == "jax":  # up to a power of two
        committed = [1 << (count - 1).bit_length() for count in committed]
    if backend != "triton":  # whose head may be fused
        assert rows == committed


def critic_for(backend):
    """Scores that depend on the whole sequence with its candidates."""
    kind = kind_for(backend, "float32")
    table = np.random.default_rng(2).normal(size=(VOCAB + 1, 12)).astype(np.float32)

    def score(step, tokens, candidates):
        ids = np.asarray(candidates)
        values = table[ids, np.arange(12)] + table[np.roll(ids, 1, 1), np.arange(12)[::-1]]
        return native(values.astype(np.float32), kind)

    return score


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden"])
@pytest.mark.parametrize("name", ["muse-critic", "quota"])
def test_a_critic_scores_the_candidates(name, hidden, backend, rows):
    rule = StepRule(score="given", count="quota") if name == "quota" else StepRule.preset(name)
    score, steps = critic_for(backend), []

    def critic(step, tokens, candidates):
        steps.append(step)
        found = candidates()
        assert candidates() is found  # drawn once
        known = np.asarray(tokens) != MASK
        assert (np.asarray(found) != MASK).all()
        np.testing.assert_array_equal(np.asarray(found)[known], np.asarray(tokens)[known])
        return score(step, tokens, found)

    out = run(backend, rule, Toy(backend, hidden), scores=critic)
    assert steps == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.asarray(out.tokens), by_hand(backend, rule, score))
    if hidden and backend != "triton":  # whose head is fused
        assert len(rows) == 4  # one pass of the head a step


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_confidences_kept_by_the_caller(backend):
    """ReMDM's conf: the scores are those the tokens were committed with."""
    kind = kind_for(backend, "float32")
    kept = np.random.default_rng(3).random((3, 12)).astype(np.float32)
    rule = dataclasses.replace(StepRule.preset("remdm-conf"), remask_eta=0.5)
    out = run(backend, rule, scores=lambda *_: native(kept, kind))
    wanted = by_hand(backend, rule, lambda *_: native(kept, kind))
    np.testing.assert_array_equal(np.asarray(out.tokens), wanted)


@pytest.mark.parametrize("backend", ALL)
def test_padding_takes_no_share_of_the_chance_to_be_masked_again(backend):
    """ReMDM's conf shares a chance out over the known positions: those that take part."""
    kind, rng = kind_for(backend, "float32"), np.random.default_rng(8)
    rule = StepRule.preset("remdm-conf")
    logits = rng.normal(size=(2, 30, 20)).astype(np.float32)
    scores = rng.random((2, 30)).astype(np.float32)
    tokens = np.where(rng.random((2, 30)) < 0.5, 20, 3)
    choice = rng.gumbel(size=(2, 30)).astype(np.float32)
    token = rng.gumbel(size=(2, 30, 20)).astype(np.float32)
    real = np.arange(30) < 12

    def step(cut, eligible):
        arrays = [
            native(np.ascontiguousarray(a[:, cut]), kind)
            for a in (logits, tokens, scores, token, choice)
        ]
        return maskgit.decode_step(
            arrays[0], arrays[1], rule=rule, mask_token_id=20, step=6, num_steps=8, scores=arrays[2],
            num_masked_at_start=arrays[1].shape[1],
            noise=StepNoise(*arrays[3:]), eligible=eligible, backend=backend,
        )  # fmt: skip

    padded = step(slice(None), native(np.tile(real, (2, 1)), kind))
    alone = step(slice(12), native(np.ones((2, 12), bool), kind))
    np.testing.assert_array_equal(
        np.asarray(padded.next_tokens)[:, :12], np.asarray(alone.next_tokens)
    )
    np.testing.assert_array_equal(np.asarray(padded.next_tokens)[:, 12:], tokens[:, 12:])


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_injected_noise_reaches_draw_and_choice(backend):
    kind, rng = kind_for(backend, "float32"), np.random.default_rng(4)
    rule = StepRule(score="given", count="quota", choice_temperature=3.0)
    noise = [
        StepNoise(
            native(rng.gumbel(size=(3, 12, VOCAB)).astype(np.float32), kind),
            native(rng.gumbel(size=(3, 12)).astype(np.float32), kind),
        )
        for _ in range(4)
    ]
    flat = native(np.zeros((3, 12), np.float32), kind)
    options = {"noise": lambda s: noise[s], "seeds": None}
    fixed = run(backend, rule, scores=flat, **options)
    drawn = run(backend, rule, scores=lambda s, t, candidates: candidates() * 0.0, **options)
    np.testing.assert_array_equal(np.asarray(fixed.tokens), np.asarray(drawn.tokens))


def test_a_dead_row_is_no_candidate():
    table = np.zeros((1, 3, 4), np.float32)
    table[0, 1] = np.nan
    out = maskgit.generate(
        lambda t: table, np.full((1, 3), 4), rule=StepRule(score="given", count="quota"),
        mask_token_id=4, num_steps=3, seeds=[1], scores=lambda s, t, c: c() * 0 + np.float32(1),
    )  # fmt: skip
    assert (out.tokens == 4).tolist() == [[False, True, False]]


def test_bad_scores():
    good = np.zeros((3, 12), np.float32)
    for given, message in (
        (None, "scores: expected exactly where the rule has score='given', got None"),
        (good[:, :3], r"scores: expected shape \(3, 12\)"),
        (good.astype(int), "scores: expected floating"),
        (lambda *_: None, "scores: expected exactly where the rule has score='given', got None"),
        (lambda s, t, c: (c(), good[:2])[1], r"scores: expected shape \(3, 12\)"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            run("reference", "halton", scores=given, num_commit=COUNTS)
    with pytest.raises(ValueError, match="scores: expected exactly where"):
        run("reference", "llada", scores=lambda *_: good)
