"""Draw, score and log Z of rows of logits on a TPU: the row is read from HBM once and stays in VMEM.

For a row l (V,) at temperature T the candidate is the winner of three races (reference.py): over
leaves of 128 logits, 16 groups, 8 tokens.  With a reference r near the row's maximum and s = log2(e)/T,

    leaf race    largest  sum_leaf 2^(s (l - r)) / E     E exponential variates: no logarithm of the sum
    log Z        ln 2 (s r + log2 sum 2^(s (l - r)))
    greedy       largest l, each place keeping the first largest it has seen

Layout.  A register is 8 sublanes of 128 lanes.  Logits arrive with rows on sublanes; a sum over lanes
would occupy the cross-lane unit for longer than the memory needs to deliver them.  So each tile of 128
rows x one leaf is turned, and the leaf lies on sublanes, where sums are plain additions and what is
done once for a row or a leaf fills all lanes.  16-bit logits are turned by the matrix unit, times the
identity, which is exact.  Where a block has fewer than 128 rows, each row is dealt out to `parts` lanes,
two leaves in turn to each, and the lanes are merged at the end.

Passes over VMEM.  A first walk takes r from the first tile (for entropies from all) and looks for nothing
odd.  Should a sum of
the block come out as zero, huge or NaN (a NaN, an infinity, a maximum e^38 above r), or does the rule
filter, the block is walked again: for the maxima, for the filters' bounds (pallas_filters.py), then
with cleaned logits.  A last walk collects the winning leaf of each row.

Limits: a block of rows, twice, must fit in VMEM (pallas_tpu.py).  Tokens less likely than e^-87 of
their row enter no sum, nor could they win: a Gumbel variate is at most 45.05.
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

from ..common.philox import STREAM_INNER, STREAM_LEAF
from ..common.philox_pallas import exponentials
from .pallas_filters import find_conditions, survivors

LEAF = LANES = 128
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
FLOAT_MAX = float(np.finfo(np.float32).max)
BIG = 2**31 - 1
PIECE = 32  # sublanes that are worked on together: four registers hide each other's latency
PIECES = LEAF // PIECE
CHUNK = 8  # pairs of tiles of a loop's body, and of a race
SHORT = 1024  # columns of a row whose turned tiles are kept
SEQUENCES = 8  # whose tokens share a block


class Numbers(NamedTuple):
    """What may change from step to step without a new kernel: scalars in SMEM."""

    guidance: Any
    temperature: Any
    draw_scale: Any
    score_scale: Any
    filter_scale: Any
    step: Any


@dataclass(frozen=True)
class RowSpec:
    """What a row kernel is compiled for.

    rows: rows of a block, a multiple of 128 or a power of two below.
    vocab, vocab_start: columns of the block that count, and the id of the first.
    dtype: of the logits.
    guide: 0 no guidance, 1 in float32, 2 with each operation rounded to the logits' dtype.
    banned: columns that are never drawn; filters: of (name, value, whether the temperature divides
        first); below: of top_p_keep.
    draw: "race", "noise" (injected), "greedy" or "greedy_probs".
    score, score_filtered, score_banned, needs_z, rounding: the score; rounding is the dtype it has.
    shared: drawn and scored from one distribution at one temperature.
    held: known positions are scored by the token that they hold; touches_known: they take part.
    """

    rows: int
    vocab: int
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
        """Pairs of tiles of a row: in each, every lane has two leaves."""
        return -(-self.vocab // (2 * self.parts * LEAF))

    @property
    def width(self) -> int:
        """Columns of a block."""
        return self.pairs * 2 * self.parts * LEAF

    @property
    def quick(self) -> bool:
        """Whether a first walk may look for nothing odd."""
        return self.draw in ("race", "greedy") and not self.filters and not self.score_banned


class Words(NamedTuple):
    """What is known of each lane's row, [1, 128] int32; the key may be two scalars."""

    position: Any
    key: tuple[Any, Any]
    live: Any  # whether the row takes part
    own: Any  # the column that it is scored by, or -1


