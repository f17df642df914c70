"""Counter-based randomness: Philox4x32-10, and the Gumbel variates made from it.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a keyed
bijection on 128-bit counters.  The whole library draws from one stream, so that a token depends on
its sequence's seed, position, step and logits and on nothing else:

    key     = the sequence's 64-bit seed, low word first
    counter = (block, position, step, stream)

Each block gives four 32-bit words, hence two variates: variate 2b uses words (0, 1) of block b as
(high, low), variate 2b + 1 words (2, 3).  A variate is a standard Gumbel g = -log E with E
exponential, from w = (high * 2^32 + low + 1/2) / 2^64:

    E = -log1p(-w)  if w < 1/2,     E = -log(1 - w) with 1 - w made from the inverted bits otherwise

so both tails keep full relative precision, in float32 too: g runs from -3.8 to 45.05.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

# the partition of a row that its races run over: leaves of 128 logits, 16 groups of 8 in each
LEAF, GROUPS, PER_GROUP = 128, 16, 8

STREAM_LEAF = 0  # one variate per leaf of 128 logits
STREAM_INNER = 1  # variates 0..15 for the groups of the chosen leaf, 16..23 for its tokens
STREAM_CHOICE = 2  # variate 0: noise on the confidence, random scores, Bernoulli commits
STREAM_REPLACE = (
    3  # an id in the place of a token that is thrown away, where there is no mask token
)

Words = npt.NDArray[np.uint64]
_MASK = np.uint64(0xFFFFFFFF)


def philox4x32(
    counter: tuple[npt.ArrayLike, ...], key: tuple[npt.ArrayLike, ...]
) -> tuple[Words, ...]:
    """Ten rounds on four counter words with two key words, broadcast: four uint64 arrays."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) & _MASK for c in counter)
    k0, k1 = (np.asarray(k, dtype=np.uint64) & _MASK for k in key)
    shift = np.uint64(32)
    for _ in range(ROUNDS):
        p0, p1 = c0 * np.uint64(MULTIPLIER_0), c2 * np.uint64(MULTIPLIER_1)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & _MASK, (p0 >> shift) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + np.uint64(WEYL_0)) & _MASK, (k1 + np.uint64(WEYL_1)) & _MASK
    return c0, c1, c2, c3


def seed_words(seeds: npt.NDArray[Any]) -> tuple[Words, Words]:
    """Key words, low and high, of 64-bit seeds of any integer dtype and shape."""
    bits = seeds.astype(np.uint64) if seeds.dtype.kind == "u" else seeds.astype(np.int64)
    bits = bits.view(np.uint64)
    return bits & _MASK, bits >> np.uint64(32)


def gumbel(
    key: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    index: npt.ArrayLike,
    position: npt.ArrayLike,
    step: int,
    stream: int,
) -> npt.NDArray[np.float64]:
    """Standard Gumbel variates number `index` of a position's stream, broadcast, in float64."""
    i = np.asarray(index, dtype=np.uint64)
    words = philox4x32((i >> np.uint64(1), position, step, stream), key)
    odd = (i & np.uint64(1)).astype(bool)
    high, low = np.where(odd, words[2], words[0]), np.where(odd, words[3], words[1])
    return gumbel_from_words(high, low)


def gumbel_from_words(high: Words, low: Words) -> npt.NDArray[np.float64]:
    """Standard Gumbel variates of 64 random bits each."""
    upper = high >= np.uint64(1 << 31)
    high, low = np.where(upper, high ^ _MASK, high), np.where(upper, low ^ _MASK, low)
    tail = high.astype(np.float64) * 2.0**-32 + (low.astype(np.float64) + 0.5) * 2.0**-64
    with np.errstate(divide="ignore"):
        exponential = np.where(upper, -np.log(tail), -np.log1p(-tail))
    return -np.log(exponential)
