"""What the recorders of the image codebases share: sequences, guided models, and calls that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from common import Stub, bits_of


def sequences(known: tuple[int, ...], length: int, vocab: int, mask: int, seed: int) -> np.ndarray:
    """One row per entry of `known`, with so many known tokens, else masks."""
    rng = np.random.default_rng(seed)
    tokens = np.full((len(known), length), mask)
    for row, given in zip(tokens, known, strict=True):
        row[rng.choice(length, given, replace=False)] = rng.integers(0, vocab, given)
    return tokens


@contextmanager
def kept(owner: Any, name: str) -> Iterator[list[tuple[Any, Any]]]:
    """The calls of `owner.name` as a list of (arguments, result), copied."""
    function, calls = getattr(owner, name), []

    def copy(x: Any) -> Any:
        return x.clone() if isinstance(x, torch.Tensor) else x

    def keep(*args: Any, **named: Any) -> Any:
        args_then = tuple(copy(x) for x in args)
        out = function(*args, **named)
        calls.append((args_then, copy(out)))
        return out

    setattr(owner, name, keep)
    try:
        yield calls
    finally:
        setattr(owner, name, function)


class Guided:
    """Two stubs: rows from `rows` on are unconditional.  `calls` is a list of (tokens, logits)."""

    device = torch.device("cpu")

    def __init__(
        self, rows: int, vocab: int, length: int, num_ids: int, seed: int, dtype: str = "float32"
    ):
        self.rows, self.dtype = rows, getattr(torch, dtype)
        self.stubs = [Stub(vocab, length, num_ids, seed + i, bits_of(dtype)) for i in range(2)]
        self.calls: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, x: Any, *_: Any, **__: Any) -> Any:
        x = np.array(x)
        parts = [self.stubs[i](x[self.rows * i :][: self.rows]) for i in range(len(x) // self.rows)]
        self.calls.append((x[: self.rows], np.concatenate(parts)))
        return torch.from_numpy(self.calls[-1][1].copy()).to(self.dtype)
