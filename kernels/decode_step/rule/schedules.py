"""Mask schedules, as functions of numbers alone.

gamma(r) is the share of positions that stay masked once a share r of the steps is done
(MaskGIT, arXiv 2202.04200, section 3.3).  Everything here is host arithmetic on a few numbers:
plan.py turns it into a small table before the loop starts, so that no step waits for the host.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

SCHEDULES = ("linear", "cosine", "sine", "square", "cubic", "exp", "sqrt", "log", "arccos")
_POW = re.compile(r"pow(\d+(?:\.\d*)?|\.\d+)$")
_FLOOR = 1e-6  # google-research/maskgit clips its ratios to [1e-6, 1]


def check_schedule(schedule: str) -> str:
    """Return `schedule` if it is a legal name, else raise ValueError with the legal names."""
    match = _POW.fullmatch(schedule) if isinstance(schedule, str) else None
    if schedule in SCHEDULES or (match and float(match[1]) > 0):
        return schedule
    raise ValueError(
        f"schedule: expected one of {', '.join(SCHEDULES)} or pow<x> with x > 0 "
        f"(for example pow1.5), got {schedule!r}"
    )


def gamma(
    ratio: npt.ArrayLike,
    schedule: str = "cosine",
    num_masked_at_start: npt.ArrayLike = 256,
    dtype: npt.DTypeLike = np.float64,
) -> npt.NDArray[np.floating[Any]]:
    """Share of positions still masked when a share `ratio` of the steps is done.

    Args:
        ratio: progress in [0, 1], any shape; step i of T has ratio (i + 1) / T when it ends.
        schedule: linear, cosine, square, cubic, exp, sqrt, log, arccos or pow<x>; sine is the cosine
            in the form sin((1 - r) pi/2), which rounds differently.
        num_masked_at_start: U0, broadcast against `ratio`; only `exp` and `log` depend on it.
        dtype: arithmetic of the result, float32 where the followed codebase counts in float32.

    Returns:
        Array of `dtype`, clipped to [1e-6, 1], decreasing in `ratio`.  gamma(0) = 1, except for
        exp, 1 - 1/U0.  gamma(1) is the floor 1e-6.

    Raises:
        ValueError: unknown schedule, or a ratio outside [0, 1].

    Source: MaskGIT section 3.3 and google-research/maskgit `mask_schedule.py`; arccos from
    valeoai/Maskgit-pytorch.
    """
    check_schedule(schedule)
    dt: np.dtype[Any] = np.dtype(dtype)
    r, left = np.asarray(ratio, dtype=dt), np.asarray(1 - np.asarray(ratio, np.float64), dtype=dt)
    if not bool(np.all((r >= 0) & (r <= 1))):
        raise ValueError(f"ratio: expected values in [0, 1], got {ratio!r}")
    one = dt.type(1)
    power = _POW.fullmatch(schedule)
    u0 = np.maximum(np.asarray(num_masked_at_start, dtype=dt), 2)  # log2(1) = 0 has no schedule
    if schedule == "linear":
        out = one - r
    elif schedule == "cosine":
        out = _rounded(np.cos, dt.type(math.pi / 2) * r)
    elif schedule == "sine":
        out = _rounded(np.sin, left * dt.type(math.pi) / dt.type(2))
    elif schedule == "arccos":
        out = _rounded(np.arccos, r) / dt.type(math.pi / 2)
    elif schedule == "sqrt":
        out = one - np.sqrt(r)
    elif schedule == "exp":
        out = one - np.exp2(-np.log2(u0) * (one - r))
    elif schedule == "log":
        out = -np.log2(np.maximum(r, np.finfo(dt).tiny)) / np.log2(u0)
    else:
        exponent = {"square": 2.0, "cubic": 3.0}.get(schedule) or float(power[1])  # type: ignore[index]
        out = one - r ** dt.type(exponent)
    return np.asarray(np.clip(out, dt.type(_FLOOR), one), dtype=dt)


def _rounded(function: Any, x: Any) -> Any:
    """A function of float32 arguments rounded correctly: NumPy's own differs between machines."""
    return np.asarray(function(np.asarray(x, np.float64)), dtype=np.asarray(x).dtype)


def linspace(start: float, end: float, count: int, i: int) -> np.float32:
    """Entry `i` of torch.linspace in float32, which counts from the nearer end."""
    low, high = np.float32(start), np.float32(end)
    step = float((high - low) / np.float32(max(count - 1, 1)))
    if i < count // 2:  # torch rounds the product and the sum together
        return np.float32(float(low) + step * i)
    return np.float32(float(high) - step * (count - 1 - i))
