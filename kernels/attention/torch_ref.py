"""Attention by torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def attention(q: Any, k: Any, v: Any, padding: Any, scale: float) -> Any:
    """(B, N, H, D) from (B, N, H, D) and twice (B, M, G, D)."""
    if padding is not None:  # which may hold anything, NaN included
        k, v = (x.masked_fill(padding[:, :, None, None], 0.0) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    keep = None if padding is None else ~padding[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=keep, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)
    if padding is None:
        return out
    return torch.where(padding.all(1)[:, None, None, None], 0.0, out)  # they are NaN there
