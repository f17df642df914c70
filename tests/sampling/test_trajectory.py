"""`generate(record=True)`: every number against float64, from the tokens that the model was shown."""

import dataclasses
import warnings

import numpy as np
import pytest
from helpers import BACKENDS, kind_for, native, to_dtype
from maskgit.kernels.head_sample import chunked
from toys import MASK, VOCAB, Toy, run, start

import maskgit
from maskgit import StepNoise, StepRule

ALL = ["reference", *BACKENDS]
SLOW_ON_JAX = [pytest.param(b, marks=pytest.mark.slow) if b == "jax" else b for b in ALL]
PRESETS = [name for name in StepRule.presets() if StepRule.preset(name).score != "given"]


def log_softmax(logits):
    z = logits.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def check(out, seen, logits_of, before, mask=MASK, hidden=False):
    """All of the trajectory; returns how many known tokens were edited."""
    log, edits, put = out.trajectory, 0, np.full(before.shape, -1)
    states = [*seen[1:], np.asarray(out.tokens)]
    assert len(log.log_probs) == len(log.entropies) == len(seen) == out.num_forwards
    for s, (tokens, after) in enumerate(zip(seen, states, strict=True)):
        log_p, candidates = log_softmax(logits_of(tokens)), np.asarray(log.candidate_tokens[s])
        found = np.asarray(log.confidence[s]) > -np.inf
        drawn = (candidates != tokens) | ((tokens == mask) & found)
        assert drawn[tokens == mask].all() or hidden  # there only what is committed is drawn
        edits += int((drawn & (tokens != mask)).sum())
        own = np.take_along_axis(log_p, np.where(drawn, candidates, 0)[..., None], -1)[..., 0]
        entropy = -(np.exp(log_p) * np.where(np.isfinite(log_p), log_p, 0)).sum(-1)
        for name, wanted in (("log_probs", own), ("entropies", entropy)):
            got = np.asarray(getattr(log, name)[s])
            assert got.dtype.itemsize >= 4
            np.testing.assert_array_equal(got[~drawn], 0)
            np.testing.assert_allclose(got[drawn], wanted[drawn], rtol=2e-5, atol=2e-6)
        put = np.where(after != tokens, s, put)
        put[after == mask] = -1
    np.testing.assert_array_equal(np.asarray(log.commit_steps), put)
    is_new = (np.asarray(out.tokens) != mask) & (before == mask)
    assert (put[is_new] >= 0).all()
    return edits


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name, hidden, backend):
    rule, toy = StepRule.preset(name), Toy(backend, hidden, scale=2.0)
    commits = {"num_commit": [3] * 4} if rule.count == "given" else {}
    with warnings.catch_warnings():
        if toy.kind == "numpy":
            warnings.simplefilter("error")
        out = run(backend, rule, toy, record=True, **commits)
    check(out, toy.seen, toy.logits, np.asarray(start(toy.kind)), hidden=hidden)


