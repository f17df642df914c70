"""Rounding on the host to the dtypes that scores are compared in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def round_to(x: npt.ArrayLike, dtype: str) -> F64:
    """`x` rounded to a floating dtype, back in float64."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(dtype).astype(np.float64)
    with np.errstate(over="ignore"):
        bits = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # to nearest even
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def rounded(value: Any, dtype: str) -> float:
    """One number rounded to a floating dtype."""
    return float(round_to(np.array([value], np.float64), dtype)[0])
