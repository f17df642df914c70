"""Attention in float64 NumPy: the judge of the other backends."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.rounding import round_to


def attention(q: Any, k: Any, v: Any, padding: Any, scale: float, dtype: str) -> Any:
    """(B, N, H, D) float32 numbers of `dtype`, from (B, N, H, D) and twice (B, M, G, D)."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * scale
    if padding is not None:  # which may hold anything, NaN included
        v = np.where(padding[:, :, None, None], 0.0, v)
        scores = np.where(padding[:, None, None, :], -np.inf, scores)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("bhnm,bmhd->bnhd", weights / np.where(total > 0, total, 1.0), v)
    return round_to(out, dtype).astype(np.float32)
