"""Philox4x32-10 and its Gumbel variates in torch: stream.py's stream, in int64 and float32.

torch has little unsigned arithmetic, so that words are int64 below 2^32.  A product of two words
may wrap around; its low 32 bits and, after the mask, its high 32 bits are right all the same.
"""

from __future__ import annotations

import torch

from .stream import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

_MASK = 0xFFFFFFFF


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Ten rounds on four counter words with two key words, int64 below 2^32, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + WEYL_0) & _MASK, (k1 + WEYL_1) & _MASK
    return c0, c1, c2, c3


def gumbel(
    seeds: torch.Tensor, positions: torch.Tensor, step: int, stream: int, size: int
) -> torch.Tensor:
    """The first `size` standard Gumbel variates of each position's stream, (B, N, size) float32.

    seeds (B, 2) and positions (B, N) are int64 tensors of 32-bit words.
    """
    w = _words(seeds, positions, step, stream, (size + 1) // 2)
    high, low = torch.stack((w[0], w[2]), dim=-1), torch.stack((w[1], w[3]), dim=-1)
    return gumbel_from_words(high, low).flatten(-2)[..., :size]


def integers(
    seeds: torch.Tensor, positions: torch.Tensor, step: int, stream: int, size: int
) -> torch.Tensor:
    """(B, N) uniform integers below `size` < 2^31, from the first 64 bits of each position's stream."""
    high, low, *_ = _words(seeds, positions, step, stream, 1)
    return ((high * size + ((low * size) >> 32)) >> 32)[..., 0]


def _words(
    seeds: torch.Tensor, positions: torch.Tensor, step: int, stream: int, blocks: int
) -> tuple[torch.Tensor, ...]:
    """The four words of the first blocks of each position's stream, each (B, N, blocks)."""
    block = torch.arange(blocks, device=positions.device)
    position = positions.to(torch.int64)[..., None]
    rest = torch.zeros_like(position)
    key = seeds.to(torch.int64)[:, None, None, :]
    return philox4x32((block, position, rest + step, rest + stream), (key[..., 0], key[..., 1]))


def gumbel_from_words(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel variates of 64 random bits each, float32 with both tails."""
    upper = high >= 1 << 31
    high, low = torch.where(upper, high ^ _MASK, high), torch.where(upper, low ^ _MASK, low)
    tail = high.to(torch.float32) * 2.0**-32 + (low.to(torch.float32) + 0.5) * 2.0**-64
    return -torch.log(torch.where(upper, -torch.log(tail), -torch.log1p(-tail)))
