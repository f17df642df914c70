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

The rows are counted where that neither waits for a device nor breaks a trace: NumPy, torch on the CPU,
and jax on the CPU outside a trace, where their number is rounded up to a power of two (the last row
again) so that few programs are compiled.  Elsewhere all rows take part; there, under a rule that
chooses positions first, a chosen row without a finite logit is not made up for by another.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import is_on_host, kind_of, library_of, like, place_of, to_numpy
from ..decode_step import dispatch
from ..decode_step.inputs import StepInputs, complete
from ..decode_step.rule.plan import StepPlan

LOGITS_PER_CHUNK = 1 << 23


def decode_step(
    x: StepInputs,
    plan: StepPlan,
    hidden: Any,
    weight: Any,
    bias: Any,
    backend: str,
) -> tuple[tuple[Any, Any, Any], Any]:
    """((next_tokens, candidate_tokens, confidence), dead) for hidden (B, N, D) already guided.

    `x` has no logits; dead (B, N) are the rows that were drawn and had no finite logit.
    """
    x = complete(x, plan)
    weight, bias = codebook(plan, weight, bias)
    could_be = wanted = x.eligible
    if chooses_first(plan):
        could_be = could_be & (x.tokens == x.mask_token_id)  # such a rule draws for no known token
        wanted = could_be & chosen(x, plan, hidden, backend)
    drawn, score, log_z = sample_rows(x, plan, hidden, weight, bias, wanted, backend)
    if wanted is not could_be and _has_dead_rows(drawn, wanted):
        wanted = could_be
        drawn, score, log_z = sample_rows(x, plan, hidden, weight, bias, wanted, backend)
    scores = x.scores if plan.row.score == "given" else score
    out: tuple[Any, Any, Any] = dispatch.call(
        "decode_step", x._replace(drawn=drawn, scores=scores), plan, hidden, backend
    )
    return out, wanted & (log_z == -np.inf)


def codebook(plan: StepPlan, weight: Any, bias: Any) -> tuple[Any, Any]:
    """The rows of the head that the rule may draw from, as views."""
    if plan.row.vocab_slice is None:
        return weight, bias
    rows = slice(*plan.row.vocab_slice)
    return weight[rows], None if bias is None else bias[rows]


def chooses_first(plan: StepPlan) -> bool:
    """Whether the committed positions are known before any logits are."""
    how = plan.commit
    by_chance = how.count == "bernoulli" or how.source != "drawn"
    return by_chance and not (how.revises or how.edits or how.skips_mask)


def _has_dead_rows(drawn: Any, wanted: Any) -> bool:
    """Whether a chosen row has no candidate, so that another position is committed in its place."""
    if not (is_on_host(wanted) and is_on_host(drawn)):
        return False
    return bool((to_numpy(wanted) & (to_numpy(drawn) < 0)).any())


def chosen(x: StepInputs, plan: StepPlan, hidden: Any, backend: str) -> Any:
    """(B, N) bool: the positions that this step commits, whatever their tokens."""
    nothing = library_of(x.tokens).zeros(x.tokens.shape, **place_of(x.tokens))
    scores = x.scores if plan.row.score == "given" else nothing
    never = plan.row.vocab_start
    other = never if x.mask_token_id != never else never + 1
    drawn = x.tokens * 0 + other
    dry = x._replace(drawn=drawn, scores=scores)
    next_tokens, _, _ = dispatch.call("decode_step", dry, plan, hidden, backend)
    return like(next_tokens, hidden) != x.mask_token_id


def sample_rows(
    x: StepInputs,
    plan: StepPlan,
    hidden: Any,
    weight: Any,
    bias: Any,
    wanted: Any,
    backend: str,
) -> tuple[Any, Any, Any]:
    """(candidates or -1, scores, log_z), each (B, N), of the wanted rows of hidden (B, N, D)."""
    batch, length, width = hidden.shape
    flat = hidden.reshape(batch * length, width)
    at = _row_numbers(wanted)
    count = batch * length if at is None else len(at)
    size = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    if kind_of(hidden) == "jax":
        size = 1 << (size.bit_length() - 1)  # divides every padded number of rows, or exceeds it
    pieces = []
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count)) if at is None else at[first : first + size]
        pieces.append(_sample_chunk(x, plan, flat, weight, bias, wanted, rows, backend))
    return _assemble(pieces, at, hidden, batch, length)


def _row_numbers(wanted: Any) -> Any:
    """Flat numbers of the wanted rows; None for all, where counting would wait or break a trace."""
    if not is_on_host(wanted):
        return None
    at = np.flatnonzero(to_numpy(wanted).reshape(-1))
    if kind_of(wanted) != "jax" or at.size == 0:
        return at
    padded = 1 << (int(at.size) - 1).bit_length()
    return np.pad(at, (0, padded - at.size), mode="edge") if padded < wanted.size else None


def _sample_chunk(
    x: StepInputs, plan: StepPlan, flat: Any, weight: Any, bias: Any, wanted: Any, rows: Any,
    backend: str,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """(candidates, scores, log_z), each (R, 1), of some rows."""
    length = x.tokens.shape[1]
    number = _numbers(rows, flat) if isinstance(rows, slice) else rows
    given = kind_of(x.positions) == kind_of(flat)  # by the caller; by default they are 0 .. N-1

    def pick(array: Any, index: Any = rows) -> Any:
        if array is None:
            return None
        return array.reshape(-1, *array.shape[2:])[index][:, None]

    logits = dispatch.narrowed(_product(flat[rows], weight, bias))[:, None]
    chunk = StepInputs(
        logits=logits,
        tokens=pick(x.tokens),
        eligible=pick(wanted),
        num_masked_at_start=number * 0,
        seeds=None if x.seeds is None else x.seeds[number // length],
        positions=pick(x.positions) if given else (number % length)[:, None],
        token_gumbel=pick(x.token_gumbel),
        choice_gumbel=None,
        uncond_logits=None,
        guidance_scale=0.0,
        mask_token_id=x.mask_token_id,
    )
    out: tuple[Any, Any, Any] = dispatch.call("sample_tokens", chunk, plan, logits, backend)
    return out


def _numbers(rows: slice, flat: Any) -> Any:
    """The numbers of some rows, beside them: a copy from the host would break the capture of a graph."""
    if kind_of(flat) != "torch":
        return np.arange(rows.start, rows.stop)
    import torch

    return torch.arange(rows.start, rows.stop, device=flat.device)


def _product(rows: Any, weight: Any, bias: Any) -> Any:
    if kind_of(rows) == "torch":
        import torch.nn.functional as F

        return F.linear(rows, weight, bias)
    logits = rows @ weight.T
    return logits if bias is None else logits + bias


def _assemble(
    pieces: list[tuple[Any, Any, Any]], at: Any, hidden: Any, batch: int, length: int
) -> tuple[Any, Any, Any]:
    """The chunks' results at their places in (B, N); -1, -inf and -inf elsewhere."""
    library, rows = library_of(hidden), slice(None) if at is None else at
    columns = []
    for i, nothing in enumerate((-1, -np.inf, -np.inf)):
        found = [like(piece[i], hidden)[:, 0] for piece in pieces]
        dtype = {"dtype": found[0].dtype} if found else {}
        column = library.full((batch * length,), nothing, **dtype, **place_of(hidden))
        if found and kind_of(hidden) == "jax":
            column = column.at[rows].set(library.concatenate(found))
        elif found:
            column[rows] = library.concatenate(found)
        columns.append(column.reshape(batch, length))
    drawn, score, log_z = columns
    return drawn, score, log_z