@pytest.mark.parametrize("backend", [b for b in ALL if b != "jax"])
@pytest.mark.parametrize("name", ["llada", "dream-maskgit-plus", "dream-margin", "sdar"])
def test_half_precision_is_not_rounded(name, backend):
    pytest.importorskip("torch")
    toy = Toy(backend, dtype="bfloat16")
    toy.kind = "torch"
    tokens = native(np.full((3, 12), MASK), "torch")
    out = run(backend, name, toy, tokens, record=True)
    check(out, toy.seen, lambda t: to_dtype(toy.logits(t), "bfloat16"), np.full((3, 12), MASK))


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("injected", [False, True], ids=["seeds", "noise"])
def test_temperatures_and_filters_do_not_count_but_the_noise_does(injected, backend):
    rule = StepRule(
        sample_temperature=3.0, filters=("top_k",), top_k=7, score="prob", score_filtered=True,
        score_temperature=None, choice_temperature=2.0,
    )  # fmt: skip
    rng, kind = np.random.default_rng(2), kind_for(backend, "float32")
    gumbel = rng.gumbel(size=(4, 3, 12, VOCAB)).astype(np.float32)
    choice = rng.gumbel(size=(4, 3, 12)).astype(np.float32)
    toy, options = Toy(backend), {}
    if injected:
        options["noise"] = lambda s: StepNoise(native(gumbel[s], kind), native(choice[s], kind))
        options["seeds"] = None
    out = run(backend, rule, toy, record=True, **options)
    check(out, toy.seen, toy.logits, np.asarray(start(kind)))
    if injected:
        logits = toy.logits(toy.seen[0])
        kept = logits >= np.sort(logits, -1)[..., -7, None]
        best = np.where(kept, logits + 3.0 * gumbel[0], -np.inf).argmax(-1)
        first = np.asarray(out.trajectory.candidate_tokens[0])
        np.testing.assert_array_equal(first[:, 3:], best[:, 3:])


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_what_may_not_be_drawn_has_no_mass(backend):
    rule = StepRule(vocab_slice=(4, 30), banned_ids=(5, 6), ban_mask_token=True)
    toy, tokens = Toy(backend), np.full((3, 12), 9)  # the mask token is one of the columns
    tokens[:, :3] = np.arange(3)
    out = run(backend, rule, toy, native(tokens, toy.kind), mask_token_id=9, record=True)

    def allowed(tokens):
        logits = toy.logits(tokens).copy()
        logits[..., [*range(4), 5, 6, 9, *range(30, VOCAB)]] = -np.inf
        return logits

    check(out, toy.seen, allowed, tokens, mask=9)


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("dtype", ["logits", "float32"])
def test_guidance(dtype, backend):
    rule = dataclasses.replace(StepRule.preset("llada"), guidance_dtype=dtype)
    toy, other = Toy(backend), Toy(backend, scale=0.5)
    out = maskgit.generate(
        lambda t: (toy(t), other(t)), start(toy.kind), rule=rule, mask_token_id=MASK, num_steps=4,
        guidance_scale=2.5, record=True, backend=backend,
    )  # fmt: skip

    def guided(tokens):
        return other.logits(tokens) + 2.5 * (toy.logits(tokens) - other.logits(tokens))

    check(out, toy.seen, guided, np.asarray(start(toy.kind)))


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("name", ["sglang-joint", "halton-confidence", "llada2-edit"])
def test_edited_tokens_have_their_numbers(name, backend):
    rule, toy = StepRule.preset(name), Toy(backend, scale=2.0)
    if name == "llada2-edit":
        rule = dataclasses.replace(rule, edit_threshold=0.3)
    commits = {"num_commit": [3] * 4} if rule.count == "given" else {}
    out = run(backend, rule, toy, record=True, **commits)
    assert check(out, toy.seen, toy.logits, np.asarray(start(toy.kind))) > 0


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_a_predicted_mask_token_has_its_numbers_too(backend):
    table = np.random.default_rng(3).normal(size=(2, 6, 8)).astype(np.float32)
    table[0, 2, 7] = 9.0  # LLaDA may predict the mask token, 7 here
    kind = kind_for(backend, "float32")
    out = maskgit.generate(
        lambda t: native(table, kind), native(np.full((2, 6), 7), kind), rule="llada",
        mask_token_id=7, num_steps=2, record=True, backend=backend,
    )  # fmt: skip
    got = np.asarray(out.trajectory.log_probs[0])
    np.testing.assert_allclose(got, log_softmax(table).max(-1), rtol=2e-5, atol=2e-6)
    assert np.asarray(out.trajectory.commit_steps)[0, 2] == -1


@pytest.mark.parametrize("name", ["mdlm", "bd3lm", "random", "dream-origin", "llada"])
def test_recording_reads_the_rows_drawn_twice_more_and_no_others(name, monkeypatch):
    rows, product = [], chunked._product
    monkeypatch.setattr(
        chunked, "_product", lambda h, w, b: rows.append(len(h)) or product(h, w, b)
    )
    out = run("reference", name, Toy("reference", hidden=True), record=True)
    drawn = sum(int((e != 0).sum()) for e in out.trajectory.entropies)
    assert drawn > 0
    assert sum(rows) == 3 * drawn
    if name != "llada":  # there each position is drawn when it is committed, not before
        assert drawn == (out.trajectory.commit_steps >= 0).sum()


def test_small_unsigned_tokens():
    tokens = np.full((2, 6), 250, np.uint8)
    table = np.random.default_rng(1).normal(size=(2, 6, 250)).astype(np.float32)
    out = maskgit.generate(
        lambda t: table, tokens, rule="llada", mask_token_id=250, num_steps=3, record=True
    )
    assert out.tokens.dtype == np.uint8
    assert sorted(out.trajectory.commit_steps[0]) == [0, 0, 1, 1, 2, 2]
