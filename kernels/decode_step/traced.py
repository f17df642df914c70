"""A step whose number a jitted program computes: a branch for each structure of a plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..common.arrays import as_index, check_integer, dtype_name, is_traced, kind_of
from .door import TracedStep, plan_of
from .rule.rule import StepRule

MOST_TRACED_STEPS = 4096


def at_step(
    call: Callable[[Any], Any], rule: StepRule, step: Any, num_steps: Any, model: Any
) -> Any:
    """`call(step)`; with a traced step a program with a branch for each structure of a plan."""
    if kind_of(step) is None:
        return call(step)
    if not is_traced(step):
        return call(as_index("step", step))
    check_integer("num_steps", num_steps)
    if tuple(step.shape) or not dtype_name(step).startswith(("int", "uint")):
        raise TypeError(f"step: expected an integer, got {step!r}")
    if not 1 <= num_steps <= MOST_TRACED_STEPS:
        raise ValueError(
            f"num_steps: expected 1 to {MOST_TRACED_STEPS} with a traced step, whose program holds the "
            f"numbers of all; got {num_steps}"
        )
    import jax
    import jax.numpy as jnp

    alike: dict[Any, list[int]] = {}
    for s in range(int(num_steps)):
        plan = plan_of(rule, -1, s, num_steps, model)
        alike.setdefault((plan.row, plan.commit), []).append(s)
    groups = [tuple(steps) for steps in alike.values()]
    places = sorted(
        (s, group, i) for group, steps in enumerate(groups) for i, s in enumerate(steps)
    )
    last = min(int(num_steps) - 1, int(jnp.iinfo(step.dtype).max))  # in the dtype of the step
    at = jnp.asarray(places, jnp.int32)[jnp.clip(step, 0, last).astype(jnp.int32)]
    branches = [partial(_at_traced, call, steps) for steps in groups]
    return jax.lax.switch(at[1], branches, at[2])


def _at_traced(call: Callable[[Any], Any], steps: tuple[int, ...], index: Any) -> Any:
    return call(TracedStep(steps, index))
