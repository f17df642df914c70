"""Orders in which a grid's positions are committed, for rules whose scores are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ORDERS = ("confidence", "random", "raster", "halton")


def order_scores(order: str, height: int, width: int) -> npt.NDArray[np.float32]:
    """Minus the rank of each position in the order, (height * width,): the first has the highest.

    raster: row by row.  halton: along the two-dimensional low-discrepancy sequence of bases 2 and 3, each
    position at its first visit, so that what is known is spread evenly at every step.

    Raises:
        ValueError: another order.

    Source: J. Halton, Numerische Mathematik 2 (1960); for MaskGIT arXiv 2503.17076.
    """
    count = height * width
    if order == "raster":
        ranks = np.arange(count)
    elif order == "halton":
        ranks = np.empty(count, np.int64)
        ranks[_halton(height, width)] = np.arange(count)
    else:
        raise ValueError(f"order: expected raster or halton, got {order!r}")
    return -ranks.astype(np.float32)


def _halton(height: int, width: int) -> npt.NDArray[np.int64]:
    """Positions by their first visit, (height * width,)."""
    points = np.arange(1, 16 * height * width + 1)
    while True:
        cells = (_radical_inverse(points, 2) * height).astype(int) * width
        cells += (_radical_inverse(points, 3) * width).astype(int)
        found, first = np.unique(cells, return_index=True)
        if len(found) == height * width:
            return found[np.argsort(first)]
        points = np.arange(1, 2 * len(points) + 1)


def _radical_inverse(numbers: npt.NDArray[Any], base: int) -> npt.NDArray[np.float64]:
    """The digits of each number mirrored at the point, in [0, 1)."""
    value, scale = np.zeros(numbers.shape), 1.0
    while numbers.any():
        scale /= base
        value += scale * (numbers % base)
        numbers = numbers // base
    return value
