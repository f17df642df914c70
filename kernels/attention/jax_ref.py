"""Attention in jnp, sums in float32."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def attention(q: Any, k: Any, v: Any, padding: Any, scale: float) -> Any:
    """(B, N, H, D) from (B, N, H, D) and twice (B, M, G, D)."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    wide = {"preferred_element_type": jnp.float32, "precision": "highest"}
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, **wide) * scale
    if padding is not None:  # which may hold anything, NaN included
        v = jnp.where(padding[:, :, None, None], 0, v)
        scores = jnp.where(padding[:, None, None, :], -jnp.inf, scores)
    top = scores.max(-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v.astype(jnp.float32), **wide).astype(q.dtype)
