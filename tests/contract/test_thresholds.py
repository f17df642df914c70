"""Every threshold is compared as torch compares it with scores of a dtype: rounded to that dtype.

Scores lie on, a unit above and a unit below each threshold as rounded; what eager torch would commit
is written out here in the dtype itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, DTYPES, native

import maskgit
from maskgit import StepRule

torch = pytest.importorskip("torch")

MASK = 9
CASES = [
    (name, dtype)
    for name in (*BACKENDS, "reference")
    for dtype in DTYPES
    if name not in ("pallas", "triton") and (name != "jax" or dtype == "bfloat16")
]


def near(value: float, dtype: str) -> Any:
    """Three numbers of the dtype around `value`: the one it rounds to is in the middle."""
    x = torch.tensor(value, dtype=getattr(torch, dtype))
    step = torch.tensor(2.0 ** (-9 if dtype == "bfloat16" else -12), dtype=x.dtype)
    return torch.stack([x - step, x, x + step])


def commit(scores: Any, backend: str, dtype: str, **fields: Any) -> np.ndarray:
    """Which of the positions `commit_tokens` commits, given scores (B, N) of the dtype."""
    rule = StepRule(score="given", score_dtype="logits", clamps=(), **fields)
    kind = "jax" if backend == "jax" else "torch"
    given = native(scores.float().numpy(), kind, dtype)
    tokens = native(np.full(tuple(scores.shape), MASK), kind)
    drawn = native(np.zeros(tuple(scores.shape), np.int64), kind)
    out = maskgit.commit_tokens(
        drawn, given, tokens, rule=rule, mask_token_id=MASK, step=0, num_steps=4, backend=backend
    )
    return np.asarray(out.next_tokens) != MASK


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_given_thresholds(backend: str, dtype: str) -> None:
    for value in (0.3, 0.7, 0.9, 0.95):
        scores = torch.cat([near(value, dtype), torch.ones(1, dtype=getattr(torch, dtype))])[None]
        for strict in (False, True):
            wanted = scores > value if strict else scores >= value
            got = commit(
                scores, backend, dtype, count="threshold", threshold=value, threshold_strict=strict
            )
            assert np.array_equal(got, wanted.numpy()), (value, strict)
        # of each run the best above the low one: three runs of one, and a sure one
        apart = torch.zeros(1, 9, dtype=scores.dtype)
        apart[:, 1::2] = scores
        known = np.zeros(apart.shape, bool)
        known[:, ::2] = True
        got = _runs(apart, known, backend, dtype, value)
        assert np.array_equal(got[:, 1::2], (scores > value).numpy()), value


def _runs(scores: Any, known: np.ndarray, backend: str, dtype: str, low: float) -> np.ndarray:
    rule = StepRule(
        score="given", score_dtype="logits", count="runs", threshold=2.0, low_threshold=low
    )
    kind = "jax" if backend == "jax" else "torch"
    tokens = np.where(known, 1, MASK)
    out = maskgit.commit_tokens(
        native(np.zeros_like(tokens), kind), native(scores.float().numpy(), kind, dtype),
        native(tokens, kind), rule=rule, mask_token_id=MASK, step=0, num_steps=4, backend=backend,
    )  # fmt: skip
    return np.asarray(out.next_tokens) != MASK


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_computed_thresholds(backend: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    for slack in (0.05, 0.3):
        top = torch.tensor([0.8], dtype=kind)
        bound = torch.minimum(torch.tensor(0.9, dtype=kind), top - torch.tensor(slack, dtype=kind))
        scores = torch.cat([top, near(float(bound), dtype)])[None]
        got = commit(
            scores, backend, dtype, count="threshold", threshold=0.9, threshold_slack=slack
        )
        assert np.array_equal(got, (scores >= bound).numpy()), slack
    for factor in (0.7, 1.1):  # the second is sure enough or not
        for second in near(1 - factor / 3, dtype):
            scores = torch.tensor([[0.99, 0, 0, 0]], dtype=kind)
            scores[0, 1] = second
            got = commit(scores, backend, dtype, count="factor", factor=factor, factor_tail=False)
            assert got[0, 1] == bool(second >= 1 - factor / 3), (factor, float(second))
    for bound in (0.3, 0.15):  # the second entropy is taken while the first is within the bound
        for first in near(bound, dtype):
            scores = -torch.stack([first, first * 2])[None]
            got = commit(scores, backend, dtype, count="entropy_bound", threshold=bound)
            assert got[0, 1] == bool(first <= bound), (bound, float(first))


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_edits(backend: str, dtype: str) -> None:
    kind = "jax" if backend == "jax" else "torch"
    for value in (0.3, 0.7):
        rule = StepRule(
            count="threshold", threshold=2.0, edit_threshold=value, score="logit",
            score_dtype="logits", sample_temperature=0.0,
        )  # fmt: skip
        top = near(value, dtype)
        logits = np.full((1, 3, 8), -5, np.float32)
        logits[0, :, 2] = top.float().numpy()
        out = maskgit.decode_step(
            native(logits, kind, dtype), native(np.ones((1, 3), np.int64), kind), rule=rule,
            mask_token_id=MASK, step=0, num_steps=4, backend=backend,
        )  # fmt: skip
        assert np.array_equal(np.asarray(out.next_tokens)[0] == 2, (top > value).numpy()), value
