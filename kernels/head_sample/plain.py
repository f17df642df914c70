"""Head and decode step by chunks of rows, in the arrays' own library: no full logits exist.

For the rows H (R, D) that take part, W (V, D) and bias c:

    logits = H W^T + c        a chunk of rows at a time, at most 2^23 logits (32 MiB in float32)
    draw and score            the chosen backend's `sample_tokens` on the chunk
    count, select, re-mask    its `decode_step` on the drawn candidates

Three kinds of work are left out.  Rows that are known or outside the block; columns outside the
rule's `vocab_slice`, whose rows of W are not read; and under rules whose choice of positions does
not depend on the logits (random scores, given scores, Bernoulli counts), the rows that will stay
masked: positions are chosen first, with the same random numbers, so the same tokens come out.
Guidance is mixed on the hidden states, u + s (c - u): its coefficients sum to 1, so the product is
the guided logits with the bias intact, for one product instead of two.  That would be wrong for a
head that caps its logits (tanh); such models must pass logits.

Where counting the rows would wait for a device or break a trace, all rows take part; there, under a
rule that chooses positions first, a chosen row without a finite logit is not made up for by another.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import is_on_host, kind_of, like, to_numpy
from ..decode_step import run
from ..decode_step.plan import ResolvedStep
from ..decode_step.spec import StepInputs

LOGITS_PER_CHUNK = 1 << 23


def decode_step(
    x: StepInputs,
    plan: ResolvedStep,
    hidden: Any,
    weight: Any,
    bias: Any,
    backend: str,
) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence) for hidden (B, N, D) already guided; `x` has no logits."""
    if plan.rule.vocab_slice is not None:
        rows = slice(*plan.rule.vocab_slice)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    wanted = x.eligible
    if chooses_first(plan):
        wanted = wanted & _chosen(x, plan, hidden, backend)
    drawn, score = sample_rows(x, plan, hidden, weight, bias, wanted, backend)
    if wanted is not x.eligible and _has_dead_rows(drawn, wanted):
        drawn, score = sample_rows(x, plan, hidden, weight, bias, x.eligible, backend)
    scores = x.scores if plan.rule.score == "given" else score
    out: tuple[Any, Any, Any] = run.call(
        "decode_step", x._replace(drawn=drawn, scores=scores), plan, hidden, backend
    )
    return out


def chooses_first(plan: ResolvedStep) -> bool:
    """Whether the committed positions are known before any logits are."""
    by_chance = plan.count == "bernoulli" or plan.rule.score in ("random", "given")
    rule = plan.rule
    needs_tokens = rule.revise != "no" or rule.edit_threshold is not None or rule.skip_mask_token
    return by_chance and not needs_tokens


def _has_dead_rows(drawn: Any, wanted: Any) -> bool:
    """Whether a chosen row has no candidate, so that another position is committed in its place."""
    if kind_of(wanted) == "jax" or not is_on_host(wanted):
        return False
    return bool((to_numpy(wanted) & (to_numpy(drawn) < 0)).any())


def _chosen(x: StepInputs, plan: ResolvedStep, hidden: Any, backend: str) -> Any:
    """(B, N) bool: the positions that this step commits, whatever their tokens."""
    scores = x.scores if plan.rule.score == "given" else x.tokens * 0.0
    never = plan.rule.vocab_slice[0] if plan.rule.vocab_slice else 0
    other = never if x.mask_token_id != never else never + 1
    drawn = x.tokens * 0 + other
    dry = x._replace(drawn=drawn, scores=scores)
    next_tokens, _, _ = run.call("decode_step", dry, plan, hidden, backend)
    return like(next_tokens, hidden) != x.mask_token_id


def sample_rows(
    x: StepInputs,
    plan: ResolvedStep,
    hidden: Any,
    weight: Any,
    bias: Any,
    wanted: Any,
    backend: str,
) -> tuple[Any, Any]:
    """(candidates or -1, scores), each (B, N), of the wanted rows of hidden (B, N, D)."""
    batch, length, width = hidden.shape
    flat = hidden.reshape(batch * length, width)
    at = _row_numbers(wanted)
    count = batch * length if at is None else len(at)
    size = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    pieces = []
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count)) if at is None else at[first : first + size]
        pieces.append(_sample_chunk(x, plan, flat, weight, bias, wanted, rows, backend))
    return _assemble(pieces, at, hidden, batch, length, plan)


def _row_numbers(wanted: Any) -> Any:
    """Flat numbers of the wanted rows, where asking costs no synchronisation and no retracing."""
    if kind_of(wanted) == "jax" or not is_on_host(wanted):
        return None
    return np.flatnonzero(to_numpy(wanted).reshape(-1))


def _sample_chunk(
    x: StepInputs, plan: ResolvedStep, flat: Any, weight: Any, bias: Any, wanted: Any, rows: Any,
    backend: str,
) -> tuple[Any, Any]:  # fmt: skip
    """(candidates, scores), each (R, 1), of some rows."""
    length = x.tokens.shape[1]
    number = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows

    def pick(array: Any, index: Any = rows) -> Any:
        if array is None:
            return None
        return array.reshape(-1, *array.shape[2:])[index][:, None]

    logits = _product(flat[rows], weight, bias)[:, None]
    chunk = StepInputs(
        logits=logits,
        tokens=pick(x.tokens),
        eligible=pick(wanted),
        num_masked_at_start=np.zeros(len(number), np.int64),
        seeds=None if x.seeds is None else x.seeds[number // length],
        positions=pick(x.positions)
        if x.positions is not None
        else (number % length).astype(np.uint32)[:, None],
        token_gumbel=pick(x.token_gumbel),
        choice_gumbel=None,
        uncond_logits=None,
        guidance_scale=0.0,
        mask_token_id=x.mask_token_id,
    )
    drawn, score, _ = run.call("sample_tokens", chunk, plan, logits, backend)
    return drawn, score


def _product(rows: Any, weight: Any, bias: Any) -> Any:
    if kind_of(rows) == "torch":
        import torch.nn.functional as F

        return F.linear(rows, weight, bias)
    logits = rows @ weight.T
    return logits if bias is None else logits + bias


def _assemble(
    pieces: list[tuple[Any, Any]], at: Any, hidden: Any, batch: int, length: int, plan: ResolvedStep
) -> tuple[Any, Any]:
    """The chunks' results at their places in (B, N); -1 and -inf elsewhere."""
    kind = kind_of(hidden)
    wide = "float64" if plan.rule.score_dtype == "float64" else "float32"
    if kind == "jax":
        import jax.numpy as jnp

        if not pieces:
            return jnp.full((batch, length), -1), jnp.full((batch, length), -jnp.inf)
        columns = (jnp.concatenate([p[i] for p in pieces]) for i in (0, 1))
        drawn, score = (c.reshape(batch, length) for c in columns)
        return drawn, score
    if kind == "torch":
        import torch

        device = hidden.device
        drawn = torch.full((batch * length,), -1, device=device)
        score = torch.full((batch * length,), -torch.inf, dtype=getattr(torch, wide), device=device)
    else:
        drawn, score = np.full(batch * length, -1), np.full(batch * length, -np.inf, wide)
    first = 0
    for some, values in pieces:
        stop = first + len(some)
        rows = slice(first, stop) if at is None else at[first:stop]
        drawn[rows] = like(some, hidden)[:, 0]
        column = like(values, hidden)[:, 0]
        score[rows] = column.to(score.dtype) if kind == "torch" else column
        first = stop
    return drawn.reshape(batch, length), score.reshape(batch, length)
