"""Philox4x32-10 inside a TPU kernel: philox.py's stream in int32, whose products and sums wrap alike.

The vector unit has no high word of a product, so it is put together from products of 16-bit halves.
An exponential variate -log(u) stands for the Gumbel variate -log(-log(u)): races by ratio need no
second logarithm.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1


def _word(value: int) -> Any:
    """The bits of an unsigned word as int32."""
    return np.uint32(value & 0xFFFFFFFF).view(np.int32)


def _shift(x: jax.Array, bits: int) -> jax.Array:
    return jax.lax.shift_right_logical(x, jnp.full(x.shape, bits, jnp.int32))


def _multiply(x: jax.Array, multiplier: int) -> tuple[jax.Array, jax.Array]:
    """High and low words of the unsigned 64-bit product."""
    m_high, m_low = _word(multiplier >> 16), _word(multiplier & 0xFFFF)
    x_high, x_low = _shift(x, 16), x & 0xFFFF
    middle = x_high * m_low + _shift(x_low * m_low, 16)
    cross = x_low * m_high + (middle & 0xFFFF)
    return x_high * m_high + _shift(middle, 16) + _shift(cross, 16), x * _word(multiplier)


def philox4x32(counter: tuple[jax.Array, ...], key: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Ten rounds on four counter words with two key words, int32, broadcast; scalars cost least."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _multiply(c0, MULTIPLIER_0), _multiply(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _word(WEYL_0), k1 + _word(WEYL_1)
    return c0, c1, c2, c3


def exponentials(
    pair: jax.Array, position: jax.Array, step: jax.Array, stream: Any, key: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    """Exponential variates number 2 pair and 2 pair + 1 of a position's stream, float32.

    pair, position and both words of the key are int32, broadcast; step is a scalar.
    """
    w = philox4x32((pair, position, step, jnp.asarray(stream, jnp.int32)), key)
    return _exponential(w[0], w[1]), _exponential(w[2], w[3])


def _exponential(high: jax.Array, low: jax.Array) -> jax.Array:
    """-log of 64 random bits, with both tails."""
    upper = high < 0
    high, low = jnp.where(upper, ~high, high), jnp.where(upper, ~low, low)
    low_part = _shift(low, 16).astype(jnp.float32) * 65536.0 + (low & 0xFFFF).astype(jnp.float32)
    tail = high.astype(jnp.float32) * 2.0**-32 + (low_part + 0.5) * 2.0**-64
    inside = jnp.where(upper, tail, 1.0 - tail)
    lost = jnp.where(upper, 0.0, (inside - 1.0) + tail)  # what rounding took from 1 - tail
    return lost - jnp.log(inside)
