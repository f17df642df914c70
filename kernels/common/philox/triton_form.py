"""Philox4x32-10 and its exponential variates in Triton: stream.py's stream, in uint32 and float32."""

# Triton's own language is not typed
# mypy: ignore-errors

import triton
import triton.language as tl

from . import stream as philox

MULTIPLIER_0 = tl.constexpr(philox.MULTIPLIER_0)
MULTIPLIER_1 = tl.constexpr(philox.MULTIPLIER_1)
WEYL_0, WEYL_1 = tl.constexpr(philox.WEYL_0), tl.constexpr(philox.WEYL_1)
ROUNDS = tl.constexpr(philox.ROUNDS)
LEAF = tl.constexpr(philox.LEAF)
STREAM_LEAF = tl.constexpr(philox.STREAM_LEAF)
STREAM_INNER = tl.constexpr(philox.STREAM_INNER)
STREAM_CHOICE = tl.constexpr(philox.STREAM_CHOICE)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on four counter words with two key words, uint32 of one shape."""
    for _ in tl.static_range(ROUNDS):
        high0, low0 = tl.umulhi(c0, MULTIPLIER_0), c0 * MULTIPLIER_0
        high1, low1 = tl.umulhi(c2, MULTIPLIER_1), c2 * MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + WEYL_0, k1 + WEYL_1
    return c0, c1, c2, c3


@triton.jit
def exponential(index, position, step, stream, k0, k1):
    """Exponential variate number `index` of a position's stream, float32 with both tails.

    index int32; position, k0, k1 uint32; all of one shape.  -log of it is the Gumbel variate.
    """
    zero = position * 0
    step_word, stream_word = zero + step.to(tl.uint32), zero + stream
    w0, w1, w2, w3 = philox4x32(
        (index >> 1).to(tl.uint32), position, step_word, stream_word, k0, k1
    )
    odd = (index & 1) == 1
    high, low = tl.where(odd, w2, w0), tl.where(odd, w3, w1)
    upper = high >= 0x80000000
    high, low = tl.where(upper, ~high, high), tl.where(upper, ~low, low)
    tail = high.to(tl.float32) * 2.0**-32 + (low.to(tl.float32) + 0.5) * 2.0**-64
    inside = tl.where(upper, tail, 1.0 - tail)
    lost = tl.where(upper, 0.0, (inside - 1.0) + tail)  # what rounding took from 1 - tail
    return lost - tl.log(inside)


@triton.jit
def over(mass, wait):
    """mass / wait: the square of a reciprocal root, one special instruction, not ten for a division."""
    root = tl.rsqrt(wait)
    return mass * root * root


@triton.jit
def key_words(seeds, row):
    """Both key words of 64-bit seeds[row]."""
    seed = tl.load(seeds + row).to(tl.int64)
    return (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
