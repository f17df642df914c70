"""How many positions stay masked after a step: in one step, and planned for a whole loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .plan import check_num_steps, resolve
from .rule import StepRule, as_rule

_MOST_COUNTS = 1 << 26  # half a gigabyte of them


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
