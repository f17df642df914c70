"""The loop's options: trajectories, hidden states, given counts, padding, on every backend."""

import dataclasses

import numpy as np
import pytest
from helpers import BACKENDS, kind_for, native, native_seeds

import maskgit
from maskgit import StepRule

MASK, VOCAB, WIDTH = 40, 40, 6
SLOW_ON_JAX = [
    pytest.param(name, marks=pytest.mark.slow) if name == "jax" else name
    for name in ["reference", *BACKENDS]
]
ALL = ["reference", *BACKENDS]


class Toy:
    """Logits (or hidden states) that depend on the tokens, in the arrays' library."""

    def __init__(self, backend, hidden=False):
        rng = np.random.default_rng(0)
        self.kind, self.hidden, self.calls = kind_for(backend, "float32"), hidden, 0
        self.embed = rng.normal(size=(VOCAB + 1, WIDTH)).astype(np.float32)
        self.weight = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
        self.place = rng.normal(size=(64, WIDTH)).astype(np.float32)

    def states(self, tokens):
        x = self.embed[np.asarray(tokens)]
        return np.tanh(x + np.roll(x, 1, 1) + x.mean(1, keepdims=True) + self.place[: x.shape[1]])

    def __call__(self, tokens):
        self.calls += 1
        states = self.states(tokens)
        return native(states if self.hidden else states @ self.weight.T, self.kind)


def start(backend, batch=3, length=12, known=3):
    tokens = np.full((batch, length), MASK)
    tokens[:, :known] = np.arange(known)
    return native(tokens, kind_for(backend, "float32"))


def run(backend, rule, toy=None, tokens=None, **options):
    kind = kind_for(backend, "float32")
    given = {"mask_token_id": MASK, "num_steps": 4, "backend": backend}
    given["seeds"] = native_seeds(np.arange(3) + 5, kind)
    tokens = start(backend) if tokens is None else tokens
    return maskgit.generate(toy or Toy(backend), tokens, rule=rule, **(given | options))


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("rule", ["maskgit", "llada", "random"])
def test_trajectory(rule, backend):
    rule = dataclasses.replace(
        StepRule.preset(rule), sample_temperature=1.0, score_dtype="float32", ban_mask_token=True
    )
    toy = Toy(backend)
    out = run(backend, rule, toy, record=True)
    log = out.trajectory
    before = np.asarray(start(backend))
    last = np.full(before.shape, -1)
    for s, (after, drawn, log_probs, entropies) in enumerate(
        zip(log.next_tokens, log.candidate_tokens, log.log_probs, log.entropies, strict=True)
    ):
        after, drawn = np.asarray(after), np.asarray(drawn)
        masked = before == MASK
        logits = (toy.states(before) @ toy.weight.T).astype(np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        own = np.log(np.take_along_axis(p, np.where(masked, drawn, 0)[..., None], -1)[..., 0])
        np.testing.assert_allclose(
            np.asarray(log_probs), np.where(masked, own, 0), rtol=1e-4, atol=1e-5
        )
        entropy = -(p * np.log(p)).sum(-1)
        np.testing.assert_allclose(
            np.asarray(entropies), np.where(masked, entropy, 0), rtol=1e-4, atol=1e-5
        )
        last[masked & (after != MASK)] = s
        before = after
    np.testing.assert_array_equal(np.asarray(log.commit_steps), last)
    assert len(log.confidence) == out.num_forwards == toy.calls


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("rule", ["maskgit", "mdlm", "dream-entropy", "soundstorm"])
def test_hidden_states_give_the_same_tokens(rule, backend):
    toy = Toy(backend, hidden=True)
    head = native(toy.weight, toy.kind)
    a = run(backend, rule, toy, head_weight=head, record=rule == "maskgit")
    b = run(backend, rule, record=rule == "maskgit")
    np.testing.assert_array_equal(np.asarray(a.tokens), np.asarray(b.tokens))
    if a.trajectory is not None:
        for x, y in zip(a.trajectory.log_probs, b.trajectory.log_probs, strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_given_counts(backend):
    rule = StepRule(count="given")
    out = run(backend, rule, num_commit=[1, 2, 3, 3], record=True)
    committed = [int((np.asarray(t) != MASK).sum(1)[0]) for t in out.trajectory.next_tokens]
    assert committed == [4, 6, 9, 12]
    with pytest.raises(ValueError, match="num_commit: expected one entry for each of 4 steps"):
        run(backend, rule, num_commit=[1, 2])
    with pytest.raises(ValueError, match="num_commit: expected exactly where"):
        run(backend, rule)


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_only_eligible_positions_are_generated(backend):
    allowed = np.zeros((3, 12), bool)
    allowed[:, 3:8] = True
    out = run(backend, "llada", eligible=native(allowed, kind_for(backend, "float32")))
    tokens = np.asarray(out.tokens)
    assert (tokens[:, 8:] == MASK).all()
    assert (tokens[:, :8] != MASK).all()


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_revision_leaves_the_prompt_alone(backend):
    out = run(backend, StepRule(revise="held", schedule="linear", score="prob"), record=True)
    for tokens in out.trajectory.next_tokens:
        np.testing.assert_array_equal(np.asarray(tokens)[:, :3], [[0, 1, 2]] * 3)


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_positions_are_those_of_the_unpadded_row(backend):
    """Logits that depend on the real place alone: a left-padded row draws as it does alone."""
    kind = kind_for(backend, "float32")
    table = np.random.default_rng(1).normal(size=(16, VOCAB)).astype(np.float32)
    pads = np.array([0, 2, 5])
    length = 12
    places = np.maximum(np.arange(length)[None] - pads[:, None], 0)
    tokens = np.where(np.arange(length)[None] < pads[:, None], 0, MASK)
    options = {"mask_token_id": MASK, "num_steps": 4, "rule": "maskgit", "backend": backend}
    both = maskgit.generate(
        lambda t: native(table[places], kind), native(tokens, kind),
        seeds=native_seeds(np.arange(3), kind), positions=native(places, kind), **options,
    )  # fmt: skip
    for row, pad in enumerate(pads):
        alone = maskgit.generate(
            lambda t, pad=pad: native(table[None, : length - pad], kind),
            native(np.full((1, length - pad), MASK), kind),
            seeds=native_seeds(np.arange(3)[row : row + 1], kind), **options,
        )  # fmt: skip
        np.testing.assert_array_equal(
            np.asarray(both.tokens)[row, pad:], np.asarray(alone.tokens)[0]
        )


def test_bad_arguments():
    good = {"rule": "llada", "mask_token_id": 9, "num_steps": 2}
    tokens = np.full((1, 4), 9)

    def forward(tokens):
        return np.zeros((1, 4, 5), np.float32)

    bad = {
        "head_weight: expected together": {"head_bias": np.zeros(5, np.float32)},
        r"hidden: expected shape|head_weight: expected shape": {
            "head_weight": np.zeros((5, 3), np.float32)
        },
        "positions: expected shape": {"positions": np.zeros((1, 3), np.int64)},
        "positions: expected values": {"positions": np.full((1, 4), -1)},
        "num_commit: expected exactly where": {"num_commit": [1, 1]},
    }
    for message, changes in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            maskgit.generate(forward, tokens, **(good | changes))
