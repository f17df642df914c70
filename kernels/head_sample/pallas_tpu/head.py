"""The head's product with the draw in its epilogue, on a TPU: logits never leave VMEM.

For hidden rows H (R, D) and the head's W (V, D), bias c: tiles of logits, turned, come straight from the
matrix unit,

    T = W[tile] H^T + c[tile]          (tile, R): a leaf of 128 tokens on sublanes, rows on lanes

and each tile is folded into what a row has so far, relative to the largest logit r that it has seen:

    mass <- mass 2^(s (r - r')) + sum 2^(s (l - r'))
    race    the best ratio of a leaf's mass to its exponential variate, and that leaf's 128 logits
    greedy  the largest logit and its number

After the last tile the leaf's inner races give the token (decode_step/pallas_tpu/rows.py has the derivation
of the draw and the layout).  Grid: (blocks of rows, tiles of the vocabulary, blocks of D); W is read once
for each block of rows, up to 512 of them.  Blocks behind the last row that takes part do nothing.

In VMEM: a tile of logits, the rows' statistics, 128 logits a row.  Limits: no filters, no injected noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...common.philox import LEAF, STREAM_LEAF
from ...common.philox.pallas_form import exponentials
from ...decode_step.pallas_tpu.races import Words, race_in_leaf
from ...decode_step.pallas_tpu.rows import score_of
from ...decode_step.pallas_tpu.tiles import BIG, FLOAT_MAX, LANES, RowSpec

REFERENCE, RATIO, AT, Z, TZ, FIRST, SECOND, FINITE, STATS = range(9)


@dataclass(frozen=True)
class HeadSpec:
    """What the head's kernel is compiled for.

    rows: of a block, a multiple of 128; tile: tokens of a tile, a multiple of 256; depth: hidden units
    of a block; row: the rule's half of it (decode_step/pallas_tpu/tiles.py), of which vocab is V.
    """

    rows: int
    tile: int
    depth: int
    has_bias: bool
    row: RowSpec


class _Refs(NamedTuple):
    """What the kernel reads and writes."""

    integers: Any
    scalars: Any
    words: Any
    bias: Any
    drawn: Any
    score: Any
    log_z: Any
    logits: Any  # [tile, rows]
    stats: Any  # [STATS, rows]
    leaf: Any  # [128, rows]
    scratch: Any


class _Lanes:
    """128 rows of the block, and what they have so far."""

    def __init__(self, refs: _Refs, at: Any, spec: HeadSpec) -> None:
        self.refs, self.at, self.spec, self.row = refs, at, spec, spec.row
        self.stats = [refs.stats[k : k + 1, at] for k in range(STATS)]
        self.draw_scale, self.score_scale = refs.scalars[0, 2], refs.scalars[0, 3]
        words = [refs.words[0, k : k + 1, at] for k in range(4)]
        self.words = Words(words[0], (words[1], words[2]), words[3] > 0, None)

    def fold(self, tile: Any) -> None:
        """Take a tile of logits in."""
        leaves = [self._leaf(i, tile) for i in range(self.spec.tile // LEAF)]
        old, new = self.stats, list(self.stats)
        new[FINITE] = functools.reduce(
            jnp.maximum, [_top(jnp.where(x < jnp.inf, x, -jnp.inf)) for x in leaves], old[FINITE]
        )
        leaves = [jnp.minimum(x, FLOAT_MAX) for x in leaves]
        new[REFERENCE] = functools.reduce(jnp.maximum, map(_top, leaves), old[REFERENCE])
        r = jnp.where(new[REFERENCE] > -jnp.inf, new[REFERENCE], 0.0)
        behind = jnp.where(old[REFERENCE] > -jnp.inf, old[REFERENCE] - r, -jnp.inf)
        if self.row.draw == "race":
            self._race(leaves, r, behind * self.draw_scale, tile, new)
        else:
            self._argmax(leaves, tile, new)
        if self.row.needs_z:
            self._sums(leaves, r, behind * self.score_scale, new)
        if self.row.score in ("top1_prob", "margin"):
            self._pair(leaves, new)
        for k in range(STATS):
            self.refs.stats[k : k + 1, self.at] = new[k]

    def _leaf(self, i: int, tile: Any) -> jax.Array:
        """Leaf i of a tile, [128, 128]: with its bias, -inf for NaN, outside V and where banned."""
        x = self.refs.logits[i * LEAF : (i + 1) * LEAF, self.at]
        if self.refs.bias is not None:
            bias = self.refs.bias[:, i * LEAF : (i + 1) * LEAF].astype(jnp.float32)
            x = x + jnp.broadcast_to(bias, (LEAF, LANES)).T
        place = jax.lax.broadcasted_iota(jnp.int32, (LEAF, 1), 0)
        index = tile * self.spec.tile + i * LEAF + place
        keep = (index < self.row.vocab) & (x == x)
        for column in self.row.banned:
            keep = keep & (index != column)
        return jnp.where(keep, x, -jnp.inf)

    def _race(self, leaves: list[jax.Array], r: Any, shift: Any, tile: Any, new: Any) -> None:
        """The best of the leaves' ratios and of the one so far, whose leaf is kept."""
        weight = jnp.exp2(shift)
        sums = [_sum(jnp.exp2((x - r) * self.draw_scale)) for x in leaves]
        ratio, at = self.stats[RATIO], self.stats[AT]
        ratio, found = jnp.where(ratio < 0, ratio, ratio * weight), self.refs.leaf[:, self.at]
        pairs, w = len(leaves) // 2, self.words
        pair = jax.lax.broadcasted_iota(jnp.int32, (pairs, LANES), 0) + tile * pairs
        waits = exponentials(pair, w.position, self.refs.integers[0, 0], STREAM_LEAF, w.key)
        for i, x in enumerate(leaves):
            key = sums[i] / waits[i % 2][i // 2 : i // 2 + 1]
            better = key > ratio
            ratio, found = jnp.where(better, key, ratio), jnp.where(better, x, found)
            at = jnp.where(better, (tile * len(leaves) + i).astype(jnp.float32), at)
        new[RATIO], new[AT] = ratio, at
        self.refs.leaf[:, self.at] = found

    def _argmax(self, leaves: list[jax.Array], tile: Any, new: Any) -> None:
        best, at = self.stats[RATIO], self.stats[AT]
        place = jax.lax.broadcasted_iota(jnp.int32, (LEAF, LANES), 0)
        for i, x in enumerate(leaves):
            top = _top(x)
            first = jnp.min(jnp.where(x == top, place, BIG), axis=0, keepdims=True)
            index = (first + (tile * len(leaves) + i) * LEAF).astype(jnp.float32)
            best, at = jnp.where(top > best, top, best), jnp.where(top > best, index, at)
        new[RATIO], new[AT] = best, at

    def _sums(self, leaves: list[jax.Array], r: Any, shift: Any, new: Any) -> None:
        """Sums of exp(t) and t exp(t), t relative to r."""
        weight, old = jnp.exp2(shift), self.stats
        total, moment = old[Z] * weight, jnp.zeros_like(weight)
        if self.row.score == "neg_entropy":
            kept = weight * (old[TZ] + jnp.where(weight > 0, shift, 0.0) * old[Z])
            moment = jnp.where(weight > 0, kept, 0.0)
        for x in leaves:
            t = (x - r) * self.score_scale
            e = jnp.exp2(t)
            total = total + _sum(e)
            if self.row.score == "neg_entropy":
                moment = moment + _sum(jnp.where(e > 0, e * t, 0.0))
        new[Z], new[TZ] = total, moment

    def _pair(self, leaves: list[jax.Array], new: Any) -> None:
        first, second = self.stats[FIRST], self.stats[SECOND]
        place = jax.lax.broadcasted_iota(jnp.int32, (LEAF, LANES), 0)
        for x in leaves:
            top = _top(x)
            at = jnp.min(jnp.where(x == top, place, BIG), axis=0, keepdims=True)
            rest = _top(jnp.where(place == at, -jnp.inf, x))
            second = jnp.maximum(jnp.minimum(first, top), jnp.maximum(second, rest))
            first = jnp.maximum(first, top)
        new[FIRST], new[SECOND] = first, second

    def finish(self) -> None:
        """Candidates, scores and log Z."""
        s, refs, row = self.stats, self.refs, self.row
        alive = self.words.live & (s[FINITE] > -jnp.inf)
        reference = jnp.where(s[REFERENCE] > -jnp.inf, s[REFERENCE], 0.0)
        token, y = s[AT].astype(jnp.int32), s[RATIO]
        if row.draw == "race":
            x = refs.leaf[:, self.at]
            step = refs.integers[0, 0]
            inner = race_in_leaf(x, self.words, None, refs.scratch, self.draw_scale, step)
            token = token * LEAF + inner
            mine = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == inner
            y = _top(jnp.where(mine, x, -jnp.inf))
        score, log_z = score_of(
            y, reference, s[Z], s[TZ], s[FIRST], s[SECOND], self.score_scale, row
        )
        refs.drawn[0, :, self.at] = jnp.where(alive, token + row.vocab_start, -1)
        refs.score[0, :, self.at] = jnp.where(alive, score, -jnp.inf)
        refs.log_z[0, :, self.at] = jnp.where(alive, log_z, -jnp.inf)


def _top(x: jax.Array) -> jax.Array:
    return jnp.max(x, axis=0, keepdims=True)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, keepdims=True)


