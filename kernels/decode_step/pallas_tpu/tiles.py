"""How logits get into registers on a TPU: tiles of 128 rows x one leaf, turned, from a block in VMEM.

`rows.py` has the layout and why.  A tile is [128 logits of a leaf, 128 lanes], float32.  With fewer
than 128 rows in a block each row is dealt out to `parts` lanes: tile k gives lane part p the leaf
parts k + p.  Of 4 or 8 rows whose V is a multiple of 128 that is how memory holds them, since its own
tiles are as high as there are rows: such a block comes as (leaves, rows, 128), and a tile in one piece.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...common.philox import LEAF
from ...common.simulation import is_simulating

LANES = 128
FLOAT_MAX = float(np.finfo(np.float32).max)
BIG = 2**31 - 1
PIECE = 32  # sublanes that are worked on together: four registers hide each other's latency
PIECES = LEAF // PIECE
CHUNK = 8  # pairs of tiles of a loop's body, and of a race
SHORT = 1024  # columns of a row whose turned tiles are kept


class Numbers(NamedTuple):
    """What may change from step to step without a new kernel: scalars in SMEM."""

    guidance: Any
    temperature: Any
    draw_scale: Any
    score_scale: Any
    filter_scale: Any
    step: Any


class TileNumber(NamedTuple):
    """start + at, where `start` may be a loop's: one address for all tiles of a turn, and constants."""

    start: Any
    at: int

    @property
    def value(self) -> Any:
        """The number."""
        return self.start + self.at

    @property
    def is_known(self) -> bool:
        """Whether it is, when the kernel is compiled."""
        return isinstance(self.start, int)


