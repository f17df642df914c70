"""A rule at one step: annealed temperatures and the table of counts, as plain host numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.rounding import rounded
from .counts import commit_share, masked_count_table, quota_table, remask_chances
from .spec import StepRule

# 1/T must stay in float32: temperatures under the first are 0, since the draw is argmax long before;
# those above the second are the second, where any logits but of the order of 1e23 are long alike.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-6, 1e30


@dataclass(frozen=True, eq=False)
class ResolvedStep:
    """What every backend is given instead of (rule, step, num_steps).

    `table` is int32 (size + 1,), indexed by the count base; see `counts.next_masked_counts`.
    `commit_below` bounds the choice Gumbel of a position that a Bernoulli rule commits;
    `remask_chance` is its chance to mask a known one again.  The four thresholds are rounded to the
    dtype `compared_in` that scores are compared in: see `in_score_dtype`, which sets it.
    """

    rule: StepRule
    step: int
    sample_temperature: float
    filter_temperature: float
    score_temperature: float
    choice_temperature: float
    count: str
    table: npt.NDArray[Any]
    commit_fraction: float
    commit_below: float
    remask_chance: float
    commit_all: bool
    count_rows: str
    count_base: str
    clamps: tuple[str, ...]
    threshold: float
    threshold_slack: float | None
    low_threshold: float
    edit_threshold: float | None
    compared_in: str = ""


def _anneal(kind: str, step: int, num_steps: int) -> float:
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - (step + 1) / num_steps
    if kind == "before":
        return 1.0 - step / num_steps
    if kind == "linspace":
        return 1.0 - step / (num_steps - 1) if num_steps > 1 else 1.0
    share = 1.0
    for i in range(step + 1):
        share *= 1.0 - (i + 1) / num_steps
        if share < 1e-300:  # no temperature any more, however many steps follow
            break
    return share


def _bounded(value: float) -> float:
    return min(value, _MAX_TEMPERATURE) if value >= _MIN_TEMPERATURE else 0.0


def _sample_temperature(rule: StepRule, step: int, num_steps: int) -> float:
    """The drawing temperature of a step, not regarding steps that are greedy by decree."""
    end = rule.sample_temperature_end
    share = _anneal(rule.sample_anneal, step, num_steps)
    return _bounded(
        max(end + (rule.sample_temperature - end) * share, rule.sample_temperature_floor)
    )


def _is_greedy(rule: StepRule, step: int, num_steps: int) -> bool:
    return (rule.greedy_last and 1 < num_steps == step + 1) or step / num_steps > rule.draw_until


def gumbel_below(chance: float) -> float:
    """The bound that a standard Gumbel variate stays under with this probability."""
    if chance >= 1:
        return math.inf
    return -math.log(-math.log(chance)) if chance > 0 else -math.inf


def check_num_steps(num_steps: object) -> None:
    """ValueError unless `num_steps` is an integer of at least 1."""
    whole = isinstance(num_steps, (int, np.integer)) and not isinstance(num_steps, bool)
    if not whole or num_steps < 1:  # type: ignore[operator]
        raise ValueError(f"num_steps: expected an integer >= 1, got {num_steps!r}")
    if num_steps > 2**32:  # type: ignore[operator]
        raise ValueError(f"num_steps: expected at most 2^32, got {num_steps}")


@lru_cache(maxsize=1024)
def constant_plan(rule: StepRule, step: int) -> ResolvedStep:
    """The rule without its annealing and its count, its random numbers those of `step`."""
    if not isinstance(step, int) or not 0 <= step < 2**32:
        raise ValueError(f"step: expected an integer in [0, 2^32), got {step!r}")
    flat = dataclasses.replace(
        rule,
        sample_anneal="constant",
        greedy_last=False,
        draw_until=1.0,
        count="quota",
        count_rows="each",
        min_commit="one",
        threshold_slack=None,
        remask="none",
    )
    return dataclasses.replace(resolve(flat, 0, 1, 0), step=step, rule=rule)


def table_size(rule: StepRule, batch: int, length: int) -> int:
    """The largest base that a row's count may be formed from."""
    return batch * length if rule.count_rows == "sum" else length


@lru_cache(maxsize=4096)
def resolve(rule: StepRule, step: int, num_steps: int, size: int) -> ResolvedStep:
    """`rule` at `step` of `num_steps`, for count bases up to `size` (see `table_size`).

    Raises:
        ValueError: num_steps < 1 or step outside [0, num_steps).
    """
    check_num_steps(num_steps)
    if not isinstance(step, (int, np.integer)) or not 0 <= step < num_steps:
        raise ValueError(f"step: expected an integer in [0, {num_steps}), got {step!r}")
    step, num_steps = int(step), int(num_steps)
    last = step == num_steps - 1
    share, chance = commit_share(rule, step, num_steps), 0.0
    if rule.remask != "none":
        chance, share = remask_chances(rule, step, num_steps)
    table = np.zeros(0, np.int32)
    if rule.count == "masked":
        table = masked_count_table(rule, step, num_steps, size)
    elif rule.count == "quota" or rule.min_commit == "quota":
        table = quota_table(step, num_steps, size)
    sample = _sample_temperature(rule, step, num_steps)
    choice = rule.choice_temperature * _anneal(rule.choice_anneal, step, num_steps)
    return ResolvedStep(
        rule=rule,
        step=step,
        sample_temperature=0.0 if _is_greedy(rule, step, num_steps) else sample,
        filter_temperature=sample or 1.0,
        score_temperature=_bounded(rule.score_temperature or sample) or 1.0,
        choice_temperature=_bounded(choice),
        count=rule.count,
        table=table,
        commit_fraction=share,
        commit_below=gumbel_below(share),
        remask_chance=chance,
        commit_all=last and rule.last_step == "all",
        count_rows=rule.count_rows,
        count_base=rule.count_base,
        clamps=rule.clamps,
        threshold=rule.threshold,
        threshold_slack=rule.threshold_slack,
        low_threshold=rule.low_threshold,
        edit_threshold=rule.edit_threshold,
    )


def guide_of(rule: StepRule) -> int:
    """Guidance as kernels number it: 1 in float32; 2, 3, 4 the forms of which each operation is rounded."""
    if rule.guidance_dtype == "float32":
        return 1
    return 2 + ("from_uncond", "from_cond", "weighted").index(rule.guidance_form)


@lru_cache(maxsize=4096)
def in_score_dtype(plan: ResolvedStep, logits_dtype: str) -> ResolvedStep:
    """The plan for logits of a dtype: each threshold as the number that scores are compared with."""
    if plan.compared_in:
        return plan
    name = logits_dtype if plan.rule.score_dtype == "logits" else plan.rule.score_dtype

    def bound(value: float | None) -> float | None:
        return None if value is None else rounded(value, name)

    return dataclasses.replace(
        plan,
        threshold=rounded(plan.threshold, name),
        threshold_slack=bound(plan.threshold_slack),
        low_threshold=rounded(plan.low_threshold, name),
        edit_threshold=bound(plan.edit_threshold),
        compared_in=name,
    )
