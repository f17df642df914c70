"""How logits get into registers: tiles of whole leaves, 16 bytes a load, whatever the strides.

A tile is [R, C, VEC]: R leaves (of one row or several), each of C chunks of VEC logits, one chunk a
load of 16 bytes.  A row that does not start at a multiple of 16 bytes (2025 columns of which 1024
are used) is read from the multiple before it: place p of the tile holds logit p - shift, and the few
logits of other rows at its ends become -inf.  The aligned 16 bytes around a logit are always there
to be read.  Unaligned rows thus cost one more chunk, not a load for each logit.

What is read is a `Source`, where a tile's rows lie a `Place`.
"""

# mypy: ignore-errors

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...common.philox.triton_form import LEAF
from ...common.triton_tools import FLOAT_MAX, rounded_to


class Source(NamedTuple):
    """The logits of a call, with and without a condition: pointers, strides of columns, and the rest."""

    logits: Any
    uncond: Any
    stride: Any
    uncond_stride: Any
    vocab: Any
    guidance: Any
    mask_column: Any


class Place(NamedTuple):
    """Where the rows of a tile start, in elements, each [R, 1, 1].

    shift: places between the tile's first and the row's; live: whether a row is walked.
    """

    row: Any
    uncond_row: Any
    shift: Any
    live: Any


@dataclass(frozen=True)
class RowSpec:
    """What a row kernel is compiled for: the tile, the layout of the logits, the rule.

    rows, leaves, vec: rows of a program, leaves of each in a tile, logits of a load; splits:
        programs that share a row.
    dense: a row's logits are neighbours; shifted: rows may start at any element; ragged: the last
        chunk of a row may be partly outside.
    guide: 0 no guidance, 1 in float32, 2 u + S (c - u), 3 c + s (c - u), 4 S c - s u with each
        operation rounded to the logits' dtype; twin: rows without a condition lie as far from a
        multiple of 16 bytes as those with one.
    banned, ban_mask: columns that are never drawn.
    filters: of (kind, value, whether the temperature divides first), see filters.py; bits:
        how many of a key's bits can differ; below: of top_p_keep.
    draw: "race", "noise" (injected), "greedy" or "greedy_probs".
    score, score_filtered, score_banned, needs_z, wide, rounding: the score; wide is in float64;
        rounding is "float32", "float64" or "logits".
    shared: drawn and scored from one distribution at one temperature.
    held: known positions are scored by the token that they hold; touches_known: they take part.
    """

    rows: int = 1
    leaves: int = 32
    vec: int = 8
    splits: int = 1
    dense: bool = True
    shifted: bool = False
    ragged: bool = False
    guide: int = 0
    twin: bool = False
    banned: tuple[int, ...] = ()
    ban_mask: bool = False
    filters: tuple[tuple[int, float, bool], ...] = ()
    bits: int = 32
    below: bool = False
    draw: str = "race"
    score: str = "log_prob"
    score_filtered: bool = False
    score_banned: tuple[int, ...] = ()
    needs_z: bool = True
    wide: bool = False
    rounding: str = "float32"
    shared: bool = True
    held: bool = False
    touches_known: bool = False

    @property
    def quick(self) -> bool:
        """Whether a first walk may look for nothing odd."""
        return self.draw in ("race", "greedy") and not self.filters and not self.score_banned


@triton.jit
def guided(x, u, guidance, kind: tl.constexpr, spec: tl.constexpr):
    """u + guidance (x - u); where guide is 2 or more, in its form, each operation rounded to `kind`."""
    if spec.guide == 1:
        return tl.fma(x - u, guidance, u)  # one rounding, whatever the compiler joins
    elif spec.guide == 4:
        product = rounded_to(tl.fma(x, guidance, 0.0), kind)
        return rounded_to(product - rounded_to(tl.fma(u, guidance - 1.0, 0.0), kind), kind)
    else:
        difference = rounded_to(x - u, kind)
        weight = guidance if spec.guide == 2 else guidance - 1.0
        product = rounded_to(tl.fma(difference, weight, 0.0), kind)
        start = u if spec.guide == 2 else x
        return rounded_to(start + product, kind)


