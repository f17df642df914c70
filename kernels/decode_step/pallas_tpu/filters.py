"""Which tokens survive a rule's filters on a TPU, without a sort: thresholds found by bisection.

Each filter keeps the tokens whose key is above a bound, and of those equal to it the first few.  Keys are
logits, for `typical_p` -|center - x| with the mean of the logits for a center, which orders tokens as
|log p + entropy| does; as signed integers in the order of the floats they have 32 bits.  One walk over the
rows in VMEM for each bit compares the count (top_k) or the mass (top_p, typical_p) above a candidate bound
with what is asked for.  Where only some of several equal tokens fit, the last of them is bisected too, by
its index.

`rows` is tiles.Rows; values of a row are [1, 128], the same in all its lanes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...common.philox import LEAF
from .tiles import Rows, TileNumber

LOG2E = 1.4426950408889634
LOWEST = np.int32(-(2**31))


class Condition(NamedTuple):
    """What a token must satisfy: a key above the bound, or at it and not after `last`."""

    name: str
    reference: Any
    center: Any
    bound: Any
    last: Any


def _ordered(x: jax.Array) -> jax.Array:
    """The bits of a float as a signed integer in the order of the floats; -0 counts as 0."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _key(x: jax.Array, condition: Condition) -> jax.Array:
    if condition.name == "typical_p":
        # no product: fused with the difference in one place and not in another, bits would differ
        distance = jnp.abs(condition.center - (x - condition.reference))
        x = jnp.where(x > -jnp.inf, -distance, x)
    return _ordered(x)


def survivors(x: jax.Array, leaf: Any, conditions: tuple[Condition, ...], rows: Rows) -> jax.Array:
    """Logits [128, 128] of leaf number `leaf` [1, 128] with -inf where a condition fails."""
    for condition in conditions:
        if condition.name == "min_p":
            keep = x >= condition.bound
        else:
            key, index = _key(x, condition), rows.place + leaf * LEAF
            tie = (key == condition.bound) & (index <= condition.last)
            keep = (key > condition.bound) | tie
        x = jnp.where(keep, x, -jnp.inf)
    return x


def _folded(x: jax.Array) -> jax.Array:
    """[128, 128] -> [8, 128], sublanes added up."""
    while x.shape[0] > 8:
        half = x.shape[0] // 2
        x = x[:half] + x[half:]
    return x


def _total(rows: Rows, conditions: Any, measure: Any, size: int) -> tuple[jax.Array, ...]:
    """Sums over each row of `measure(x, index)`, a tuple of `size` arrays [128, 128]."""

    def body(number: TileNumber, sums: Any) -> Any:
        leaf = rows.leaf_of(number.value)
        x = survivors(rows.clean(number), leaf, conditions, rows)
        parts = measure(x, rows.place + leaf * LEAF)
        return tuple(a + _folded(b) for a, b in zip(sums, parts, strict=True))

    sums = rows.over_row(body, (jnp.zeros((8, LEAF), jnp.float32),) * size)
    return tuple(rows.total(a) for a in sums)


def _largest(rows: Rows, conditions: Any) -> jax.Array:
    def body(number: TileNumber, top: jax.Array) -> jax.Array:
        x = survivors(rows.clean(number), rows.leaf_of(number.value), conditions, rows)
        return jnp.maximum(top, jnp.max(x, axis=0, keepdims=True))

    return rows.largest(rows.over_row(body, jnp.full((1, LEAF), -jnp.inf, jnp.float32)))


