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

SCHEDULES = ("linear", "cosine", "sine", "square", "cubic", "exp", "sqrt", "log", "arccos")
_POW = re.compile(r"pow(\d+(?:\.\d*)?|\.\d+)$")
_MOST_COUNTS = 1 << 26  # half a gigabyte of them
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


def done_ratio(rule: StepRule, step: int, num_steps: int) -> np.floating[Any]:
    """Share of the steps that are done when `step` ends, in the rule's arithmetic."""
    dt: np.dtype[Any] = np.dtype(np.float64 if rule.schedule == "sine" else rule.count_dtype)
    if rule.count_ratio == "step":
        done: np.floating[Any] = np.minimum(dt.type(step + 1) / dt.type(num_steps), dt.type(1))
        return done
    if rule.count_ratio == "linspace":
        return np.float32(linspace(0.0, 1.0, num_steps + 1, step + 1))
    return np.float32(linspace(0.0, 1.0, num_steps, min(step + 1, num_steps - 1)))


def linspace(start: float, end: float, count: int, i: int) -> np.float32:
    """Entry `i` of torch.linspace in float32, which counts from the nearer end."""
    low, high = np.float32(start), np.float32(end)
    step = float((high - low) / np.float32(max(count - 1, 1)))
    if i < count // 2:  # torch rounds the product and the sum together
        return np.float32(float(low) + step * i)
    return np.float32(float(high) - step * (count - 1 - i))


def masked_count_table(rule: StepRule, step: int, num_steps: int, size: int) -> npt.NDArray[Any]:
    """num_masked_next before clamping, for every count base 0..size: int32 (size + 1,)."""
    dt: np.dtype[Any] = np.dtype(rule.count_dtype)
    base = np.arange(size + 1, dtype=dt)
    product = base * gamma(done_ratio(rule, step, num_steps), rule.schedule, base, dt)
    rounded = {"floor": np.floor, "round": np.rint, "ceil": np.ceil}[rule.count_rounding](product)
    return np.asarray(rounded, dtype=np.int32)