@triton.jit
def cleaned(x):
    """NaN as -inf, +inf as the largest float."""
    return tl.minimum(tl.where(x == x, x, -float("inf")), FLOAT_MAX)


@triton.jit
def without(x, index, first, stop, mask_column, spec: tl.constexpr):
    """-inf at what is banned, looked for only where the tile's columns [first, stop) may hold it."""
    banned: tl.constexpr = spec.banned
    for i in tl.static_range(len(banned)):
        if (first <= banned[i]) & (banned[i] < stop):
            x = tl.where(index == banned[i], -float("inf"), x)
    if spec.ban_mask:
        if (first <= mask_column) & (mask_column < stop):
            x = tl.where(index == mask_column, -float("inf"), x)
    return x


@triton.jit
def tile(source, at, leaf, chunks: tl.constexpr, spec: tl.constexpr, safe: tl.constexpr):
    """(logits [R, chunks, VEC] float32, their indices) of `leaves` leaves from `leaf` on.

    Of each leaf the first `chunks` chunks.  Guided and without what is banned; -inf outside the
    row.  safe: cleaned of NaN and infinity.
    """
    leaves: tl.constexpr = spec.leaves
    vec: tl.constexpr = spec.vec
    R: tl.constexpr = spec.rows * leaves
    logits, uncond, stride, uncond_stride, vocab, guidance, mask_column = source
    row, uncond_row, shift, live = at
    leaf += vocab * 0  # a tensor in the interpreter too
    number = leaf + tl.arange(0, R) % leaves
    chunk = number[:, None, None] * LEAF + (tl.arange(0, chunks) * vec)[None, :, None]
    index = chunk + tl.arange(0, vec)[None, None, :] - shift
    # [R, chunks * VEC] for the loads: with three axes Triton 3.6 gives neighbouring lanes other leaves
    p = number[:, None] * LEAF + tl.arange(0, chunks * vec)[None, :]
    row, uncond_row = tl.reshape(row, [R, 1]), tl.reshape(uncond_row, [R, 1])
    begins, live = tl.reshape(shift, [R, 1]), tl.reshape(live, [R, 1])
    place = p - begins
    inside = live & (place < vocab)
    pointers = logits + (row + p.to(tl.int64) * stride)
    if spec.dense:  # each chunk starts at a multiple of 16 bytes, all of which are there
        inside = live & (p // vec * vec < vocab + begins)
        pointers = tl.multiple_of(pointers, [1, 16])
    raw = tl.load(pointers, mask=inside, other=-float("inf"))
    x = tl.reshape(raw, [R, chunks, vec]).to(tl.float32)
    if spec.guide > 0:
        if spec.twin:
            pointers = tl.multiple_of(uncond + (uncond_row - begins + p), [1, 16])
        else:
            pointers = uncond + (uncond_row + place.to(tl.int64) * uncond_stride)
            if spec.ragged:
                inside = inside & (place >= 0) & (place < vocab)
        u = tl.reshape(tl.load(pointers, mask=inside, other=0.0), [R, chunks, vec])
        x = guided(x, u.to(tl.float32), guidance, raw.dtype, spec)
    first, stop = leaf * LEAF, (leaf + leaves) * LEAF
    if spec.ragged:
        if (leaf == 0) | (stop > vocab):
            x = tl.where((index >= 0) & (index < vocab), x, -float("inf"))
    if safe:
        x = cleaned(x)
    return without(x, index, first - vec, stop, mask_column, spec), index


@triton.jit
def elements(source, row, uncond_row, index, wanted, spec: tl.constexpr):
    """Single logits, cleaned: those at `index` of the rows that start at `row`, of any one shape."""
    logits, uncond, stride, uncond_stride, vocab, guidance, mask_column = source
    inside = wanted & (index >= 0) & (index < vocab)
    raw = tl.load(logits + (row + index.to(tl.int64) * stride), mask=inside, other=-float("inf"))
    x = raw.to(tl.float32)
    if spec.guide > 0:
        u = tl.load(
            uncond + (uncond_row + index.to(tl.int64) * uncond_stride), mask=inside, other=0.0
        )
        x = tl.where(inside, guided(x, u.to(tl.float32), guidance, raw.dtype, spec), x)
    return without(cleaned(x), index, 0, vocab, mask_column, spec)
