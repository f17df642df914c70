"""Bidirectional attention in Triton: scores and weights stay on chip.

For one head, Q (N, D), K and V (M, D), s = scale log2(e):

    O = P V / (P 1),    P = 2^(s Q K^T - m),    m the maximum of each row of s Q K^T

Passes.  A program owns a block of queries of one head and walks the keys once, block by block, keeping for
each query the maximum so far, the sum of its weights and the unnormalised output in float32; a new
maximum rescales what is there.  K and V of a head are read by all its programs, from L2.

Head dimensions that are no power of two (48, 72, 96) are cut into the largest power of two and a rest of
at least 16, the depth of a tensor core's product: 48 = 32 + 16, 72 = 64 + 16 (8 of them zeros),
96 = 64 + 32, so that nothing is padded to 64 or 128.  q, k and v are read where they lie: views of one
packed product (B, N, 3, H, D) need no copy, nor does the output's layout (B, N, H, D).

Limits: D at most 256; one row of a head's D elements must be without gaps.  Weights are rounded to the
dtype of v before the second product, as in every flash attention.  Source: arXiv 2205.14135.
"""

# mypy: ignore-errors

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class AttentionSpec:
    """What the kernel is compiled for.

    queries, keys: rows of a block; size: D; main, rest: its two parts, rest 0 for none; group: query heads
    of a key head; even: M is a multiple of `keys`.
    """

    queries: int = 64
    keys: int = 64
    size: int = 64
    main: int = 64
    rest: int = 0
    group: int = 1
    even: bool = False


@triton.jit
def _rows(
    pointer, row, stride, inside, first: tl.constexpr, width: tl.constexpr, size: tl.constexpr
):
    """(rows, width) of columns [first, first + width), zeros outside of the rows and of D."""
    column = first + tl.arange(0, width)
    mask = inside[:, None]
    if first + width > size:
        mask = mask & (column < size)[None, :]
    return tl.load(
        pointer + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0
    )


@triton.jit
def _keep(pointer, row, stride, inside, values, first: tl.constexpr, size: tl.constexpr):
    """Store what `_rows` would load."""
    column = first + tl.arange(0, values.shape[1])
    mask = inside[:, None]
    if first + values.shape[1] > size:
        mask = mask & (column < size)[None, :]
    place = pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(place, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def attention_kernel(
    q, k, v, padding, out, num_queries, num_keys, heads, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, A: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, B H)."""
    block_q: tl.constexpr = A.queries
    block_k: tl.constexpr = A.keys
    main: tl.constexpr = A.main
    rest: tl.constexpr = A.rest
    size: tl.constexpr = A.size
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * block_q + tl.arange(0, block_q)
    live = row < num_queries
    q += batch * q_batch + head * q_head
    k += batch * k_batch + (head // A.group) * k_head
    v += batch * v_batch + (head // A.group) * v_head
    q1 = _rows(q, row, q_row, live, 0, main, size)
    out1 = tl.zeros([block_q, main], tl.float32)
    if rest > 0:
        q2 = _rows(q, row, q_row, live, main, rest, size)
        out2 = tl.zeros([block_q, rest], tl.float32)
    top = tl.full([block_q], -float("inf"), tl.float32)
    total = tl.zeros([block_q], tl.float32)
    for first in range(0, num_keys, block_k):
        key = first + tl.arange(0, block_k)
        inside = key < num_keys
        if padding is not None:  # padding may hold anything, NaN included: it is not read
            pad = tl.load(padding + batch * num_keys + key, mask=inside, other=1)
            inside = inside & (pad == 0)
        k1 = _rows(k, key, k_row, inside, 0, main, size)
        x = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if rest > 0:
            k2 = _rows(k, key, k_row, inside, main, rest, size)
            x = tl.dot(q2, tl.trans(k2), x, input_precision="ieee")
        x = x * scale
        if (padding is not None) or (not A.even):
            x = tl.where(inside[None, :], x, -float("inf"))
        largest = tl.maximum(top, tl.max(x, 1))
        base = tl.where(largest > -float("inf"), largest, 0.0)  # all keys so far may be padding
        weight = tl.exp2(x - base[:, None])
        behind = tl.exp2(top - base)
        total = total * behind + tl.sum(weight, 1)
        weight = weight.to(v.dtype.element_ty)
        v1 = _rows(v, key, v_row, inside, 0, main, size)
        out1 = tl.dot(weight, v1, out1 * behind[:, None], input_precision="ieee")
        if rest > 0:
            v2 = _rows(v, key, v_row, inside, main, rest, size)
            out2 = tl.dot(weight, v2, out2 * behind[:, None], input_precision="ieee")
        top = largest
    share = 1.0 / tl.where(total > 0, total, 1.0)
    out += (batch * num_queries * heads + head) * size
    _keep(out, row, heads * size, live, out1 * share[:, None], 0, size)
    if rest > 0:
        _keep(out, row, heads * size, live, out2 * share[:, None], main, size)
