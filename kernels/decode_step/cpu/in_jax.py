"""The C++ backend inside jitted JAX programs on the CPU: the core as an XLA FFI call (csrc/ffi.cpp).

Logits and noise are read where XLA has them; nothing passes through Python when the program runs.  The
numbers of a step are one of the arrays, so that the steps of a loop share a program.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..inputs import StepInputs
from ..jax_shared import float_of, gumbel_below, remask_chance
from ..rule.plan import StepPlan
from . import launch
from .threads import num_threads

_FIELDS = (
    "logits", "uncond_logits", "token_gumbel", "tokens", "eligible", "num_masked_at_start", "seeds",
    "positions", "choice_gumbel", "num_commit",
)  # fmt: skip


class Packed(NamedTuple):
    """The numbers of a step as the handler takes them: a StepParams' bytes (uint8), and the table."""

    params: Any
    table: Any
    remask_chance: Any


@lru_cache(maxsize=4096)
def packed(plan: StepPlan, dtype: str, mask_token_id: int) -> Packed:
    """The numbers of a plan, on the host."""
    params = launch.numbers(plan, dtype, mask_token_id).to_bytes()
    n = plan.numbers
    return Packed(np.frombuffer(params, np.uint8), n.table, np.float32(n.remask_chance))


def decode_step(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence), each (B, N); `dtype` is that of the logits."""
    fields = _arrays(x, plan)
    if x.scores is not None:
        fields["scores"] = x.scores
    if x.drawn is not None:
        fields |= {"drawn": x.drawn, "drawn_scores": x.scores}
    if plan.commit.remasks_by_score:
        fields["remask_bounds"] = _remask_bounds(x, plan)
    shape, kind = x.tokens.shape, _integer_of(x.tokens)
    results = [(shape, kind), (shape, kind), (shape, float_of(plan.commit.is_wide))]
    out = _call("maskgit_decode_step", fields, results, plan.numbers.params)
    return out[0].astype(x.tokens.dtype), out[1].astype(x.tokens.dtype), out[2]


def sample_tokens(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(candidate or -1, score, log_z), each (B, N)."""
    shape, number = x.tokens.shape, float_of(plan.row.is_wide)
    wide = jnp.int64 if jax.config.read("jax_enable_x64") else jnp.int32
    results = [(shape, wide), (shape, number), (shape, number)]
    out: tuple[Any, Any, Any] = _call(
        "maskgit_sample_tokens", _arrays(x, plan), results, plan.numbers.params
    )
    return out


def _arrays(x: StepInputs, plan: StepPlan) -> dict[str, Any]:
    """The arrays of a call by the names that the handler knows."""
    fields = {name: getattr(x, name) for name in _FIELDS if getattr(x, name) is not None}
    if x.uncond_logits is not None:
        fields["guidance_scale"] = jnp.asarray(x.guidance_scale, jnp.float32)
    if plan.numbers.table.size:
        fields["table"] = jnp.asarray(plan.numbers.table, jnp.int32)
    if x.logits is not None:
        ids = launch.left_out(plan.row, int(x.mask_token_id), x.logits.shape[2])
        fields |= {name: jnp.asarray(columns, jnp.int32) for name, columns in ids.items()}
    return fields


def _call(target: str, fields: dict[str, Any], results: list[Any], params: Any) -> Any:
    call = jax.ffi.ffi_call(
        target,
        [jax.ShapeDtypeStruct(shape, kind) for shape, kind in results],
        vmap_method="sequential",
    )
    return call(
        jnp.asarray(params),
        *(_as_given(name, jnp.asarray(v)) for name, v in fields.items()),
        names=",".join(fields),
        threads=np.int64(num_threads()),
    )


def _integer_of(x: jax.Array) -> Any:
    """The integers that the handler reads and writes: 32 or 64 bits with a sign."""
    return jnp.int64 if x.dtype.itemsize == 8 else jnp.int32


def _as_given(name: str, x: jax.Array) -> jax.Array:
    """A field in a type that the handler reads."""
    kinds = {"eligible": jnp.bool_, "seeds": jnp.uint32, "positions": jnp.uint32}
    if name in kinds:
        return x.astype(kinds[name])
    if name in ("logits", "uncond_logits"):
        return x
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return x.astype(_integer_of(x))


def _remask_bounds(x: StepInputs, plan: StepPlan) -> jax.Array:
    """(B, N) bounds under which a known position's choice noise masks it again, shared by scores."""
    return gumbel_below(remask_chance(x, plan))
