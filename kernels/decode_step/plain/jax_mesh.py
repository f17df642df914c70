"""The decode step on a mesh of chips: sequences over one axis, the vocabulary over another.

Each chip holds V / n columns of its rows and computes on them what jax_ref.py does on all: every
maximum, sum and race of a row is finished by one reduction of a single number a row (jax_ref.Columns).
All chips work relative to the maximum of the whole row, and a leaf of 128 columns lies on one chip, so
each leaf's race key has the same bits as on one device, and so has the candidate.  Only sums over the
row (log Z) are formed in another order.  What is selected is computed from (B, N) arrays on every chip.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ...common.mesh import Sharding
from ...common.philox import LEAF
from ..inputs import StepInputs
from ..rule.plan import StepPlan
from . import jax_ref
from .jax_ref import Columns

_OF_LOGITS = ("logits", "uncond_logits")
_OF_COLUMNS = (*_OF_LOGITS, "token_gumbel")
_OF_SEQUENCES = ("num_masked_at_start", "num_commit", "seeds")


def decode_step(
    x: StepInputs, plan: StepPlan, dtype: str, sharding: Sharding
) -> tuple[Any, Any, Any]:
    """jax_ref's function of that name on a mesh; `x.logits` have all columns, vocab_slice or not."""
    drawn, score = x.drawn, x.scores
    if drawn is None:
        drawn, score, _ = sample_tokens(x, plan, dtype, sharding)
    scores = x.scores if plan.row.score == "given" else score
    return jax_ref.decode_step(x._replace(logits=None, drawn=drawn, scores=scores), plan, dtype)


def sample_tokens(
    x: StepInputs, plan: StepPlan, dtype: str, sharding: Sharding
) -> tuple[Any, Any, Any]:
    """jax_ref's function of that name on a mesh."""
    _check(x, plan, sharding)
    vocab, shards = x.logits.shape[-1], _shards(sharding)
    first, stop = plan.row.vocab_slice or (0, vocab)
    row = plan.row if shards == 1 else dataclasses.replace(plan.row, vocab_slice=None)
    fields = {
        name: value
        for name, value in x._asdict().items()
        if value is not None and not isinstance(value, int | float)
    }
    if x.token_gumbel is not None and shards > 1:  # as wide as the slice
        after = vocab - x.token_gumbel.shape[-1]
        fields["token_gumbel"] = jnp.pad(x.token_gumbel, ((0, 0), (0, 0), (0, after)))
    guidance = jnp.asarray(fields.pop("guidance_scale", x.guidance_scale), jnp.float32)

    def shard(arrays: dict[str, Any], guidance: Any, numbers: Any) -> tuple[Any, Any, Any]:
        own_plan = StepPlan(row, plan.commit, numbers)
        given: dict[str, Any] = dict.fromkeys(StepInputs._fields) | arrays
        given |= {"guidance_scale": guidance, "mask_token_id": x.mask_token_id}
        if shards == 1:  # whole rows, cut to the slice as on one device
            cut = {n: arrays[n][..., first:stop] for n in _OF_LOGITS if n in arrays}
            return jax_ref.sample_tokens(StepInputs(**given | cut), own_plan, dtype)
        own = StepInputs(**given)
        start = jax.lax.axis_index(sharding.vocab) * (vocab // shards)
        column = start + jnp.arange(vocab // shards, dtype=jnp.int32)
        own = own._replace(logits=_outside(own.logits, column, first, stop))
        return jax_ref.sample_tokens(own, own_plan, dtype, Columns(sharding.vocab, start))

    specs = {name: _spec(name, sharding) for name in fields}
    out = P(sharding.batch)
    return jax.shard_map(  # type: ignore[no-any-return]
        shard, mesh=sharding.mesh, in_specs=(specs, P(), P()), out_specs=(out, out, out),
        check_vma=False,
    )(fields, guidance, plan.numbers)  # fmt: skip


def _shards(sharding: Sharding) -> int:
    """How many parts the vocabulary is in."""
    return 1 if sharding.vocab is None else int(sharding.mesh.shape[sharding.vocab])


def _spec(name: str, sharding: Sharding) -> P:
    if name in _OF_COLUMNS:
        return P(sharding.batch, None, sharding.vocab)
    return P(sharding.batch)


def _outside(logits: Any, column: Any, first: int, stop: int) -> Any:
    """Logits with NaN, which counts as -inf with and without guidance, outside the rule's slice."""
    return jnp.where((column >= first) & (column < stop), logits, np.nan)


def _check(x: StepInputs, plan: StepPlan, sharding: Sharding) -> None:
    batch, _, vocab = x.logits.shape
    shape = dict(sharding.mesh.shape)
    if sharding.batch is not None and batch % shape[sharding.batch]:
        raise ValueError(
            f"logits: expected sequences in a multiple of the {shape[sharding.batch]} chips of axis "
            f"{sharding.batch!r}, got {batch}"
        )
    shards = _shards(sharding)
    if shards == 1:
        return
    whole = LEAF * shards
    if vocab % whole:
        raise ValueError(
            f"logits: expected a vocabulary that is a multiple of {whole}, {LEAF} for each chip of axis "
            f"{sharding.vocab!r}, got {vocab}"
        )
    if plan.row.vocab_slice and plan.row.vocab_slice[0]:
        raise ValueError(
            f"rule: expected a vocab_slice that starts at 0 with columns on axis {sharding.vocab!r}, "
            f"got {plan.row.vocab_slice!r}"
        )
    if plan.row.vocab_slice and plan.row.holds:
        raise ValueError(
            f"rule: expected no vocab_slice with revise='held' with columns on axis {sharding.vocab!r}, "
            f"got {plan.row.vocab_slice!r}"
        )
    if plan.row.filters:
        raise ValueError(
            f"rule: expected no filters with columns on axis {sharding.vocab!r}, "
            f"got {tuple(name for name, _, _ in plan.row.filters)!r}"
        )
