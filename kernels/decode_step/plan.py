"""A rule at one step: annealed temperatures and the table of counts, as plain host numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .counts import masked_count_table, quota_table, time_step_fraction
from .spec import StepRule

# Temperatures under this are 0: 1/T would leave float32, and the draw is argmax long before.
_MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True, eq=False)
class ResolvedStep:
    """What every backend is given instead of (rule, step, num_steps).

    `table` is int32 (size + 1,), indexed by the count base; see `counts.next_masked_counts`.
    `commit_below` bounds the choice Gumbel of a position that a Bernoulli rule commits.
    """

    rule: StepRule
    step: int
    sample_temperature: float
    score_temperature: float
    choice_temperature: float
    count: str
    table: npt.NDArray[Any]
    commit_fraction: float
    commit_below: float
    commit_all: bool
    count_rows: str
    count_base: str
    keep_one_masked: bool


def _anneal(kind: str, step: int, num_steps: int) -> float:
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - (step + 1) / num_steps
    if kind == "linspace":
        return 1.0 - step / (num_steps - 1) if num_steps > 1 else 1.0
    return math.prod(1.0 - (i + 1) / num_steps for i in range(step + 1))


def _temperature(value: float, kind: str, step: int, num_steps: int) -> float:
    scaled = value * _anneal(kind, step, num_steps)
    return scaled if scaled >= _MIN_TEMPERATURE else 0.0


def check_num_steps(num_steps: object) -> None:
    """ValueError unless `num_steps` is an integer of at least 1."""
    whole = isinstance(num_steps, (int, np.integer)) and not isinstance(num_steps, bool)
    if not whole or num_steps < 1:  # type: ignore[operator]
        raise ValueError(f"num_steps: expected an integer >= 1, got {num_steps!r}")


@lru_cache(maxsize=4096)
def resolve(rule: StepRule, step: int, num_steps: int, size: int) -> ResolvedStep:
    """`rule` at `step` of `num_steps`, for sequences of `size` positions.

    Raises:
        ValueError: num_steps < 1 or step outside [0, num_steps).
    """
    check_num_steps(num_steps)
    if not isinstance(step, (int, np.integer)) or not 0 <= step < num_steps:
        raise ValueError(f"step: expected an integer in [0, {num_steps}), got {step!r}")
    step, num_steps = int(step), int(num_steps)
    last = step == num_steps - 1
    fraction = time_step_fraction(step, num_steps, rule.time_eps)
    table = np.zeros(0, np.int32)
    if rule.count == "masked":
        table = masked_count_table(rule, step, num_steps, size)
    elif rule.count == "quota":
        table = quota_table(step, num_steps, size)
    sample = _temperature(rule.sample_temperature, rule.sample_anneal, step, num_steps)
    return ResolvedStep(
        rule=rule,
        step=step,
        sample_temperature=sample,
        score_temperature=rule.score_temperature or sample or 1.0,
        choice_temperature=_temperature(
            rule.choice_temperature, rule.choice_anneal, step, num_steps
        ),
        count=rule.count,
        table=table,
        commit_fraction=fraction,
        commit_below=math.inf if fraction >= 1 else -math.log(-math.log(fraction)),
        commit_all=last and rule.last_step == "all",
        count_rows=rule.count_rows,
        count_base=rule.count_base,
        keep_one_masked=rule.keep_one_masked,
    )
