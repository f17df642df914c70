"""What more than one backend that is traced by jax computes alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .inputs import StepInputs
from .rule.plan import StepPlan


def float_of(is_wide: bool) -> Any:
    """float64 where it is asked for and there is such a type."""
    return jnp.float64 if is_wide and jax.config.read("jax_enable_x64") else jnp.float32


def remask_chance(x: StepInputs, plan: StepPlan) -> jax.Array:
    """The chance of each position to be masked again; for "conf" shared out by the scores."""
    chance = plan.numbers.remask_chance
    if not plan.commit.remasks_by_score:
        return jnp.full(x.tokens.shape, chance)
    known = x.eligible & (x.tokens != x.mask_token_id)
    keys = jnp.where(known & jnp.isfinite(x.scores), x.scores, -jnp.inf)
    return chance * jnp.nan_to_num(jax.nn.softmax(keys, axis=-1))


def gumbel_below(chance: jax.Array) -> jax.Array:
    """The bound that a standard Gumbel variate stays under with this probability."""
    inside = -jnp.log(-jnp.log(jnp.minimum(chance, 1 - 1e-7)))
    return jnp.where(chance >= 1, jnp.inf, inside)
