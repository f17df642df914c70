"""`attention`: signature, documentation, checks, and the way to a backend."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from ..common.arrays import (
    check_no_grad,
    check_same_kind,
    dtype_name,
    kind_of,
)
from ..common.backends import check_name
from .dispatch import attend

DTYPES = ("float16", "bfloat16", "float32")


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    key_padding_mask: Any = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Any:
    """softmax(scale q k^T) v over all keys of a sequence: attention without a causal mask.

    Args:
        q: (B, N, H, D) float16, bfloat16 or float32, any strides: the views of one packed product
            (B, N, 3, H, D) are read in place.
        k, v: (B, M, G, D), G a divisor of H: each key head serves H / G query heads.
        key_padding_mask: (B, M) bool, True at keys that are padding and left out, as in
            torch.nn.MultiheadAttention.
        scale: of the scores; by default 1 / sqrt(D).
        backend: "auto", "triton", "pallas", "torch", "jax" or "reference".  On a GPU "auto" takes
            Triton's kernel where tuned data says that it is the faster one, else
            scaled_dot_product_attention; on a TPU Pallas's kernel where its keys fit in VMEM.

    Returns:
        (B, N, H, D) in the dtype of q.  Softmax and sums are in float32.  A sequence whose keys are all
        padding gets zeros.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes or shapes, inputs that require grad, a backend that
            cannot run here.

    Source: online softmax (arXiv 1805.02867, 2205.14135).
    """
    scale = _check(q, k, v, key_padding_mask, scale, check_name(backend))
    if kind_of(q) != "torch":
        return attend(q, k, v, key_padding_mask, scale, backend)
    from .ops import attention_op

    return attention_op(q, k, v, key_padding_mask, scale, backend)


def _check(q: Any, k: Any, v: Any, padding: Any, scale: float | None, backend: str) -> float:
    """The scale, once all arguments fit each other."""
    if kind_of(q) is None:
        raise TypeError(f"q: expected a torch, jax or NumPy array, got {type(q).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_same_kind(name, x, q)
        check_no_grad(name, x)
        if dtype_name(x) not in DTYPES or dtype_name(x) != dtype_name(q):
            wanted = ", ".join(DTYPES) if name == "q" else f"{dtype_name(q)} like q"
            raise TypeError(f"{name}: expected dtype {wanted}, got {dtype_name(x)}")
        if len(x.shape) != 4:
            raise ValueError(f"{name}: expected shape (B, N, H, D), got {tuple(x.shape)}")
    batch, _, heads, size = q.shape
    if heads < 1 or size < 1:
        raise ValueError(f"q: expected H >= 1 and D >= 1, got {tuple(q.shape)}")
    keys, groups = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != size or groups < 1 or heads % groups:
        raise ValueError(
            f"k: expected shape ({batch}, M, a divisor of {heads}, {size}), got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: expected shape {tuple(k.shape)} like k, got {tuple(v.shape)}")
    if padding is not None:
        check_same_kind("key_padding_mask", padding, q)
        if dtype_name(padding) != "bool" or tuple(padding.shape) != (batch, keys):
            raise ValueError(
                f"key_padding_mask: expected bool of shape ({batch}, {keys}), "
                f"got {dtype_name(padding)} of shape {tuple(padding.shape)}"
            )
    if scale is None:
        return 1.0 / math.sqrt(size)
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    return float(scale)
