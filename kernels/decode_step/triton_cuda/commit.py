"""Count, select and re-mask in Triton: one program a sequence, its N confidences in registers.

Where rows were shared between programs (rows.py), each is finished here first.  Then the score
gets its noise and becomes the confidence, and the rule's count and cut say what is committed:

    by rank       position i is committed where fewer than c surer ones compete, ties by position:
                  N^2 comparisons, for N up to 128 and for counts that depend on the sorted values
    by bisection  the c-th largest confidence is found bit by bit, ties by a prefix sum

Confidences go to memory once, as the result; ranks read them from there after a barrier.

Limits: N at most 2^15; beyond 4096 positions a thread's 128 registers do not hold all, and spill.  Counts
over the batch (count_rows "first", "mean", "sum") are formed by every program for itself, from the tokens.
"""

# mypy: ignore-errors

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...common.philox.triton_form import STREAM_CHOICE, exponential
from ...common.triton_tools import scalar
from .finish import (
    UNSPECIALIZED,
    Noise,
    Scales,
    finish,
    keys_of,
    merged,
    offset_of,
    shift_of,
    taking_part,
)
from .select import (
    best_of_runs,
    bound_of,
    competing,
    cut,
    first_of,
    num_confident,
    num_of,
    of_table,
    ordered,
    over_batch,
    ranks,
    stay_masked,
)
from .tiles import Place, Source

MOST_POSITIONS = 1 << 15


@triton.jit
def _remask_bound(scores, known, row, below, chance, spec: tl.constexpr):
    """What a known position's noise must stay under to mask it again."""
    if spec.remasks_by_score:
        score = tl.load(scores + row, mask=known, other=-float("inf")).to(tl.float64)
        usable = known & (score > -float("inf")) & (score < float("inf"))
        score = tl.where(usable, score, -float("inf"))
        top = tl.max(score, 0)
        weight = tl.where(usable, tl.exp(score - tl.where(top > -float("inf"), top, 0.0)), 0.0)
        total = tl.sum(weight, 0)
        share = scalar(chance, tl.float64) * weight / tl.where(total > 0, total, 1.0)
        inside = tl.where(share > 0, tl.minimum(share, 1 - 1e-16), 0.5)
        bound = -tl.log(-tl.log(inside))
        bound = tl.where(share >= 1, float("inf"), bound)
        return tl.where(share > 0, bound, -float("inf")).to(tl.float32)
    else:
        return below


class Given(NamedTuple):
    """Pointers to what the caller gives of each position."""

    tokens: Any
    eligible: Any
    seeds: Any
    positions: Any


class Found(NamedTuple):
    """Pointers to the candidates, their scores, log Z or None, and what programs left of shared rows."""

    drawn: Any
    score: Any
    log_z: Any
    parts: Any


class Strides(NamedTuple):
    """Of sequences and positions in the logits, with their misalignment, and in the unconditional ones."""

    batch: Any
    position: Any
    misalignment: Any
    uncond_batch: Any
    uncond_position: Any


