"""A model small enough for every test of the loop, and the loop on it."""

import numpy as np
from helpers import kind_for, native, native_seeds

import maskgit

MASK, VOCAB, WIDTH = 40, 40, 6


class Toy:
    """Logits (or hidden states) that depend on the tokens; it remembers the tokens it was shown."""

    def __init__(self, backend, hidden=False, dtype="float32", scale=1.0):
        rng = np.random.default_rng(0)
        self.kind, self.hidden, self.dtype = kind_for(backend, dtype), hidden, dtype
        self.seen = []
        self.embed = rng.normal(size=(VOCAB + 1, WIDTH)).astype(np.float32)
        self.weight = (scale * rng.normal(size=(VOCAB, WIDTH))).astype(np.float32)
        self.place = rng.normal(size=(64, WIDTH)).astype(np.float32)

    def states(self, tokens):
        x = self.embed[np.asarray(tokens)]
        return np.tanh(x + np.roll(x, 1, 1) + x.mean(1, keepdims=True) + self.place[: x.shape[1]])

    def logits(self, tokens):
        return self.states(tokens) @ self.weight.T

    def __call__(self, tokens):
        self.seen.append(np.asarray(tokens).copy())
        values = self.states(tokens) if self.hidden else self.logits(tokens)
        return native(values, self.kind, self.dtype)


def start(kind, batch=3, length=12, known=3):
    tokens = np.full((batch, length), MASK)
    tokens[:, :known] = np.arange(known)
    return native(tokens, kind)


def run(backend, rule, toy=None, tokens=None, **options):
    """`generate` with what every call of it needs."""
    toy = toy or Toy(backend)
    tokens = start(toy.kind) if tokens is None else tokens
    given = {"mask_token_id": MASK, "num_steps": 4, "backend": backend}
    given["seeds"] = native_seeds(np.arange(len(tokens)) + 5, toy.kind)
    if toy.hidden:
        given["head_weight"] = native(toy.weight, toy.kind, toy.dtype)
    return maskgit.generate(toy, tokens, rule=rule, **(given | options))