def _bound(
    rows: Rows,
    conditions: Any,
    reference: jax.Array,
    name: str,
    value: float,
    scale: Any,
    below: bool,
) -> Condition:
    """The condition of one filter, given those before it."""
    zero = reference * 0.0
    if name == "min_p":
        lowest = _largest(rows, conditions)
        if value < 1:
            lowest += jnp.log(zero + value) * LOG2E / scale
        return Condition(name, reference, zero, lowest, None)

    def weight(x: jax.Array) -> jax.Array:
        return jnp.exp2((x - reference) * scale)

    center = zero
    if name == "typical_p":

        def moments(x: jax.Array, index: jax.Array) -> Any:
            e = weight(x)
            return e, jnp.where(e > 0, e * (x - reference), 0.0)

        mass, moment = _total(rows, conditions, moments, 2)
        center = jnp.where(mass > 0, moment / jnp.where(mass > 0, mass, 1.0), 0.0)
    key = Condition(name, reference, center, None, None)

    def above(bound: Any, strict: bool = False) -> jax.Array:
        """Number (top_k) or mass of the survivors with a key at or above the bound."""

        def measure(x: jax.Array, index: jax.Array) -> Any:
            k = _key(x, key)
            taken = ((k > bound) if strict else (k >= bound)) & (x > -jnp.inf)
            return (jnp.where(taken, 1.0 if name == "top_k" else weight(x), 0.0),)

        return _total(rows, conditions, measure, 1)[0]

    bound = jnp.full(reference.shape, LOWEST)
    total = above(bound)
    limit = jnp.minimum(total, float(value)) if name == "top_k" else total * value

    def bit(i: Any, bound: jax.Array) -> jax.Array:
        candidate = bound + jnp.left_shift(jnp.int32(1), 31 - i)
        found = above(candidate)
        return jnp.where((found >= limit) if name == "top_k" else (found > limit), candidate, bound)

    bound = jax.lax.fori_loop(0, 32, bit, bound)
    last = jnp.full(reference.shape, np.int32(2**31 - 1))
    if name != "top_k":
        last = _last_tie(
            rows, conditions, key, bound, weight, limit, above(bound, strict=True), below
        )
    return Condition(name, reference, center, bound, last)


def _last_tie(
    rows: Rows, conditions: Any, key: Condition, bound: jax.Array, weight: Any, limit: jax.Array,
    above: jax.Array, below: bool,
) -> jax.Array:  # fmt: skip
    """Index of the last token that is kept among those whose key is the bound."""

    def equal(x: jax.Array) -> jax.Array:
        return (_key(x, key) == bound) & (x > -jnp.inf)

    def measure(x: jax.Array, index: jax.Array) -> Any:
        hit = equal(x)
        return jnp.where(hit, weight(x), 0.0), jnp.where(hit, 1.0, 0.0)

    mass, count = _total(rows, conditions, measure, 2)
    room = (limit - above) * count / jnp.where(mass > 0, mass, 1.0)
    fit = jnp.floor(jnp.minimum(room, 2.0**30))
    if not (below and key.name == "top_p"):
        fit = fit + 1.0
    fit = jnp.where((above == 0) & (fit < 1), 1.0, fit)
    everything = np.int32(2**31 - 1)

    def search() -> jax.Array:
        def bit(i: Any, last: jax.Array) -> jax.Array:
            """The first index up to which `fit` of the equal tokens lie, from below."""
            candidate = last + jnp.left_shift(jnp.int32(1), bits - 1 - i)

            def up_to(x: jax.Array, index: jax.Array) -> Any:
                return (jnp.where(equal(x) & (index <= candidate), 1.0, 0.0),)

            return jnp.where(_total(rows, conditions, up_to, 1)[0] < fit, candidate, last)

        bits = rows.spec.width.bit_length()
        return jax.lax.fori_loop(0, bits, bit, jnp.full(bound.shape, -1, jnp.int32)) + 1

    some = (fit < count) & (mass > 0)
    needed = jnp.max(jnp.where(some, 1, 0)) > 0
    tie = jax.lax.cond(needed, search, lambda: jnp.full(bound.shape, everything))
    tie = jnp.where(fit < 1, -1, tie)
    return jnp.where(some, tie, everything)


def find_conditions(rows: Rows, reference: jax.Array) -> tuple[Condition, ...]:
    """A condition for each filter, found one after the other; `reference` is the row's maximum."""
    conditions: tuple[Condition, ...] = ()
    for name, value, is_scaled in rows.spec.filters:
        scale = rows.numbers.filter_scale if is_scaled else LOG2E
        new = _bound(rows, conditions, reference, name, value, scale, rows.spec.below)
        conditions = (*conditions, new)
    return conditions