class Stats(NamedTuple):
    """What a walk finds, [1, 128]; None where the rule has no use for it.

    `race`, `leaf`: of each lane; the others of the whole row, in all its lanes.
    """

    race: Any = None
    leaf: Any = None
    token: Any = None
    top: Any = None  # largest logit that may be drawn
    mass: Any = None  # of what is drawn from, relative to the reference
    z: Any = None
    tz: Any = None
    first: Any = None  # the two largest scored logits
    second: Any = None
    check: Any = None  # NaN where the row holds something odd
    waits: Any = (
        None  # of the token race, in sublanes 4 to 7, where the leaf race had no use for them
    )


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
        self.logits, self.uncond, self.noise, self.scratch = refs
        self.at = pl.ds(first, spec.group)
        self.numbers, self.spec = numbers, spec
        self.lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        self.part = self.lane >> spec.group.bit_length() - 1
        self.place = jax.lax.broadcasted_iota(jnp.int32, (LEAF, 1), 0)
        square = (LEAF, LANES)
        across, down = (jax.lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
        self.identity = jnp.where(across == down, 1.0, 0.0).astype(jnp.bfloat16)

    def leaf_of(self, tile: Any) -> jax.Array:
        """Number of the leaf that each lane has in a tile, [1, 128] or of the shape of `tile`."""
        both = 2 * self.spec.parts
        return (tile >> 1) * both + 2 * self.part + (tile & 1)

    def tile(self, number: Any, safe: bool) -> jax.Array:
        """[128 logits, 128 lanes] float32: guided, -inf outside the row and at what is banned.

        Unless `safe`, a row of 16-bit logits with something infinite in it is all NaN.
        """
        spec = self.spec
        refs = [self.logits, self.uncond] if spec.guide else [self.logits]
        x = self.guided(*(self._turned(ref, number, safe) for ref in refs))
        x = self.without(x, self.leaf_of(number), spec.banned, number)
        fixed = isinstance(number, int)
        if fixed and (number // 2 + 1) * 2 * spec.parts * LEAF > spec.vocab:
            x = jnp.where(self.leaf_of(number) * LEAF + self.place < spec.vocab, x, -jnp.inf)
        return x

    def clean(self, number: Any) -> jax.Array:
        """A tile whose NaN are -inf and +inf the largest float."""
        return cleaned(self.tile(number, safe=True))

    def without(
        self, x: jax.Array, leaf: Any, banned: tuple[int, ...], number: Any = None
    ) -> jax.Array:
        """-inf at the banned columns of a leaf; `number`: of the tile, where it is known."""
        for column in banned:
            mine = 2 * (column // (2 * self.spec.parts * LEAF)) + (column // LEAF) % 2
            if not isinstance(number, int) or mine == number:
                x = jnp.where(self.place == column - leaf * LEAF, -jnp.inf, x)
        return x

    def gumbel(self, number: Any) -> jax.Array:
        """The caller's noise at a tile."""
        return self._turned(self.noise, number, safe=True)

    def _tile(self, ref: Any, number: Any) -> jax.Array:
        """A tile as it lies, [128 lanes' rows, 128 logits]."""
        parts = []
        for p in range(self.spec.parts):
            first = ((number >> 1) * 2 * self.spec.parts + 2 * p + (number & 1)) * LEAF
            first = first if isinstance(number, int) else pl.multiple_of(first, LEAF)
            parts.append(ref[self.at, pl.ds(first, LEAF)])
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

    def _turned(self, ref: Any, number: Any, safe: bool) -> jax.Array:
        """A tile with the leaf on sublanes."""
        x = self._tile(ref, number)
        if safe or x.dtype != jnp.bfloat16:
            return x.astype(jnp.float32).T
        contract = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(
            self.identity, x, contract, preferred_element_type=jnp.float32
        )  # fmt: skip

    def collected(self, leaf: jax.Array, safe: bool) -> jax.Array:
        """[128 logits, 128 lanes]: the leaf of each lane that has number `leaf` [1, 128]; cleaned.

        Rows are picked before they are turned, which is one tile to turn instead of all; of a short row
        all tiles are still there from the walk.
        """
        spec = self.spec
        if spec.width <= SHORT:
            short = jnp.full((LEAF, LANES), -jnp.inf)
            for number in range(2 * spec.pairs):
                short = jnp.where(leaf == self.leaf_of(number), self.tile(number, safe), short)
            return cleaned(short)
        wanted = jnp.broadcast_to(leaf, (LANES, LANES)).T
        row = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
        wanted = wanted - 2 * (row >> spec.group.bit_length() - 1)  # of the row's first lane
        refs = [self.logits, self.uncond] if spec.guide else [self.logits]

        def body(number: Any, found: Any) -> Any:
            mine = wanted == (number >> 1) * 2 * spec.parts + (number & 1)
            tiles = [self._tile(ref, number).astype(jnp.float32) for ref in refs]
            return tuple(jnp.where(mine, x, old) for x, old in zip(tiles, found, strict=True))

        nothing = jnp.full((LANES, LEAF), -jnp.inf)
        found = self.over_row(body, (nothing,) * len(refs))
        x = cleaned(self.guided(*(x.T for x in found)))
        x = self.without(x, leaf, spec.banned)
        return jnp.where(leaf * LEAF + self.place < spec.vocab, x, -jnp.inf)

    def guided(self, x: jax.Array, u: jax.Array | None = None) -> jax.Array:
        """u + guidance (x - u); where guide is 2, each operation rounded to the logits' dtype."""
        if u is None:
            return x
        kind = self.spec.dtype if self.spec.guide == 2 else "float32"
        step = round_to(self.numbers.guidance * round_to(x - u, kind), kind)
        return round_to(u + step, kind)

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

    def over_row(self, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """body(tile, carry) over all tiles."""

        def chunk(first: Any, pairs: int, carry: Any) -> Any:
            for tile in range(2 * pairs):
                carry = body(2 * first + tile, carry)
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


def _add(a: Any, b: Any) -> Any:
    return (a[0] + b[0],)


def _larger(a: Any, b: Any) -> Any:
    return (jnp.maximum(a[0], b[0]),)


def _surer(a: Any, b: Any) -> Any:
    """Of (key, index, ...) the one with the larger key, of equal keys the lower index."""
    is_b = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
    return tuple(jnp.where(is_b, y, x) for x, y in zip(a, b, strict=True))


def _two_of(a: Any, b: Any) -> Any:
    """The two largest of two pairs."""
    second = jnp.maximum(jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]))
    return jnp.maximum(a[0], b[0]), second


def _down(values: tuple[Any, ...], merge: Any) -> tuple[Any, ...]:
    """[n, 128] -> [1, 128], sublanes merged two by two."""
    size = values[0].shape[0]
    while size > 8:
        size //= 2
        values = merge(tuple(v[:size] for v in values), tuple(v[size:] for v in values))
    while size > 1:
        size //= 2
        values = merge(values, tuple(pltpu.roll(v, size, 0) for v in values))
    return tuple(v[:1] for v in values)


def scored(x: jax.Array, xf: jax.Array, leaf: Any, number: Any, rows: Rows) -> jax.Array:
    """What the score's softmax is taken over."""
    spec = rows.spec
    return rows.without(xf if spec.score_filtered else x, leaf, spec.score_banned, number)


def _full(value: float, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.full((PIECE, LANES), value, dtype)


def pieces(*arrays: jax.Array) -> Any:
    """(number, piece of each array) by 32 sublanes."""
    for q in range(PIECES):
        yield q, *(a[PIECE * q : PIECE * (q + 1)] for a in arrays)


def _maxima(rows: Rows) -> tuple[jax.Array, jax.Array]:
    """(largest logit, largest finite logit) of each row."""

    def body(number: Any, carry: Any) -> Any:
        top, finite = carry
        for _, x in pieces(rows.tile(number, safe=True)):
            x = jnp.where(x == x, x, -jnp.inf)
            top = jnp.maximum(top, x)
            finite = jnp.maximum(finite, jnp.where(x < jnp.inf, x, -jnp.inf))
        return top, finite

    top, finite = rows.over_row(body, (_full(-jnp.inf),) * 2)
    return jnp.minimum(rows.largest(top), FLOAT_MAX), rows.largest(finite)


def _quick_reference(rows: Rows) -> jax.Array:
    """A logit near the row's maximum, [1, 128]: the first tile's; for an entropy the maximum itself.

    Which is a difference of two sums, and loses bits as the reference leaves the maximum.
    """
    if rows.spec.score != "neg_entropy":
        return rows.largest(rows.tile(0, safe=False))

    def body(number: Any, top: jax.Array) -> jax.Array:
        return functools.reduce(jnp.maximum, [x for _, x in pieces(rows.tile(number, False))], top)

    return rows.largest(rows.over_row(body, _full(-jnp.inf)))


def _largest_scored(rows: Rows, conditions: Any) -> jax.Array:
    def body(number: Any, top: jax.Array) -> jax.Array:
        x, leaf = rows.clean(number), rows.leaf_of(number)
        y = scored(x, survivors(x, leaf, conditions, rows), leaf, number, rows)
        return functools.reduce(jnp.maximum, [v for _, v in pieces(y)], top)

    return rows.largest(rows.over_row(body, _full(-jnp.inf)))


def _better(key: Any, at: Any, best: Any, best_at: Any) -> tuple[jax.Array, jax.Array]:
    """The larger keys and where they are, of equal ones the first."""
    is_better = key > best
    return jnp.where(is_better, key, best), jnp.where(is_better, at, best_at)


def _first_best(best: Any, at: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """(largest key, lowest index that has it), [1, 128], of [32, 128] keys and codes."""
    below = rows.place[:PIECE] + PIECE * (at & PIECES - 1)
    index = rows.leaf_of(at >> PIECES.bit_length() - 1) * LEAF + below
    top = rows.largest(best)
    index = jnp.min(jnp.where(best == top, index, BIG), axis=0, keepdims=True)
    return rows.merged((top, index), _surer)


def _noisy(x: jax.Array, noise: jax.Array, temperature: Any) -> jax.Array:
    """x + temperature g for injected noise; -inf where there is none."""
    y = x + temperature * noise
    return jnp.where((y == y) & (x > -jnp.inf) & (y < jnp.inf), y, -jnp.inf)


def _starts(spec: RowSpec) -> dict[str, jax.Array]:
    """What a walk carries along for each place of a piece."""
    kept = (
        ("z", spec.needs_z and not spec.shared, 0.0),
        ("tz", spec.score == "neg_entropy", 0.0),
        ("mass", spec.draw == "greedy_probs", 0.0),
        ("check", spec.draw == "greedy" and not spec.needs_z, 0.0),
        ("first", spec.score in ("top1_prob", "margin"), -jnp.inf),
        ("second", spec.score == "margin", -jnp.inf),
        ("top", spec.draw != "race", -jnp.inf),
        ("key", spec.draw == "noise", -jnp.inf),
    )
    start = {name: _full(value) for name, is_kept, value in kept if is_kept}
    codes = {f"{name}_at": _full(0, jnp.int32) for name in ("top", "key") if name in start}
    return start | codes


def _walk(
    rows: Rows, words: Any, reference: Any, score_reference: Any, conditions: Any, safe: bool
) -> Stats:
    """One walk over each row, exponentials relative to the references [1, 128]."""
    spec, n = rows.spec, rows.numbers
    race = spec.draw == "race"

    def body(number: Any, carry: dict[str, Any]) -> dict[str, Any]:
        c, leaf = dict(carry), rows.leaf_of(number)
        x = rows.clean(number) if safe else rows.tile(number, safe=False)
        xf = survivors(x, leaf, conditions, rows)
        y = scored(x, xf, leaf, number, rows)
        arrays = (xf, y, rows.gumbel(number)) if spec.draw == "noise" else (xf, y)
        sums = []
        for q, xf, y, *noise in pieces(*arrays):
            if race:
                sums.append(jnp.exp2((xf - reference) * n.draw_scale))
            if "z" in c or "tz" in c:
                t = (y - score_reference) * n.score_scale
                e = jnp.exp2(t)
                if "z" in c:
                    c["z"] += e
                if "tz" in c:
                    c["tz"] += jnp.where(e > 0, e * t, 0.0)
            if "second" in c:
                c["second"] = jnp.maximum(c["second"], jnp.minimum(c["first"], y))
            if "first" in c:
                c["first"] = jnp.maximum(c["first"], y)
            if "mass" in c:
                c["mass"] += jnp.exp2((xf - reference) * LOG2E)
            if "check" in c:
                c["check"] += xf * 0.0
            if "top" in c:
                c["top"], c["top_at"] = _better(xf, number * PIECES + q, c["top"], c["top_at"])
            if "key" in c:
                key = _noisy(xf, noise[0], n.temperature)
                c["key"], c["key_at"] = _better(key, number * PIECES + q, c["key"], c["key_at"])
        if race:
            c["leaf"] = functools.reduce(jnp.add, sums)
        return c

    if race:
        c, found = _race_of_leaves(rows, words, body, _starts(spec))
    else:
        c, found = rows.over_row(body, _starts(spec)), Stats()
        top, token = _first_best(c["top"], c["top_at"], rows)
        if spec.draw == "noise":
            key, chosen = _first_best(c["key"], c["key_at"], rows)
            token = jnp.where(key > -jnp.inf, chosen, token)
        found = found._replace(top=top, token=token)
    for name in ("z", "tz", "mass", "check"):
        if name in c:
            found = found._replace(**{name: rows.total(c[name])})
    if "second" in c:
        first, second = rows.merged(_down((c["first"], c["second"]), _two_of), _two_of)
        found = found._replace(first=first, second=second)
    elif "first" in c:
        found = found._replace(first=rows.largest(c["first"]))
    return found._replace(z=found.mass) if race and "z" not in c else found


def _race_of_leaves(rows: Rows, words: Any, body: Any, carry: Any) -> tuple[Any, Stats]:
    """Walks the row by `body` and races its leaves, 8 pairs for each lane at a time.

    (what body carried, each lane's best ratio and its leaf, the mass of the row.)  A pair of leaves
    uses both variates of a Philox call; rows of at most 8 leaves leave half a call to the token race.
    """
    spec = rows.spec
    sublane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 0)
    spare = spec.pairs * spec.parts <= CHUNK // 2
    waits: Any = None

    def chunk(first: Any, pairs: int, carry: Any) -> Any:
        inner, (ratio, at, mass) = carry
        sums = [jnp.zeros((CHUNK, LANES), jnp.float32)] * 2
        for tile in range(2 * pairs):
            inner = body(2 * first + tile, inner)
            total = jnp.sum(inner.pop("leaf"), axis=0, keepdims=True)
            sums[tile % 2] = jnp.where(sublane == tile // 2, total, sums[tile % 2])
        nonlocal waits
        pair = (sublane + first) * spec.parts + rows.part
        index, stream = pair, jnp.int32(STREAM_LEAF)
        if spare:
            index = jnp.where(sublane < 4, pair, sublane + 4)
            stream = jnp.where(sublane < 4, STREAM_LEAF, STREAM_INNER)
        waits = exponentials(index, words.position, rows.numbers.step, stream, words.key)
        for i in (0, 1):
            ratio, at = _better(sums[i] / waits[i], 2 * pair + i, ratio, at)
        return inner, (ratio, at, mass + sums[0] + sums[1])

    shape = (CHUNK, LANES)
    state = (jnp.full(shape, -1.0), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    carry, (ratio, at, mass) = rows.by_chunks(chunk, (carry, state))
    best = jnp.max(ratio, axis=0, keepdims=True)
    leaf = jnp.min(jnp.where(ratio == best, at, BIG), axis=0, keepdims=True)
    found = Stats(race=best, leaf=leaf, mass=rows.total(mass), waits=waits if spare else None)
    return carry, found


def race_in_leaf(
    x: jax.Array, words: Words, waits: Any, scratch: Any, draw_scale: Any, step: Any
) -> jax.Array:
    """Index within a leaf x [128, 128] of the winner of the group and the token race, [1, 128].

    waits: of the token race in sublanes 4 to 7, if they are there already.
    """
    top = jnp.max(x, axis=0, keepdims=True)
    w = jnp.exp2((x - jnp.where(top > -jnp.inf, top, 0.0)) * draw_scale)
    sublane = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0)

    def draw(pair: jax.Array) -> Any:
        return exponentials(pair, words.position, step, STREAM_INNER, words.key)

    scratch[...] = functools.reduce(jnp.add, [w[16 * i : 16 * i + 16] for i in range(8)])
    sums = [scratch[pl.ds(i, 8, stride=2), :] for i in (0, 1)]
    group = _winner(sums, draw(sublane), sublane)
    mine = jax.lax.broadcasted_iota(jnp.int32, (16, LANES), 0) == group
    pair = sublane if waits is None else sublane - 4
    sums = [jnp.zeros((8, LANES), jnp.float32)] * 2
    for i in range(8):
        own = jnp.sum(jnp.where(mine, w[16 * i : 16 * i + 16], 0.0), axis=0, keepdims=True)
        sums[i % 2] = jnp.where(pair == i // 2, own, sums[i % 2])
    return _winner(sums, draw(pair + 8) if waits is None else waits, pair) * 16 + group


def _winner(sums: Any, waits: Any, pair: jax.Array) -> jax.Array:
    """Number of the largest ratio, [1, 128], of even and odd places; of equal ones the lowest."""
    even, odd = (s / w for s, w in zip(sums, waits, strict=True))
    ratio, at = _better(odd, 2 * pair + 1, even, 2 * pair)
    best = jnp.max(ratio, axis=0, keepdims=True)
    return jnp.min(jnp.where(ratio == best, at, BIG), axis=0, keepdims=True)


def _first_of_probs(rows: Rows, conditions: Any, reference: Any, mass: Any) -> jax.Array:
    """Dream's argmax: the first token whose rounded probability is the largest one's, [1, 128]."""
    kind = rows.spec.rounding
    bound = round_to(1.0 / mass, kind)

    def body(number: Any, first: jax.Array) -> jax.Array:
        leaf = rows.leaf_of(number)
        x = survivors(rows.clean(number), leaf, conditions, rows)
        p = round_to(jnp.exp2((x - reference) * LOG2E) / mass, kind)
        index = jnp.where(p >= bound, leaf * LEAF + rows.place, BIG)
        return jnp.minimum(first, jnp.min(index, axis=0, keepdims=True))

    first = rows.over_row(body, jnp.full((1, LANES), BIG, jnp.int32))
    return rows.merged((first,), lambda a, b: (jnp.minimum(a[0], b[0]),))[0]


def _chosen(
    rows: Rows, words: Any, conditions: Any, found: Stats, safe: bool
) -> tuple[jax.Array, jax.Array]:
    """(column, the logit that its score is of), [1, 128]."""
    spec, own = rows.spec, words.own
    is_own = own >= 0
    race = spec.draw == "race"
    if spec.draw == "greedy" and not spec.held:
        y = found.top
        for column in spec.score_banned:
            y = jnp.where(found.token == column, -jnp.inf, y)
        return found.token, y
    leaf = found.leaf if race else found.token >> 7
    if spec.held:
        leaf = jnp.where(is_own, own >> 7, leaf)
    x = rows.collected(leaf, safe)
    xf = survivors(x, leaf, conditions, rows)
    y = scored(x, xf, leaf, None, rows)
    token = found.token
    if race:
        n = rows.numbers
        inner = race_in_leaf(xf, words, found.waits, rows.scratch, n.draw_scale, n.step)
        token = leaf * LEAF + inner
    if spec.held:
        token = jnp.where(is_own, own, token)
    mine = rows.place == token - leaf * LEAF
    y = jnp.max(jnp.where(mine, y, -jnp.inf), axis=0, keepdims=True)
    if not race:  # the leaf is in one of the row's lanes
        return token, rows.merged((y,), _larger)[0]
    key = found.race
    if spec.held:
        has = (leaf >> 1 & spec.parts - 1) == rows.part
        key = jnp.where(is_own, jnp.where(has, 1.0, 0.0), key)
    _, _, token, y = rows.merged((key, leaf, token, y), _surer)
    return token, y


def score_of(
    y: Any, reference: Any, z: Any, tz: Any, first: Any, second: Any, scale: Any, spec: RowSpec
) -> tuple[Any, Any]:
    """(score of a candidate whose logit is y, log Z), [1, 128], from what Stats says of the row."""
    kind = spec.rounding
    if not spec.needs_z:
        return round_to(y, kind) if spec.score == "logit" else y * 0.0, y * 0.0
    log_sum = jnp.log(z)
    t = (y - reference) * scale
    if spec.score == "logit":
        score = y
    elif spec.score == "prob":
        score = jnp.where(z == 0, 0.0, jnp.exp2(t) / z)
    elif spec.score == "log_prob":
        score = t * LN2 - log_sum
    elif spec.score == "top1_prob":
        score = jnp.exp2((first - reference) * scale) / z
    elif spec.score == "margin":
        one, two = (jnp.exp2((v - reference) * scale) / z for v in (first, second))
        score = round_to(one, kind) - round_to(two, kind)
    elif spec.score == "neg_entropy":
        score = tz * LN2 / z - log_sum
    else:
        score = jnp.zeros_like(z)
    if spec.score != "prob":
        score = jnp.where(z == 0, -jnp.inf, score)
    return round_to(score, kind), reference * scale * LN2 + log_sum


def _odd(found: Stats) -> jax.Array:
    """1 where a quick walk has met what it does not look for."""
    odd = jnp.zeros((1, LANES), jnp.int32)
    for mass in (found.mass, found.z):
        if mass is not None:
            odd = odd | jnp.where((mass > 1e-17) & (mass < 1e17), 0, 1)
    for value in (found.top, found.check):
        if value is not None:
            odd = odd | jnp.where(jnp.abs(value) < jnp.inf, 0, 1)
    return odd


def _group(rows: Rows, words: Any, safe: bool) -> tuple[tuple[Any, Any, Any], jax.Array]:
    """((candidates or -1, scores, log Z), 1 where something odd turned up), [1, 128]."""
    spec = rows.spec
    alive = live = words.live
    if safe:
        top, finite = _maxima(rows)
        alive = live & (finite > -jnp.inf)
        reference = score_reference = jnp.where(top > -jnp.inf, top, 0.0)
        conditions = find_conditions(rows, reference)
        if spec.score_banned:
            shown = _largest_scored(rows, conditions)
            score_reference = jnp.where(shown > -jnp.inf, shown, reference)
    else:
        conditions = ()
        reference = score_reference = _quick_reference(rows)
    found = _walk(rows, words, reference, score_reference, conditions, safe)
    odd = jnp.where(live, 0 if safe else _odd(found), 0)
    if spec.draw == "greedy_probs":
        token = _first_of_probs(rows, conditions, reference, found.mass)
        found = found._replace(token=token)
    token, y = _chosen(rows, words, conditions, found, safe)
    scale = rows.numbers.score_scale
    score, log_z = score_of(
        y, score_reference, found.z, found.tz, found.first, found.second, scale, spec
    )
    drawn = jnp.where(alive, token + spec.vocab_start, -1)
    is_scored = alive
    if spec.held:
        own = words.own
        drawn = jnp.where((own >= 0) & live, own + spec.vocab_start, drawn)
        is_scored = alive & (own < spec.vocab)
    score = jnp.where(is_scored, score, -jnp.inf)
    return (drawn, score, jnp.where(alive, log_z, -jnp.inf)), odd


def _spread(row: jax.Array, first: Any, spec: RowSpec) -> jax.Array:
    """Lanes [first, first + group) of a [1, 128] row, as often as they fit into 128."""
    if spec.parts == 1:
        return row
    row = pltpu.roll(row, (LANES - first) & LANES - 1, 1)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    shift = spec.group
    while shift < LANES:
        row = jnp.where(lane < shift, row, pltpu.roll(row, shift, 1))
        shift *= 2
    return row


def _words(fields: dict[str, Any], key: Any, at: Any, n: Any, length: int, spec: RowSpec) -> Words:
    """What the block's tokens say of rows n [1, 128]; `at`: sublane, first lane, offset in the lanes."""
    sequence, lanes, first = at

    def field(name: str) -> Any:
        if name not in fields:
            return None
        block = fields[name][:, pl.ds(pl.multiple_of(lanes, LANES), LANES)]
        mine = jax.lax.broadcasted_iota(jnp.int32, block.shape, 0) == sequence
        row = jnp.sum(jnp.where(mine, block, 0), axis=0, keepdims=True)
        return _spread(row, first, spec)

    live, own = n < length, jnp.full(n.shape, -1, jnp.int32)
    token, eligible, position = (field(name) for name in ("tokens", "eligible", "positions"))
    if token is not None:
        known = token != spec.mask_token_id
        if not spec.touches_known:
            live = live & ~known
        if spec.held:  # a column outside, on either side, is `vocab`
            column = token - spec.vocab_start
            own = jnp.where(known, jnp.where(column < 0, spec.vocab, column), -1)
    if eligible is not None:
        live = live & (eligible != 0)
    if key is None:
        key = tuple(field(name) for name in ("key0", "key1"))
    return Words(n if position is None else position, key, live, own)


def rows_kernel(
    *refs: Any, spec: RowSpec, names: tuple[str, ...], batch: int, length: int, has_noise: bool,
    keys: str,
) -> None:  # fmt: skip
    """Grid (8 sequences, one of them, a block of its rows): candidates, scores and perhaps log Z.

    After the scalars come a field of the rows for each of `names`, [sequences, N], then logits,
    unconditional logits and noise [rows, width].  keys: "scalars" of a sequence, or "fields" or "none".
    """
    step, scalars, *rest = refs
    seeds = rest.pop(0) if keys == "scalars" else None
    fields, rest = dict(zip(names, rest, strict=False)), rest[len(names) :]
    logits, *rest, scratch = rest
    uncond = rest.pop(0) if spec.guide else None
    noise = rest.pop(0) if has_noise else None
    five = [scalars[0, i] for i in range(5)]
    numbers = Numbers(five[0], five[1], five[2], five[3], five[4], step[0, 0])
    group, sequence, block = (pl.program_id(axis) for axis in range(3))
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    nothing = jnp.zeros((1, LANES), jnp.int32)
    key = None if keys == "fields" else (jnp.int32(0), jnp.int32(0))
    if seeds is not None:
        key = (seeds[sequence, 0], seeds[sequence, 1])

    def some(i: Any, odd: jax.Array, safe: bool) -> jax.Array:
        first = block * spec.rows + i * spec.group
        lanes = first & -LANES
        n = (lane & spec.group - 1) + first
        words = _words(fields, key, (sequence, lanes, first - lanes), n, length, spec)
        at = pl.multiple_of(i * spec.group, spec.group)
        rows = Rows((logits, uncond, noise, scratch), at, numbers, spec)
        results, is_odd = _group(rows, words, safe)
        place = slice(None), pl.ds(pl.multiple_of(lanes, LANES), LANES)
        shape = (rest[0].shape[0], LANES)
        mine = jax.lax.broadcasted_iota(jnp.int32, shape, 0) == sequence
        if spec.parts > 1:
            mine = mine & (lane >= first - lanes) & (lane < first - lanes + spec.group)
        for ref, result in zip(rest, results[: len(rest)], strict=True):
            ref[place] = jnp.where(mine, result, ref[place])
        return odd | is_odd

    def walk(safe: bool) -> jax.Array:
        groups = spec.rows // spec.group
        body = functools.partial(some, safe=safe)
        return jax.lax.fori_loop(0, groups, body, nothing, unroll=min(groups, 2))

    @pl.when(group * SEQUENCES + sequence < batch)
    def _sequence() -> None:
        if not spec.quick:
            walk(safe=True)
            return
        odd = walk(safe=False)

        @pl.when(jnp.max(odd) > 0)
        def _again() -> None:
            walk(safe=True)