@dataclass(frozen=True)
class RowSpec:
    """What a row kernel is compiled for.

    rows: rows of a block, a multiple of 128 or a power of two below.
    packed: the block is (leaves, rows, 128), as memory holds 4 or 8 rows.
    vocab, vocab_start: columns of the block that count, and the id of the first.
    dtype: of the logits.
    guide: 0 no guidance, 1 in float32, 2 u + S (c - u), 3 c + s (c - u), 4 S c - s u with each
        operation rounded to the logits' dtype.
    banned: columns that are never drawn; filters: of (name, value, whether the temperature divides
        first); below: of top_p_keep.
    draw: "race", "noise" (injected), "greedy" or "greedy_probs".
    score, score_filtered, score_banned, needs_z, rounding: the score; rounding is the dtype it has.
    shared: drawn and scored from one distribution at one temperature.
    held: known positions are scored by the token that they hold; touches_known: they take part.
    """

    rows: int
    vocab: int
    packed: bool = False
    mask_token_id: int = -1
    vocab_start: int = 0
    dtype: str = "bfloat16"
    guide: int = 0
    banned: tuple[int, ...] = ()
    filters: tuple[tuple[str, float, bool], ...] = ()
    below: bool = False
    draw: str = "race"
    score: str = "log_prob"
    score_filtered: bool = False
    score_banned: tuple[int, ...] = ()
    needs_z: bool = True
    rounding: str = "float32"
    shared: bool = True
    held: bool = False
    touches_known: bool = False

    @property
    def group(self) -> int:
        """Rows that are walked together."""
        return min(self.rows, LANES)

    @property
    def parts(self) -> int:
        """Lanes that share a row."""
        return LANES // self.group

    @property
    def pairs(self) -> int:
        """Pairs of tiles of a row, of which every lane has two leaves."""
        return -(-self.vocab // (2 * self.parts * LEAF))

    @property
    def width(self) -> int:
        """Columns of a block."""
        return self.pairs * 2 * self.parts * LEAF

    @property
    def is_bfloat16(self) -> bool:
        """Whether what is drawn from are numbers in bfloat16."""
        return self.dtype == "bfloat16" and self.guide != 1

    @property
    def quick(self) -> bool:
        """Whether a first walk may look for nothing odd."""
        return self.draw != "noise" and not self.filters and not self.score_banned


def round_to(x: jax.Array, dtype: str) -> jax.Array:
    """Float32 `x` rounded to `dtype`: bfloat16 by its bits, since a conversion there and back may go."""
    if dtype != "bfloat16":
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    odd = jax.lax.shift_right_logical(bits, jnp.full(x.shape, 16, jnp.int32)) & 1
    up = jax.lax.bitcast_convert_type((bits + 0x7FFF + odd) & np.int32(-65536), jnp.float32)
    return jnp.where(x == x, up, x)


def cleaned(x: jax.Array) -> jax.Array:
    """NaN as -inf, +inf as the largest float."""
    return jnp.minimum(jnp.where(x == x, x, -jnp.inf), FLOAT_MAX)


class Rows:
    """128 lanes' share of a block in VMEM, read tile by tile."""

    def __init__(self, refs: Any, first: Any, numbers: Numbers, spec: RowSpec) -> None:
        *logits, self.scratch = refs
        self.logits, self.uncond, self.noise = (
            _as_list(ref) if spec.packed and ref is not None else ref for ref in logits
        )
        self.at = pl.ds(first, spec.group)
        self.numbers, self.spec = numbers, spec
        self.lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        self.part = self.lane >> spec.group.bit_length() - 1
        self.place = jax.lax.broadcasted_iota(jnp.int32, (LEAF, 1), 0)
        square = (LEAF, LANES)
        across, down = (jax.lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
        self.identity = jnp.where(across == down, 1.0, 0.0).astype(jnp.bfloat16)

    def leaf_of(self, number: Any) -> jax.Array:
        """Number of the leaf that each lane has in a tile, [1, 128] or of the shape of `number`."""
        return number * self.spec.parts + self.part

    def tile(self, number: TileNumber, safe: bool) -> jax.Array:
        """[128 logits, 128 lanes] float32: guided, -inf outside the row and at what is banned.

        Unless `safe`, a row of 16-bit logits with something infinite in it is all NaN.
        """
        spec = self.spec
        refs = [self.logits, self.uncond] if spec.guide else [self.logits]
        x = self.guided(*(self.turned(ref, number, safe) for ref in refs))
        leaf = self.leaf_of(number.value)
        x = self.without(x, leaf, spec.banned, number)
        if self._ends_in(number):
            x = jnp.where(leaf * LEAF + self.place < spec.vocab, x, -jnp.inf)
        return x

    def _ends_in(self, number: TileNumber) -> bool:
        """Whether the row ends in this tile, which is then one of those that are known by number."""
        if not number.is_known:
            return False
        return bool((number.value + 1) * self.spec.parts * LEAF > self.spec.vocab)

    def may_be_infinite(self, number: TileNumber) -> bool:
        """Whether -inf is put into a tile, or comes with its logits and does not make the row NaN."""
        spec = self.spec
        return spec.dtype != "bfloat16" or bool(spec.banned) or self._ends_in(number)

    def clean(self, number: TileNumber) -> jax.Array:
        """A tile whose NaN are -inf and +inf the largest float."""
        return cleaned(self.tile(number, safe=True))

    def without(
        self, x: jax.Array, leaf: Any, banned: tuple[int, ...], number: TileNumber | None = None
    ) -> jax.Array:
        """-inf at the banned columns of a leaf; `number`: of its tile."""
        known = number.value if number is not None and number.is_known else None
        for column in banned:
            if known is None or column // LEAF // self.spec.parts == known:
                x = jnp.where(self.place == column - leaf * LEAF, -jnp.inf, x)
        return x

    def gumbel(self, number: TileNumber) -> jax.Array:
        """The caller's noise at a tile."""
        return self.turned(self.noise, number, safe=True)

    def _tile(self, ref: Any, number: TileNumber) -> jax.Array:
        """A tile as it lies, [128 lanes' rows, 128 logits]."""
        spec, start, at = self.spec, number.start, number.at
        words = LANES // 2 if ref.dtype == jnp.int32 else LANES
        size = words if spec.packed else spec.parts * LEAF
        turn: Any = slice(None)
        if number.is_known:
            at += start
        else:
            turn = pl.ds(pl.multiple_of(start * size, size), 2 * CHUNK * size)
        if spec.packed:
            x = ref.at[turn][pl.ds(at * size, size)]
            return pltpu.bitcast(x, jnp.bfloat16) if ref.dtype == jnp.int32 else x
        ref = ref.at[self.at, turn]
        parts = [ref[:, pl.ds(at * size + p * LEAF, LEAF)] for p in range(spec.parts)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

    def turned(self, ref: Any, number: TileNumber, safe: bool) -> jax.Array:
        """A tile with the leaf on sublanes."""
        return self._turn(self._tile(ref, number), safe)

    def _turn(self, x: jax.Array, safe: bool) -> jax.Array:
        if safe or x.dtype != jnp.bfloat16:
            return x.astype(jnp.float32).T
        contract = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(
            self.identity, x, contract, preferred_element_type=jnp.float32
        )  # fmt: skip

    def rough_maximum(self) -> jax.Array:
        """The largest logit of each row, [1, 128], if nothing is odd: from tiles as they lie, turned once.

        Of two 16-bit logits in a word the upper is compared with the lower for more digits, which are
        cut off in the end, and the lower moved up.
        """
        spec, turned = self.spec, []
        if spec.guide or spec.banned:

            def body(number: TileNumber, top: jax.Array) -> jax.Array:
                return functools.reduce(
                    jnp.maximum, [x for _, x in pieces(self.tile(number, False))], top
                )

            return self.largest(self.over_row(body, jnp.full((PIECE, LANES), -jnp.inf)))

        is_packed = spec.dtype == "bfloat16"

        def words(number: TileNumber, tops: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            if self._ends_in(number):
                turned.append(self.tile(number, safe=False))
                return tops
            x = self._tile(self.logits, number)
            if is_packed:
                x = pltpu.bitcast(x, jnp.int32)
                both = (x, x << 16)
                return tuple(
                    jnp.maximum(top, jax.lax.bitcast_convert_type(half, jnp.float32))
                    for top, half in zip(tops, both, strict=True)
                )
            return (jnp.maximum(tops[0], x),)

        lowest = jnp.full((LANES >> is_packed, LEAF), -FLOAT_MAX)
        tops = self.over_row(words, (lowest,) * (1 + is_packed))
        if is_packed:
            upper, lower = (jax.lax.bitcast_convert_type(top, jnp.int32) for top in tops)
            lower = jax.lax.shift_right_logical(lower, jnp.full(lower.shape, 16, jnp.int32))
            tops = (pltpu.bitcast(upper & np.int32(-65536) | lower, jnp.bfloat16),)
        turned.append(self._turn(tops[0], safe=False))
        return self.largest(functools.reduce(jnp.maximum, turned))

    def collected(self, leaf: jax.Array, safe: bool) -> jax.Array:
        """[128 logits, 128 lanes]: the leaf of each lane that has number `leaf` [1, 128]; cleaned.

        Rows are picked before they are turned, which is one tile to turn instead of all; of a short row
        all tiles are still there from the walk.
        """
        spec = self.spec
        if spec.width <= SHORT:
            short = jnp.full((LEAF, LANES), -jnp.inf)
            for number in range(2 * spec.pairs):
                x = self.tile(TileNumber(0, number), safe)
                short = jnp.where(leaf == self.leaf_of(number), x, short)
            return cleaned(short)
        wanted = jnp.broadcast_to(leaf, (LANES, LANES)).T
        row = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
        wanted = wanted - (row >> spec.group.bit_length() - 1)  # of the row's first lane
        refs = [self.logits, self.uncond] if spec.guide else [self.logits]

        def body(number: TileNumber, found: Any) -> Any:
            mine = wanted == number.value * spec.parts
            tiles = [self._tile(ref, number).astype(jnp.float32) for ref in refs]
            return tuple(jnp.where(mine, x, old) for x, old in zip(tiles, found, strict=True))

        nothing = jnp.full((LANES, LEAF), -jnp.inf)
        found = self.over_row(body, (nothing,) * len(refs))
        x = cleaned(self.guided(*(x.T for x in found)))
        x = self.without(x, leaf, spec.banned)
        return jnp.where(leaf * LEAF + self.place < spec.vocab, x, -jnp.inf)

    def guided(self, x: jax.Array, u: jax.Array | None = None) -> jax.Array:
        """u + guidance (x - u); where guide is 2 or more, in its form, each operation rounded."""
        if u is None:
            return x
        guide, kind, scale = self.spec.guide, self.spec.dtype, self.numbers.guidance
        if guide == 1:
            return u + scale * (x - u)

        def product(a: Any, b: jax.Array) -> jax.Array:
            rounded = round_to(a * b, kind)  # the choice keeps it from being joined with the sum
            return rounded if kind == "bfloat16" else jnp.where(rounded == 0, 0.0, rounded)

        if guide == 4:
            return round_to(product(scale, x) - product(scale - 1, u), kind)
        start, weight = (x, scale - 1) if guide == 3 else (u, scale)
        return round_to(start + product(weight, round_to(x - u, kind)), kind)

    def by_chunks(self, chunk: Callable[[Any, int, Any], Any], carry: Any) -> Any:
        """chunk(first pair of tiles, how many, carry) over the row; by number where it ends raggedly."""
        spec = self.spec
        whole = spec.vocab // (2 * spec.parts * LEAF)
        loops = whole // CHUNK if spec.pairs > 2 * CHUNK else 0
        if loops:
            carry = jax.lax.fori_loop(0, loops, lambda i, c: chunk(i * CHUNK, CHUNK, c), carry)
        for first in range(loops * CHUNK, spec.pairs, CHUNK):
            carry = chunk(first, min(CHUNK, spec.pairs - first), carry)
        return carry

    def over_row(self, body: Callable[[TileNumber, Any], Any], carry: Any) -> Any:
        """body(number, carry) over all tiles."""

        def chunk(first: Any, pairs: int, carry: Any) -> Any:
            for tile in range(2 * pairs):
                carry = body(TileNumber(2 * first, tile), carry)
            return carry

        return self.by_chunks(chunk, carry)

    def merged(self, values: tuple[Any, ...], merge: Any) -> tuple[Any, ...]:
        """The values of all lanes of a row, merged two by two, in each of them."""
        shift = self.spec.group
        while shift < LANES:
            values = merge(values, tuple(pltpu.roll(v, shift, 1) for v in values))
            shift *= 2
        return values

    def total(self, x: jax.Array) -> jax.Array:
        """[n, 128] -> [1, 128], the sum over the row."""
        return self.merged((jnp.sum(x, axis=0, keepdims=True),), _add)[0]

    def largest(self, x: jax.Array) -> jax.Array:
        """[n, 128] -> [1, 128], the maximum over the row."""
        return self.merged((jnp.max(x, axis=0, keepdims=True),), _larger)[0]


def _as_list(ref: Any) -> Any:
    """A block (leaves, rows, 128) as (leaves x rows, 128), of 16-bit logits as words of two of them."""
    if is_simulating():  # which knows no such views: the block comes as a list
        return ref
    leaves, rows, _ = ref.shape
    ref = ref.reshape(leaves * rows, LEAF)
    return ref.bitcast(jnp.int32) if ref.dtype == jnp.bfloat16 else ref


def _add(a: Any, b: Any) -> Any:
    return (a[0] + b[0],)


def _larger(a: Any, b: Any) -> Any:
    return (jnp.maximum(a[0], b[0]),)


def surer(a: Any, b: Any) -> Any:
    """Of (key, index, ...) the one with the larger key, of equal keys the lower index."""
    is_b = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
    return tuple(jnp.where(is_b, y, x) for x, y in zip(a, b, strict=True))


def two_of(a: Any, b: Any) -> Any:
    """The two largest of two pairs."""
    second = jnp.maximum(jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]))
    return jnp.maximum(a[0], b[0]), second


def down(values: tuple[Any, ...], merge: Any) -> tuple[Any, ...]:
    """[n, 128] -> [1, 128], sublanes merged two by two."""
    size = values[0].shape[0]
    while size > 8:
        size //= 2
        values = merge(tuple(v[:size] for v in values), tuple(v[size:] for v in values))
    while size > 1:
        size //= 2
        values = merge(values, tuple(pltpu.roll(v, size, 0) for v in values))
    return tuple(v[:1] for v in values)


def pieces(*arrays: jax.Array) -> Any:
    """(number, piece of each array) by 32 sublanes."""
    for q in range(PIECES):
        yield q, *(a[PIECE * q : PIECE * (q + 1)] for a in arrays)