def _start(refs: _Refs, spec: HeadSpec) -> None:
    """Statistics of rows that have seen no logit."""
    lowest = {RATIO: -1.0 if spec.row.draw == "race" else -jnp.inf, AT: 0.0, Z: 0.0, TZ: 0.0}
    for k in range(STATS):
        refs.stats[k : k + 1, :] = jnp.full((1, spec.rows), lowest.get(k, -jnp.inf), jnp.float32)
    refs.leaf[...] = jnp.full((LEAF, spec.rows), -jnp.inf, jnp.float32)


def head_kernel(*given: Any, spec: HeadSpec, tiles: int, depths: int) -> None:
    """Grid (blocks of rows, tiles, blocks of D): candidates, scores and log Z, [1, rows]."""
    integers, scalars, words, hidden, weight, *rest = given
    bias = rest.pop(0) if spec.has_bias else None
    refs = _Refs(integers, scalars, words, bias, *rest)
    block, tile, depth = (pl.program_id(axis) for axis in range(3))

    def each_lanes(body: Callable[[_Lanes], None]) -> None:
        def one(i: Any, nothing: Any) -> Any:
            body(_Lanes(refs, pl.ds(pl.multiple_of(i * LANES, LANES), LANES), spec))
            return nothing

        jax.lax.fori_loop(0, spec.rows // LANES, one, 0)

    @pl.when(block * spec.rows < integers[0, 1])
    def _block() -> None:
        precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
        product = jax.lax.dot_general(
            weight[...], hidden[...], (((1,), (1,)), ((), ())), precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        refs.logits[...] = (
            product if depths == 1 else jnp.where(depth == 0, product, refs.logits[...] + product)
        )

        @pl.when(depth == depths - 1)
        def _tile() -> None:
            pl.when(tile == 0)(functools.partial(_start, refs, spec))
            each_lanes(lambda lanes: lanes.fold(tile))

            @pl.when(tile == tiles - 1)
            def _last() -> None:
                each_lanes(lambda lanes: lanes.finish())
