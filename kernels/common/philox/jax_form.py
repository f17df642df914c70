"""Philox4x32-10 and its Gumbel variates in jax.numpy: stream.py's stream, in uint32 and float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .stream import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

_U32 = jnp.uint32


def _multiply(x: jax.Array, multiplier: int) -> tuple[jax.Array, jax.Array]:
    """High and low words of a 64-bit product, by 16-bit halves."""
    m_high, m_low = _U32(multiplier >> 16), _U32(multiplier & 0xFFFF)
    x_high, x_low = x >> 16, x & 0xFFFF
    middle = x_high * m_low + (x_low * m_low >> 16)
    cross = x_low * m_high + (middle & 0xFFFF)
    return x_high * m_high + (middle >> 16) + (cross >> 16), x * _U32(multiplier)


def philox4x32(counter: tuple[jax.Array, ...], key: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Ten rounds on four counter words with two key words, uint32, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _multiply(c0, MULTIPLIER_0), _multiply(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _U32(WEYL_0), k1 + _U32(WEYL_1)
    return c0, c1, c2, c3


def gumbel(
    seeds: jax.Array, positions: jax.Array, step: int, stream: int, size: int, first: Any = 0
) -> jax.Array:
    """`size` standard Gumbel variates of each position's stream from `first` on, (B, N, size) float32.

    seeds (B, 2) and positions (B, N) are uint32 words.
    """
    whole = isinstance(first, int) and first == 0
    block = jnp.arange((size + 1) // 2 + (0 if whole else 1), dtype=_U32)
    if not whole:
        block = block + jnp.asarray(first).astype(_U32) // 2
    position = jnp.asarray(positions).astype(_U32)[..., None]
    key = jnp.asarray(seeds).astype(_U32)[:, None, None, :]
    w = philox4x32((block, position, _U32(step), _U32(stream)), (key[..., 0], key[..., 1]))
    high, low = jnp.stack((w[0], w[2]), axis=-1), jnp.stack((w[1], w[3]), axis=-1)
    pairs = gumbel_from_words(high, low)
    flat = pairs.reshape(*pairs.shape[:-2], 2 * pairs.shape[-2])
    return flat[..., :size] if whole else jax.lax.dynamic_slice_in_dim(flat, first % 2, size, -1)


def gumbel_from_words(high: jax.Array, low: jax.Array) -> jax.Array:
    """Standard Gumbel variates of 64 random bits each, float32 with both tails."""
    upper = high >= _U32(1 << 31)
    high, low = jnp.where(upper, ~high, high), jnp.where(upper, ~low, low)
    tail = high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) + 0.5) * 2.0**-64
    return -jnp.log(jnp.where(upper, -jnp.log(tail), -jnp.log1p(-tail)))