def quota_table(step: int, num_steps: int, size: int) -> npt.NDArray[np.int32]:
    """num_commit for every number of masked positions at start: U0 // T, one more early on."""
    base = np.arange(size + 1)
    return (base // num_steps + (step < base % num_steps)).astype(np.int32)


def commit_share(rule: StepRule, step: int, num_steps: int) -> float:
    """Share of the masked positions that a "fraction" or "bernoulli" step commits: 1 - m(s)/m(t).

    m is how much is masked at a time; the step goes from time t down to s.  Grids: Dream's and
    MDLM's linspace(1, time_eps, T + 1) in float32 with m(t) = t; md4's t = (T - i)/T with the
    schedule and a clip, or the cosine of it; BD3LM's linspace(1, 0, T) with s = t - 1/T.
    """
    last = step == num_steps - 1
    if last and (rule.count == "fraction" or rule.last_step == "all"):
        return 1.0
    if rule.time_grid == "linspace":
        t, s = mask_times(rule, step, num_steps)
        return float(np.float32(1) - s / t)
    if rule.time_grid == "ancestral":
        if last:
            return 1.0
        return (num_steps - 1) / (num_steps * (num_steps - 1 - step))
    before, after = ((num_steps - i) / num_steps for i in (step, step + 1))
    if rule.time_grid == "cosine":
        before, after = (math.cos(math.pi / 2 * (1 - x)) for x in (before, after))
    clip = rule.time_clip

    def masked(time: float) -> float:
        return (1 - 2 * clip) * float(gamma(1 - time, rule.schedule)) + clip

    return 1.0 - masked(after) / masked(before)


def mask_times(rule: StepRule, step: int, num_steps: int) -> tuple[np.float32, np.float32]:
    """(t, s) of a step on the grid linspace(1, time_eps, T + 1) in float32."""
    before, after = (linspace(1.0, rule.time_eps, num_steps + 1, i) for i in (step, step + 1))
    return before, after


def remask_chances(rule: StepRule, step: int, num_steps: int) -> tuple[float, float]:
    """ReMDM's (chance to mask a known token again, chance to commit a masked position).

    With a = 1 - t before and b = 1 - s after the step and chance r, masked positions commit with
    (b - (1 - r) a) / (1 - a).  For "conf" the first is an upper bound, shared out over the
    positions by their scores.  "loop" unmasks down to time remask_on as MDLM does, revises at the
    constant level remask_alpha down to remask_off, and then unmasks the rest.  arXiv 2503.00307.
    """
    width = (1.0 - rule.time_eps) / num_steps
    t = 1.0 + (rule.time_eps - 1.0) * step / num_steps
    a, b, kind, eta = 1 - t, 1 - (t - width), rule.remask, rule.remask_eta
    if kind == "loop" and t > rule.remask_on:
        slope = rule.remask_alpha / (1 - rule.remask_on)
        return 0.0, width * slope / (1 - a * slope)
    if kind == "loop" and t <= rule.remask_off:
        return 0.0, width / t
    if kind == "loop":
        a = b = rule.remask_alpha
    starts = a <= 1e-9  # nothing is known yet
    bound = 1.0 if starts else min(1.0, (1 - b) / a)
    if kind == "conf":
        return bound, (b - a) / (1 - a)
    if kind == "forward_backward":
        chance = 1.0 if starts else (b - a) / a
    elif kind == "rescale":
        chance = eta * bound
    else:
        chance = eta if starts or kind == "loop" else min(eta, (1 - b) / a)
    return chance, (b - (1 - chance) * a) / (1 - a)


def next_masked_counts(
    plan: Any,
    masked_at_start: npt.NDArray[Any],
    masked_now: npt.NDArray[Any],
    num_commit: npt.NDArray[Any] | None = None,
) -> npt.NDArray[np.int64]:
    """How many positions of each row stay masked, (B,) int64, for a rule with a fixed count.

    `plan` is a `StepPlan`; the two arrays are (B,) integers.  This is the written form that
    every backend follows: table look-up, the rule's clamps, never above U.
    """
    now = np.asarray(masked_now, dtype=np.int64)
    commit, table = plan.commit, plan.numbers.table
    if now.size == 0 or commit.count == "all":
        return np.zeros_like(now)
    if commit.count == "given":
        return np.asarray(np.clip(now - np.asarray(num_commit, np.int64), 0, now))
    if commit.count == "fraction":
        share = plan.numbers.shares[now.sum() if commit.count_rows == "mean" else now]
        return np.asarray(np.maximum(now - share, 0))
    start = np.asarray(masked_at_start, dtype=np.int64)
    if commit.count == "quota":
        return np.asarray(np.maximum(now - table[count_bases(plan, start)], 0))
    limit = now
    if commit.count_rows == "first":
        limit = np.full_like(now, now[0])
    target = table[count_bases(plan, start)].astype(np.int64)
    for clamp in commit.clamps:
        target = np.minimum(target, limit - 1) if clamp == "commit_one" else np.maximum(target, 1)
    return np.asarray(np.clip(target, 0, now))


def count_bases(plan: Any, start: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What each row's count is formed from: an index into the table."""
    if plan.commit.base_is_positions:
        return np.full_like(start, plan.numbers.table.size - 1)
    if plan.commit.count_rows == "first":
        return np.full_like(start, start[0])
    return np.full_like(start, start.sum()) if plan.commit.count_rows == "sum" else start


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
    if num_steps * max(len(start), 1) > _MOST_COUNTS:
        raise ValueError(
            f"num_steps: expected at most {_MOST_COUNTS} counts in all, got {num_steps} steps of "
            f"{len(start)} sequences"
        )
    now = start.astype(np.int64)
    counts = np.zeros((num_steps, len(start)), np.int64)
    if step_rule.count_base == "block":
        start = np.full_like(start, size)
    for step in range(num_steps):
        plan = resolve(step_rule, step, num_steps, (len(start), size))
        now = next_masked_counts(plan, start, now)
        counts[step] = now
        if not now.any():
            break
    return counts
