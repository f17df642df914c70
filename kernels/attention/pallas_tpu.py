"""Attention over all keys, without a causal mask, on a TPU: the scores of a head stay in VMEM.

For queries q (N, D), keys k and values v (M, D) of a head, with m the row's maximum:

    s = scale q k^T      p = exp(s - m)      out = (p v) / sum p

M is at most some thousands for the models that this is for, so all keys and values of a head are in VMEM
and the softmax is done at once: two products, no running maximum.  Heads of 48, 64, 72 or 96 do not fill
128 lanes; rows are therefore read as the projection leaves them, (N, H D), in blocks of as few heads as
end at a multiple of 128, and heads are cut out of registers.

Grid: (sequences, blocks of heads, blocks of queries); keys and values stay while queries change.
Bytes: q, k, v and the result once.  Limits: M such that two blocks of keys and values, and a block of
scores, fit in VMEM (M of 4096 at 4 heads of 128 does).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..common.simulation import interpret_params

LANES = 128
LOG2E = 1.4426950408889634
SCORE_BYTES = 4 << 20  # of a block of queries' scores, in float32
MOST_BYTES = 32 << 20


@dataclass(frozen=True)
class AttentionSpec:
    """What the kernel is compiled for.

    rows: queries of a block; heads, groups: query and key heads of a block; size: D; keys: M.
    """

    rows: int
    heads: int
    groups: int
    size: int
    keys: int
    has_padding: bool


def attention_kernel(scale: Any, *refs: Any, spec: AttentionSpec) -> None:
    """Grid (sequences, blocks of heads, blocks of queries): [rows, heads D] of the result."""
    padding = refs[0] if spec.has_padding else None
    q_ref, k_ref, v_ref, out_ref = refs[spec.has_padding :]
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    out = []
    for head in range(spec.heads):
        own = head * spec.groups // spec.heads
        q = q_ref[:, head * spec.size : (head + 1) * spec.size]
        k = k_ref[:, own * spec.size : (own + 1) * spec.size]
        v = v_ref[:, own * spec.size : (own + 1) * spec.size]
        s = jax.lax.dot_general(
            q, k, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        s = s * scale[0, 0]
        if padding is not None:  # which may hold anything, NaN included
            is_padding = padding[...] != 0
            s = jnp.where(is_padding, -jnp.inf, s)
            column = jnp.broadcast_to(padding[...].astype(jnp.float32), (LANES, spec.keys)).T[:, :1]
            v = jnp.where(column != 0, 0.0, v.astype(jnp.float32)).astype(v.dtype)
        top = jnp.max(s, axis=1, keepdims=True)
        p = jnp.exp2(s - jnp.where(top > -jnp.inf, top, 0.0))
        total = jnp.sum(p, axis=1, keepdims=True)
        product = jax.lax.dot_general(
            p.astype(v.dtype), v, (((1,), (0,)), ((), ())), precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        out.append(product / jnp.where(total > 0, total, 1.0))
    joined = out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)
    out_ref[...] = joined.astype(out_ref.dtype)


def suits(q: Any, k: Any) -> bool:
    """Whether the kernel serves these shapes and dtypes."""
    try:
        attention_spec(q, k, False)
    except ValueError:
        return False
    return True


def attention_spec(q: Any, k: Any, has_padding: bool) -> AttentionSpec:
    """Blocks for (B, N, H, D) queries and (B, M, G, D) keys.

    Raises:
        ValueError: float16, or keys and values that do not fit in VMEM.
    """
    if str(q.dtype) not in ("float32", "bfloat16"):
        raise ValueError(f"q: expected float32 or bfloat16 with backend 'pallas', got {q.dtype}")
    _, length, heads, size = q.shape
    keys, groups = k.shape[1:3]
    together = LANES // math.gcd(size, LANES)
    if groups != heads or heads % together:
        together = heads
    width = together * size * jnp.dtype(q.dtype).itemsize
    if 4 * keys * width > MOST_BYTES:
        raise ValueError(
            f"k: expected keys and values of a block of {together} heads to fit in VMEM with backend "
            f"'pallas', got {keys} keys of {together} x {size}"
        )
    rows = max(16, min(512, SCORE_BYTES // (4 * keys) // 16 * 16))
    rows = min(rows, -(-length // 16) * 16)
    own = together if groups == heads else groups
    return AttentionSpec(rows, together, own, size, keys, has_padding)


def attention(q: Any, k: Any, v: Any, padding: Any, scale: float) -> Any:
    """(B, N, H, D) from (B, N, H, D) and twice (B, M, G, D)."""
    batch, length, heads, size = q.shape
    if q.size == 0 or k.shape[1] == 0:
        return jnp.zeros(q.shape, q.dtype)
    spec = attention_spec(q, k, padding is not None)
    keys, width = spec.keys, spec.heads * size

    def of_queries(b: Any, h: Any, i: Any) -> Any:
        return b, i, h

    def of_keys(b: Any, h: Any, i: Any) -> Any:
        return b, 0, h

    queries = pl.BlockSpec((None, spec.rows, width), of_queries)
    values = pl.BlockSpec((None, keys, spec.groups * size), of_keys)
    in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM)]
    arguments = [jnp.full((1, 1), scale * LOG2E, jnp.float32)]
    if padding is not None:
        in_specs.append(pl.BlockSpec((None, 1, keys), lambda b, h, i: (b, 0, 0)))
        arguments.append(padding.astype(jnp.int32)[:, None])
    flat = [a.reshape(*a.shape[:2], -1) for a in (q, k, v)]
    item, scores = jnp.dtype(q.dtype).itemsize, batch * heads * length * keys
    needed = 4 * keys * spec.groups * size * item + 4 * spec.rows * (width * item + 3 * keys)
    out = pl.pallas_call(
        functools.partial(attention_kernel, spec=spec),
        grid=(batch, heads // spec.heads, -(-length // spec.rows)),
        in_specs=[*in_specs, queries, values, values],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(flat[0].shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=min(needed + (16 << 20), 60 << 20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * size,
            transcendentals=scores,
            bytes_accessed=item * (2 * q.size + k.size + v.size)
            + (0 if padding is None else 4 * batch * keys),
        ),
        interpret=interpret_params(),
        name="maskgit_attention",
    )(*arguments, *flat)
    return out.reshape(q.shape)
