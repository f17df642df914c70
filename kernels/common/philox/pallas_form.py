"""Exponential variates inside a TPU kernel: stream.py's, from the rounds of jax_form.py.

-log(u) stands for the Gumbel variate -log(-log(u)): races by ratio need no second logarithm.  Words go in
and come out as int32, which is what the vector unit compares and converts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .jax_form import philox4x32


def _unsigned(x: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.int32), jnp.uint32)


def exponentials(
    pair: jax.Array, position: jax.Array, step: jax.Array, stream: Any, key: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    """Exponential variates number 2 pair and 2 pair + 1 of a position's stream, float32.

    pair, position and both words of the key are int32, broadcast; step is a scalar, and scalars cost least.
    """
    counter = tuple(_unsigned(word) for word in (pair, position, step, stream))
    words = philox4x32(counter, (_unsigned(key[0]), _unsigned(key[1])))
    w = [jax.lax.bitcast_convert_type(word, jnp.int32) for word in words]
    return _exponential(w[0], w[1]), _exponential(w[2], w[3])


def _exponential(high: jax.Array, low: jax.Array) -> jax.Array:
    """-log of 64 random bits, with both tails."""
    upper = high < 0
    high, low = jnp.where(upper, ~high, high), jnp.where(upper, ~low, low)
    above = jax.lax.shift_right_logical(low, jnp.full(low.shape, 16, jnp.int32))
    low_part = above.astype(jnp.float32) * 65536.0 + (low & 0xFFFF).astype(jnp.float32)
    tail = high.astype(jnp.float32) * 2.0**-32 + (low_part + 0.5) * 2.0**-64
    inside = jnp.where(upper, tail, 1.0 - tail)
    lost = jnp.where(upper, 0.0, (inside - 1.0) + tail)  # what rounding took from 1 - tail
    return lost - jnp.log(inside)