@triton.jit
def _finish_shared(
    source, given, found, row, num_rows, length, strides, mask_token_id, vocab_start, step, scales,
    finishing: tl.constexpr,
):  # fmt: skip
    """Candidates and scores of rows that several programs have walked."""
    live, own, is_own = taking_part(
        given.tokens, given.eligible, row, num_rows, mask_token_id, vocab_start, finishing
    )
    offset = offset_of(row, length, strides.batch, strides.position)
    shift = shift_of(offset, row, strides.misalignment, finishing)
    uncond_offset = offset_of(row, length, strides.uncond_batch, strides.uncond_position)
    keys = keys_of(given.seeds, given.positions, row, length, live)
    pivot, safe, alive, walked = merged(found.parts, row, num_rows, live, scales, finishing)
    ids, scores, sums = finish(
        source, source.logits.dtype.element_ty, Place(offset, uncond_offset, shift, alive), own, is_own,
        pivot, pivot, safe, walked, (), keys, Noise(source.logits, row, 1), scales, step,
        vocab_start, finishing,
    )  # fmt: skip
    inside = row < num_rows
    tl.store(found.drawn + row, ids.to(found.drawn.dtype.element_ty), mask=inside)
    tl.store(found.score + row, scores.to(found.score.dtype.element_ty), mask=inside)
    if found.log_z is not None:
        tl.store(found.log_z + row, sums.to(found.log_z.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_kernel(
    logits, uncond, tokens, eligible, seeds, positions, drawn, score, log_z, parts, num_rows,
    length, vocab, stride_b, stride_n, stride_v, misalignment, uncond_stride_b, uncond_stride_n,
    uncond_stride_v, mask_token_id, mask_column, vocab_start, step, guidance, temperature,
    draw_scale, score_scale, score_scale_low, filter_scale, finishing: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks): finishes the rows of a call that ends with candidates and scores."""
    rows: tl.constexpr = finishing.rows
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    source = Source(logits, uncond, stride_v, uncond_stride_v, vocab, guidance, mask_column)
    scales = Scales(draw_scale, score_scale, score_scale_low, filter_scale, temperature)
    strides = Strides(stride_b, stride_n, misalignment, uncond_stride_b, uncond_stride_n)
    _finish_shared(
        source, Given(tokens, eligible, seeds, positions), Found(drawn, score, log_z, parts), row,
        num_rows, length, strides, mask_token_id, vocab_start, step, scales, finishing,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "table_size", "batch"])
def commit_kernel(
    logits, uncond, tokens, eligible, seeds, positions, drawn, score, parts, num_rows, length,
    vocab, stride_b, stride_n, stride_v, misalignment, uncond_stride_b, uncond_stride_n, uncond_stride_v,
    mask_token_id, mask_column, vocab_start, step, guidance, temperature, draw_scale, score_scale,
    score_scale_low, filter_scale, next_tokens, candidates, confidence, choice_gumbel, scores,
    starts, num_commit, table, table_size, batch, choice_temperature, share, commit_below,
    remask_below, remask_chance, bounds, finishing: tl.constexpr, spec: tl.constexpr,
):  # fmt: skip
    """Grid (B,): what `decode_step` returns, from candidates and scores."""
    block: tl.constexpr = spec.block
    b = tl.program_id(0)
    n = tl.arange(0, block)
    row, inside = b * length + n, n < length
    if finishing is not None:
        rows: tl.constexpr = finishing.rows
        source = Source(logits, uncond, stride_v, uncond_stride_v, vocab, guidance, mask_column)
        scales = Scales(draw_scale, score_scale, score_scale_low, filter_scale, temperature)
        strides = Strides(stride_b, stride_n, misalignment, uncond_stride_b, uncond_stride_n)
        for first in range(0, length, rows):
            some = first + tl.arange(0, rows)
            some = tl.where(some < length, b * length + some, num_rows)
            _finish_shared(
                source, Given(tokens, eligible, seeds, positions), Found(drawn, score, None, parts),
                some, num_rows, length, strides, mask_token_id, vocab_start, step, scales, finishing,
            )  # fmt: skip
        tl.debug_barrier()
    kind: tl.constexpr = tl.float64 if spec.wide else tl.float32
    token, known, takes_part, competes = competing(
        tokens, eligible, drawn, b, n, length, mask_token_id, spec
    )
    candidate = tl.load(drawn + row, mask=takes_part, other=-1)
    alive = competes & (known | (candidate >= 0))
    noise = tl.zeros([block], tl.float32)
    if spec.uses_noise:
        if choice_gumbel is not None:
            noise = tl.load(choice_gumbel + row, mask=inside, other=0.0)
        else:
            keys = keys_of(seeds, positions, row, length, inside)
            noise = -tl.log(
                exponential(n * 0, keys.position, step, STREAM_CHOICE, keys.low, keys.high)
            )
    if spec.source == "random":
        value = noise.to(kind)
    else:
        if spec.source == "given":
            value = tl.load(scores + row, mask=inside, other=0.0).to(kind)
        else:
            value = tl.load(score + row, mask=inside, other=0.0).to(kind)
        if spec.adds_noise:
            value = value + scalar(choice_temperature, kind) * noise.to(kind)
    mine = tl.where(alive & (value == value), value, -float("inf"))
    shown = tl.where(known & ~competes, float("inf"), mine)
    tl.store(confidence + row, shown.to(confidence.dtype.element_ty), mask=inside)
    now = num_of(competes)
    if spec.count == "all":
        commit = competes
    elif spec.count == "bernoulli":
        commit = competes & (noise < commit_below)
    else:
        rank, before, key = n * 0, n * 0, n * 0
        if spec.ranks:
            tl.debug_barrier()
            rank, before = ranks(
                confidence, tokens, eligible, drawn, mine, b, length, mask_token_id, spec
            )
        else:
            key = ordered(mine, competes, spec)
        base, now_batch = num_of(takes_part), now
        if spec.count_rows == "each":
            if starts is not None:
                base = tl.load(starts + b).to(tl.int32)
        else:
            rows_counted = 1 if spec.count_rows == "first" else batch
            base, now_batch = over_batch(
                tokens, eligible, drawn, starts, rows_counted, length, mask_token_id, spec
            )
        least = now * 0 + 1
        if spec.least_is_quota:
            least = of_table(table, table_size, base, spec)
        if spec.count == "runs":
            best = best_of_runs(
                mine, tokens, eligible, drawn, competes, b, length, mask_token_id, spec
            )
            commit = (mine == best) & (mine > bound_of(bounds.low, spec))
            commit = competes & (commit | (mine > bound_of(bounds.threshold, spec)))
            top = tl.max(tl.where(competes, mine, -float("inf")), 0)
            surest = tl.min(tl.where(competes & (mine == top), n, spec.block), 0)
            commit = commit | (competes & (n == surest))
        elif spec.count == "threshold" or spec.count == "factor" or spec.count == "entropy_bound":
            take = num_confident(mine, competes, rank, before, now, least, bounds, spec)
            if spec.ranks:
                commit = competes & (rank < take)
            else:
                commit = first_of(key, competes, take, spec)
        else:
            given = now * 0
            if num_commit is not None:
                given = tl.load(num_commit + b).to(tl.int32)
            stay = stay_masked(table, table_size, base, now, now_batch, batch, given, share, spec)
            commit = cut(mine, competes, key, rank, now - stay, now, spec)
    candidate = candidate.to(tl.int64)
    filled = tl.where(alive & ~known, candidate, token)
    result = tl.where(commit & alive, filled, tl.where(competes, mask_token_id, token))
    if spec.edits:
        edited = takes_part & known & (candidate >= 0) & (value > bound_of(bounds.edit, spec))
        result, filled = tl.where(edited, candidate, result), tl.where(edited, candidate, filled)
    if spec.remasks:
        held = takes_part & known
        bound = _remask_bound(scores, held, row, remask_below, remask_chance, spec)
        result = tl.where(held & (noise < bound), mask_token_id, result)
    tl.store(next_tokens + row, result.to(next_tokens.dtype.element_ty), mask=inside)
    tl.store(candidates + row, filled.to(candidates.dtype.element_ty), mask=inside)
