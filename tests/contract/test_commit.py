"""Scores from outside, revision of committed tokens, and `commit_tokens`, on every backend."""

import dataclasses

import numpy as np
import pytest
from helpers import BACKENDS, kind_for, native, native_seeds, to_dtype

import maskgit
from maskgit import StepNoise, StepRule

ALL = ["reference", *BACKENDS]
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) if name == "jax" else name
    for name in ALL
    if name != "reference"
]
MASK = 60


def problem(seed, batch=3, length=20, vocab=60, masked=0.6):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (batch, length))
    return {
        "logits": to_dtype(rng.normal(size=(batch, length, vocab)) * 2, "bfloat16"),
        "tokens": np.where(rng.random(tokens.shape) < masked, MASK, tokens),
        "seeds": rng.integers(0, 2**63, batch),
        "scores": rng.normal(size=tokens.shape).astype(np.float32),
        "eligible": rng.random(tokens.shape) < 0.8,
        "choice_gumbel": rng.gumbel(size=tokens.shape).astype(np.float32),
    }


def starts(p):
    """Of a loop that begins here."""
    return (p["eligible"] & (p["tokens"] == MASK)).sum(1)


def step(backend, p, rule, *, dtype="float32", scores=False, at=2, **changes):
    kind = kind_for(backend, dtype)
    if not rule.touches_known:
        changes = {"num_masked_at_start": native(starts(p), kind)} | changes
    out = maskgit.decode_step(
        native(p["logits"], kind, dtype),
        native(p["tokens"], kind),
        rule=rule,
        mask_token_id=MASK,
        step=at,
        num_steps=6,
        seeds=native_seeds(p["seeds"], kind),
        eligible=native(p["eligible"], kind),
        scores=native(p["scores"], kind) if scores else None,
        backend=backend,
        **changes,
    )
    return [np.asarray(a) for a in out]


REVISING = {
    "prob": {"score": "prob"},
    "log_prob-cold": {"score": "log_prob", "score_temperature": 0.5},
    "logit-greedy": {"score": "logit", "sample_temperature": 0.0},
    "margin": {"score": "margin"},
    "entropy-64": {"score": "neg_entropy", "score_dtype": "float64"},
    "probs-greedy": {"score": "prob", "sample_temperature": 0.0, "greedy_on": "probs"},
    "random": {"score": "random"},
    "noise-strict": {"choice_temperature": 2.0, "cut": "strict"},
    "inclusive-first": {"cut": "inclusive", "count_rows": "first"},
    "filtered": {"filters": ("top_k",), "top_k": 5, "score_filtered": True, "score": "prob"},
    "unfiltered": {"filters": ("top_p",), "top_p": 0.5, "score": "prob"},
    "slice": {"vocab_slice": (5, 40), "banned_ids": (7, 9)},
    "threshold": {"count": "threshold", "threshold": 0.3, "score": "prob"},
    "quota": {"count": "quota", "score": "prob"},
}


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", REVISING)
def test_revision(name, dtype, backend):
    rule = StepRule(revise="held", **REVISING[name])
    for seed in range(4):
        p = problem(seed, masked=(0.6, 0.0, 1.0, 0.3)[seed])
        p["logits"][0, 3, p["tokens"][0, 3] % 60] = -np.inf
        p["logits"][1, 4] = np.nan
        want = step("reference", p, rule, dtype=dtype)
        got = step(backend, p, rule, dtype=dtype)
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_allclose(got[2], want[2], rtol=3e-6, atol=3e-6)
        np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.parametrize("backend", ALL)
def test_revision_masks_the_least_likely_known_tokens(backend):
    p = problem(0, batch=1, length=8)
    p["tokens"][:] = np.arange(8)
    p["logits"][:] = 0
    p["logits"][0, np.arange(8), np.arange(8)] = [5, 4, 3, 2, 1, 0, -1, -2]
    p["eligible"][:] = True
    rule = StepRule(revise="held", schedule="linear", score="prob")
    out = step(backend, p, rule, at=3)  # 8 - floor(8 * 2/6) = 6 stay
    np.testing.assert_array_equal(out[0][0], [0, 1, 2, 3, 4, 5, MASK, MASK])
    np.testing.assert_array_equal(out[1][0], np.arange(8))
    assert (np.diff(out[2][0]) < 0).all()
    p["eligible"][0, 7] = False  # a token that may not be revised
    out = step(backend, p, rule, at=3)
    assert out[0][0, 7] == 7
    assert np.isposinf(out[2][0, 7])


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("cut", ["strict", "inclusive", "exact"])
@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_scores_from_outside(backend, cut, noise):
    rule = StepRule(score="given", cut=cut, choice_temperature=noise)
    for seed in range(3):
        p = problem(seed)
        p["scores"][0, :3] = np.nan
        p["scores"][1] = np.round(p["scores"][1])
        out = step(backend, p, rule, scores=True)
        want = step("reference", p, rule, scores=True)
        for a, b in zip(out, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        takes_part = p["eligible"] & (p["tokens"] == MASK)
        if not noise:
            given = np.where(np.isnan(p["scores"]), -np.inf, p["scores"])
            np.testing.assert_array_equal(out[2][takes_part], given[takes_part])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["maskgit", "llada", "titok", "dream-maskgit-plus", "threshold", "factor",
                                  "random", "dream-origin", "open-muse"])  # fmt: skip
