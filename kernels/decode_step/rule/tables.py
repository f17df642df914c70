"""What a step commits, by the rule's schedule: tables of counts, shares and chances, on the host."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .rule import StepRule
from .schedules import gamma, linspace


def done_ratio(rule: StepRule, step: int, num_steps: int) -> np.floating[Any]:
    """Share of the steps that are done when `step` ends, in the rule's arithmetic."""
    dt: np.dtype[Any] = np.dtype(np.float64 if rule.schedule == "sine" else rule.count_dtype)
    if rule.count_ratio == "step":
        done: np.floating[Any] = np.minimum(dt.type(step + 1) / dt.type(num_steps), dt.type(1))
        return done
    if rule.count_ratio == "linspace":
        return np.float32(linspace(0.0, 1.0, num_steps + 1, step + 1))
    return np.float32(linspace(0.0, 1.0, num_steps, min(step + 1, num_steps - 1)))


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
