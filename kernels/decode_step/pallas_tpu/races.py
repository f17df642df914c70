"""The races of the draw on a TPU: over leaves as they are walked, then within the winner's 128 logits.

`rows.py` has the derivation.  Sums are divided by exponential variates; what is raced stands on
sublanes, even places and odd ones apart, since a Philox call gives a variate to one of each.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...common.philox import STREAM_INNER, STREAM_LEAF
from ...common.philox.pallas_form import exponentials
from .tiles import BIG, CHUNK, LANES, Rows, TileNumber


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
    near: Any = None  # and a bound on the next smaller one
    mass: Any = None  # of what is drawn from, relative to the reference
    z: Any = None
    tz: Any = None
    first: Any = None  # the two largest scored logits
    second: Any = None
    check: Any = None  # NaN where the row holds something odd
    waits: Any = (
        None  # of the token race, in sublanes 4 to 7, where the leaf race had no use for them
    )


def better(key: Any, at: Any, best: Any, best_at: Any) -> tuple[jax.Array, jax.Array]:
    """The larger keys and where they are, of equal ones the first."""
    is_better = key > best
    return jnp.where(is_better, key, best), jnp.where(is_better, at, best_at)


def race_of_leaves(rows: Rows, words: Any, body: Any, carry: Any) -> tuple[Any, Stats]:
    """Walks the row by `body` and races its leaves, 8 pairs for each lane at a time.

    (what body carried, each lane's best ratio and its leaf, the mass of the row.)  A pair of leaves
    uses both variates of a Philox call: of a row in several lanes those are neighbours' leaves of one
    tile, so lanes with an even part draw for two of the first tile of a pair, the others for two of the
    second, and they exchange.  Rows of at most 8 leaves leave half a call to the token race.
    """
    spec = rows.spec
    odd = rows.part & 1
    call = rows.part if spec.parts == 1 else (rows.part >> 1) + odd * (spec.parts >> 1)
    sublane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 0)
    spare = spec.pairs * spec.parts <= CHUNK // 2
    waits: Any = None

    def chunk(first: Any, pairs: int, carry: Any) -> Any:
        inner, (ratio, at, mass) = carry
        sums = [jnp.zeros((CHUNK, LANES), jnp.float32)] * 2
        for tile in range(2 * pairs):
            inner = body(TileNumber(2 * first, tile), inner)
            total = jnp.sum(inner.pop("leaf"), axis=0, keepdims=True)
            sums[tile % 2] = jnp.where(sublane == tile // 2, total, sums[tile % 2])
        nonlocal waits
        pair = (sublane + first) * spec.parts + call
        index, stream = pair, jnp.int32(STREAM_LEAF)
        if spare:
            index = jnp.where(sublane < 4, pair, sublane + 4)
            stream = jnp.where(sublane < 4, STREAM_LEAF, STREAM_INNER)
        waits = exponentials(index, words.position, rows.numbers.step, stream, words.key)
        own, leaf = waits, 2 * pair
        if spec.parts > 1:
            own, leaf = _exchanged(waits, odd, spec.group), rows.leaf_of(2 * (sublane + first))
        for i in (0, 1):
            ratio, at = better(sums[i] / own[i], leaf + i * spec.parts, ratio, at)
        return inner, (ratio, at, mass + sums[0] + sums[1])

    shape = (CHUNK, LANES)
    state = (jnp.full(shape, -1.0), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    carry, (ratio, at, mass) = rows.by_chunks(chunk, (carry, state))
    best = jnp.max(ratio, axis=0, keepdims=True)
    leaf = jnp.min(jnp.where(ratio == best, at, BIG), axis=0, keepdims=True)
    found = Stats(race=best, leaf=leaf, mass=rows.total(mass), waits=waits if spare else None)
    return carry, found


def _exchanged(waits: Any, odd: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """(even, odd leaf's) variates of a call, [8, 128] -> those of a lane's leaf in two tiles."""
    even_leaf, odd_leaf = waits
    first = jnp.where(odd == 0, even_leaf, pltpu.roll(odd_leaf, group, 1))
    return first, jnp.where(odd == 0, pltpu.roll(even_leaf, LANES - group, 1), odd_leaf)


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
    ratio, at = better(odd, 2 * pair + 1, even, 2 * pair)
    best = jnp.max(ratio, axis=0, keepdims=True)
    return jnp.min(jnp.where(ratio == best, at, BIG), axis=0, keepdims=True)