def test_two_halves_make_a_step(backend, name):
    """commit_tokens on what sample_tokens drew is decode_step."""
    rule = StepRule.preset(name)
    rule = dataclasses.replace(rule, sample_anneal="constant", sample_temperature=1.0)
    kind = kind_for(backend, "float32")
    p = problem(5)
    whole = step(backend, p, rule)
    drawing = rule if rule.score != "random" else dataclasses.replace(rule, score="prob")
    seeds = native_seeds(p["seeds"], kind)
    stats = maskgit.sample_tokens(
        native(p["logits"], kind, "float32"), rule=drawing, seeds=seeds, step=2, backend=backend
    )
    out = maskgit.commit_tokens(
        stats.candidate_tokens, stats.confidence, native(p["tokens"], kind), rule=rule,
        mask_token_id=MASK, step=2, num_steps=6, seeds=seeds,
        num_masked_at_start=native(starts(p), kind),
        eligible=native(p["eligible"], kind), backend=backend,
    )  # fmt: skip
    for a, b in zip(out, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("backend", ALL)
def test_editing_replaces_known_tokens_above_its_threshold(backend):
    p = problem(2, batch=1, length=6)
    p["tokens"][0] = [0, 1, 2, 3, MASK, 5]
    p["eligible"][0] = [True, True, True, False, True, True]
    p["scores"][0] = [0.9, 0.1, 0.9, 0.9, 0.5, 0.9]
    p["logits"][0] = 0
    p["logits"][0, :, 7] = 5
    p["logits"][0, 5, :] = 0
    p["logits"][0, 5, 5] = 5
    rule = StepRule(score="given", count="threshold", edit_threshold=0.5, sample_temperature=0.0)
    out = step(backend, p, rule, scores=True)
    np.testing.assert_array_equal(out[0][0], [7, 1, 7, 3, 7, 5])
    rule = StepRule(score="prob", count="threshold", edit_threshold=0.5, sample_temperature=0.0)
    out = step(backend, p, rule)
    np.testing.assert_array_equal(out[0][0], [7, 7, 7, 3, 7, 5])


@pytest.mark.parametrize("backend", ALL)
def test_candidates_that_are_missing_stay_masked(backend):
    kind = kind_for(backend, "float32")
    candidates = native(np.array([[3, -1, 5, 6]]), kind)
    out = maskgit.commit_tokens(
        candidates, native(np.ones((1, 4), np.float32), kind), native(np.full((1, 4), 9), kind),
        rule="llada", mask_token_id=9, step=0, num_steps=1, backend=backend,
    )  # fmt: skip
    assert np.asarray(out.next_tokens).tolist() == [[3, 9, 5, 6]]
    assert np.isneginf(np.asarray(out.confidence)[0, 1])


BAD = {
    "scores: expected exactly where": {"scores": np.zeros((1, 4), np.float32)},
    "rule: expected": {"rule": "nothing"},
    "step: expected": {"step": 7},
    "eligible: expected": {"eligible": np.ones((1, 4))},
    "seeds: expected": {"rule": "random"},
}


def test_bad_arguments_of_a_step():
    logits, tokens = np.zeros((1, 4, 5), np.float32), np.full((1, 4), 5)
    good = {"rule": "llada", "mask_token_id": 5, "step": 0, "num_steps": 2}
    for message, changes in BAD.items():
        with pytest.raises((ValueError, TypeError), match=message):
            maskgit.decode_step(logits, tokens, **{**good, **changes})
    with pytest.raises(ValueError, match=r"scores: expected exactly where.*got None"):
        maskgit.decode_step(logits, tokens, **{**good, "rule": StepRule(score="given")})


def test_bad_arguments_of_a_commit():
    good = {
        "candidate_tokens": np.zeros((1, 4), np.int64),
        "scores": np.zeros((1, 4), np.float32),
        "tokens": np.full((1, 4), 5),
        "rule": "llada",
        "mask_token_id": 5,
        "step": 0,
        "num_steps": 2,
    }
    bad = {
        "scores: expected a torch": {"scores": [1.0]},
        r"scores: expected shape \(B, N\)": {"scores": np.zeros(4, np.float32)},
        "scores: expected floating": {"scores": np.zeros((1, 4), np.int64)},
        "candidate_tokens: expected shape": {"candidate_tokens": np.zeros((1, 3), np.int64)},
        "candidate_tokens: expected integers": {"candidate_tokens": np.zeros((1, 4))},
        "candidate_tokens: expected ids": {"candidate_tokens": np.full((1, 4), -2)},
        "tokens: expected shape": {"tokens": np.zeros((2, 4), np.int64)},
        "mask_token_id: expected an id that int8": {
            "tokens": np.zeros((1, 4), np.int8),
            "mask_token_id": 300,
        },
        "choice_gumbel: expected shape": {"choice_gumbel": np.zeros((1, 3), np.float32)},
        "seeds: expected": {"rule": "random"},
    }
    maskgit.commit_tokens(**good)
    for message, changes in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            maskgit.commit_tokens(**{**good, **changes})


def test_commit_is_one_node_of_a_compiled_graph():
    torch = pytest.importorskip("torch")

    def call(candidates, scores, tokens):
        return maskgit.commit_tokens(
            candidates, scores, tokens, rule="llada", mask_token_id=9, step=0, num_steps=3
        )

    args = torch.arange(8)[None] % 4, torch.rand(1, 8), torch.full((1, 8), 9)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*args)
    for a, b in zip(got, call(*args), strict=True):
        assert torch.equal(a, b)
    from maskgit.kernels.decode_step.ops import commit_tokens_op

    encoded = StepRule.preset("llada").encoded
    full = (*args, encoded, 9, 0, 3, *[None] * 7, "auto")
    torch.library.opcheck(commit_tokens_op.overload, full)


