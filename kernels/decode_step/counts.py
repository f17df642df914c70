"""Mask schedules and the number of positions that a step commits.

gamma(r) is the share of positions that stay masked once a share r of the steps is done
(MaskGIT, arXiv 2202.04200, section 3.3).  Everything here is host arithmetic on a few numbers:
it is turned into a small table before the loop starts, so that no step waits for the host.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .spec import StepRule

SCHEDULES = ("linear", "cosine", "square", "cubic", "exp", "sqrt", "log", "arccos")
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
        schedule: linear, cosine, square, cubic, exp, sqrt, log, arccos or pow<x>.
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
    r = np.asarray(ratio, dtype=dt)
    if not bool(np.all((r >= 0) & (r <= 1))):
        raise ValueError(f"ratio: expected values in [0, 1], got {ratio!r}")
    one = dt.type(1)
    power = _POW.fullmatch(schedule)
    u0 = np.maximum(np.asarray(num_masked_at_start, dtype=dt), 2)  # log2(1) = 0 has no schedule
    if schedule == "linear":
        out = one - r
    elif schedule == "cosine":
        out = np.cos(dt.type(math.pi / 2) * r)
    elif schedule == "arccos":
        out = np.arccos(r) / dt.type(math.pi / 2)
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


def masked_count_table(rule: StepRule, step: int, num_steps: int, size: int) -> npt.NDArray[Any]:
    """num_masked_next before clamping, for every count base 0..size: int32 (size + 1,)."""
    dt: np.dtype[Any] = np.dtype(rule.count_dtype)
    base = np.arange(size + 1, dtype=dt)
    ratio = dt.type(step + 1) / dt.type(num_steps)
    product = base * gamma(np.minimum(ratio, 1), rule.schedule, base, dt)
    rounded = {"floor": np.floor, "round": np.rint, "ceil": np.ceil}[rule.count_rounding](product)
    return np.asarray(rounded, dtype=np.int32)


def quota_table(step: int, num_steps: int, size: int) -> npt.NDArray[np.int32]:
    """num_commit for every number of masked positions at start: U0 // T, one more early on."""
    base = np.arange(size + 1)
    return (base // num_steps + (step < base % num_steps)).astype(np.int32)


def time_step_fraction(step: int, num_steps: int, time_eps: float) -> float:
    """Share 1 - s/t of the masked positions that Dream commits; its times run 1 -> time_eps."""
    if step == num_steps - 1:
        return 1.0
    start, end, half = np.float32(1), np.float32(time_eps), (num_steps + 1) // 2
    delta = (end - start) / np.float32(num_steps)

    def time(i: int) -> np.float32:  # torch.linspace in float32 counts from the nearer end
        return (
            start + delta * np.float32(i) if i < half else end - delta * np.float32(num_steps - i)
        )

    return float(np.float32(1) - time(step + 1) / time(step))


def next_masked_counts(
    plan: Any, masked_at_start: npt.NDArray[Any], masked_now: npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """How many positions of each row stay masked, (B,) int64, for a rule with a fixed count.

    `plan` is a `ResolvedStep`; the two arrays are (B,) integers.  This is the written form that
    every backend follows: table look-up, clamp to [1, U - 1], never above U.
    """
    now = np.asarray(masked_now, dtype=np.int64)
    if now.size == 0 or plan.commit_all:
        return np.zeros_like(now)
    if plan.count == "fraction":
        mean = np.float32(now.sum()) / np.float32(now.size)
        return np.asarray(np.maximum(now - int(mean * np.float32(plan.commit_fraction)), 0))
    start = np.asarray(masked_at_start, dtype=np.int64)
    if plan.count == "quota":
        return np.asarray(np.maximum(now - plan.table[start], 0))
    limit = now
    if plan.count_rows == "first":
        start, limit = np.full_like(start, start[0]), np.full_like(now, now[0])
    base = np.full_like(start, plan.table.size - 1) if plan.count_base == "positions" else start
    target = plan.table[base].astype(np.int64)
    if plan.keep_one_masked:
        target = np.maximum(1, np.minimum(limit - 1, target))
    return np.asarray(np.minimum(target, now))


def plan_masked_counts(
    num_masked_at_start: npt.ArrayLike,
    num_steps: int,
    rule: StepRule | str = "maskgit",
    num_positions: int | None = None,
) -> npt.NDArray[np.int64]:
    """Number of masked positions after each step, as a (num_steps, B) int64 array.

    Args:
        num_masked_at_start: masked positions of each sequence before step 0: a scalar or (B,).
        num_steps: T, at least 1.
        rule: a `StepRule` or preset name whose count does not depend on the logits
            (maskgit, amused, titok, llada, dream-* other than dream-origin, ...).
        num_positions: N, the base of rules that count from the sequence length (titok,
            open-muse); by default the largest of `num_masked_at_start`.

    Raises:
        ValueError: an impossible count, or a rule whose counts depend on the model's output
            (threshold, factor) or on chance (dream-origin).

    Semantics: counts hold when confidences have no ties at the cut; the strict and the inclusive
    cut rules mask fewer or more positions where they do.
    """
    from .plan import check_num_steps, resolve
    from .spec import as_rule

    step_rule = as_rule(rule)
    check_num_steps(num_steps)
    start = np.atleast_1d(np.asarray(num_masked_at_start))
    if start.ndim != 1 or start.dtype.kind not in "iu" or (start < 0).any():
        raise ValueError(
            "num_masked_at_start: expected non-negative integers, a scalar or (B,), "
            f"got {num_masked_at_start!r}"
        )
    if step_rule.count not in ("masked", "quota", "fraction"):
        raise ValueError(
            f"rule: the counts of {step_rule.name!r} depend on the logits or on chance "
            f"(count={step_rule.count!r}); expected a rule with count masked, quota or fraction"
        )
    largest = int(start.max(initial=0))
    size = largest if num_positions is None else int(num_positions)
    if size < largest:
        raise ValueError(
            f"num_positions: expected at least the {largest} masked positions, got {num_positions}"
        )
    now, counts = start.astype(np.int64), []
    for step in range(num_steps):
        now = next_masked_counts(resolve(step_rule, step, num_steps, size), start, now)
        counts.append(now)
    return np.stack(counts)