def test_noise_replaces_seeds():
    p = problem(1)
    rule = StepRule(score="given", choice_temperature=1.0)
    noise = StepNoise(np.zeros((3, 20, 60), np.float32), p["choice_gumbel"])
    changed = {**p, "seeds": None}
    for backend in ALL:
        kind = kind_for(backend, "float32")
        given = StepNoise(*(native(a, kind) for a in noise))
        a = step(backend, changed, rule, scores=True, noise=given)
        b = step("reference", changed, rule, scores=True, noise=noise)
        np.testing.assert_array_equal(a[0], b[0])


CORNERS = {
    # the first row's quota for all rows
    "quota-first": (
        StepRule(count="threshold", min_commit="quota", count_rows="first", threshold=2.0,
                 sample_temperature=0.0),
        np.broadcast_to(np.arange(4.0, dtype=np.float32), (2, 4, 4)),
        [[9, 0, 0, 0], [9, 9, 9, 9]],
        [[3, 0, 0, 0], [3, 9, 9, 9]],
    ),
    # a candidate outside the score's softmax, with nothing else in it, has probability 0
    "nothing-scored": (
        StepRule(count="threshold", threshold=0.0, score="prob", score_banned_ids=(0,), score_filtered=True,
                 filters=("top_k",), top_k=1, sample_temperature=0.0),
        np.array([[[5.0, 0, 0], [0, 5.0, 0]]], np.float32),
        [[9, 9]],
        [[0, 1]],
    ),
    # the entropy of one token is 0, not nearly 0
    "no-entropy": (
        StepRule(count="entropy_bound", threshold=0.0, score="neg_entropy", sample_temperature=0.0,
                 score_filtered=True, filters=("top_k",), top_k=1),
        np.eye(4, 300, dtype=np.float32)[None] * 5,
        [[999] * 4],
        [[0, 1, 2, 3]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", CORNERS)
def test_corners(name, backend):
    rule, logits, tokens, want = CORNERS[name]
    kind = kind_for(backend, "float32")
    mask = max(max(row) for row in tokens)
    out = maskgit.decode_step(
        native(logits, kind, "float32"), native(np.array(tokens), kind), rule=rule,
        mask_token_id=mask, step=0, num_steps=1, backend=backend,
    )  # fmt: skip
    assert np.asarray(out.next_tokens).tolist() == want


@pytest.mark.parametrize("fields", [{"revise": "held"}, {"edit_threshold": 0.5}])
def test_remasking_does_not_mix_with_revision(fields):
    with pytest.raises(ValueError, match=r"StepRule.remask: expected with revise='no'"):
        StepRule(count="bernoulli", score="random", remask="cap", **fields)
