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

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl

from ...common.philox.triton_form import STREAM_CHOICE, exponential
from ...common.triton_tools import rounded_to, scalar
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
from .tiles import Place, Source

MOST_POSITIONS = 1 << 15
RANKED = tl.constexpr(128)  # longest sequence whose cut is found by rank


@dataclass(frozen=True)
class CommitSpec:
    """What the commit kernel is compiled for: the second half of a plan (plan.CommitPlan).

    block: N, to the next power of two; others: positions compared with all at once; source: where
    scores come from, "drawn", "random" or "given".
    """

    block: int
    others: int = 32
    count: str = "masked"
    cut: str = "exact"
    count_rows: str = "each"
    base_is_positions: bool = False
    clamps: tuple[str, ...] = ()
    source: str = "drawn"
    uses_noise: bool = False
    adds_noise: bool = False
    threshold_strict: bool = False
    has_slack: bool = False
    least_is_quota: bool = False
    factor_tail: bool = True
    revise: bool = False
    touches_known: bool = False
    edits: bool = False
    remasks: bool = False
    remasks_by_score: bool = False
    skip_mask_token: bool = False
    wide: bool = False
    compared_in: str = ""  # the dtype of a bound that the kernel computes

    @property
    def ranks(self) -> bool:
        """Whether the rank of every position is formed."""
        by_value = self.count in ("factor", "entropy_bound")
        return by_value or (self.block <= RANKED.value and self.count not in ("all", "bernoulli"))


@triton.jit
def _competing(tokens, eligible, drawn, b, n, length, mask_token_id, spec: tl.constexpr):
    """(token, known, takes part, competes) at positions n of sequence b."""
    row, inside = b * length + n, (n >= 0) & (n < length)
    token = tl.load(tokens + row, mask=inside, other=0).to(tl.int64)
    known = inside & (token != mask_token_id)
    takes_part = inside
    if not spec.touches_known:
        takes_part = takes_part & ~known
    if eligible is not None:
        takes_part = takes_part & (tl.load(eligible + row, mask=inside, other=0) != 0)
    competes = takes_part
    if not spec.revise:
        competes = competes & ~known
    if spec.skip_mask_token:
        candidate = tl.load(drawn + row, mask=inside, other=0).to(tl.int64)
        competes = competes & (candidate != mask_token_id)
    return token, known, takes_part, competes


@triton.jit
def _num(condition):
    return tl.sum(condition.to(tl.int32), 0)


@triton.jit
def _over_batch(
    tokens, eligible, drawn, starts, rows, length, mask_token_id, spec: tl.constexpr
):  # fmt: skip
    """(sum of U0, sum of U) over the first `rows` sequences."""
    n = tl.arange(0, spec.block)
    start, now = 0, 0
    for b in range(0, rows):
        _, _, takes_part, competes = _competing(
            tokens, eligible, drawn, b, n, length, mask_token_id, spec
        )
        if starts is not None:
            start += tl.load(starts + b).to(tl.int32)
        else:
            start += _num(takes_part)
        now += _num(competes)
    return start, now


@triton.jit
def _of_table(table, table_size, base, spec: tl.constexpr):
    if spec.base_is_positions:
        base = table_size - 1
    return tl.load(table + tl.minimum(tl.maximum(base, 0), table_size - 1))


@triton.jit
def _stay_masked(table, table_size, base, now, now_batch, batch, given, share, spec: tl.constexpr):
    """counts.next_masked_counts: how many of a sequence's U = `now` stay masked."""
    if spec.count == "given":
        return tl.minimum(tl.maximum(now - given, 0), now)
    elif spec.count == "fraction":
        if spec.count_rows == "mean":
            mean = tl.div_rn(now_batch.to(tl.float32), scalar(batch, tl.float32))
            return tl.maximum(now - (mean * share).to(tl.int32), 0)
        else:
            return now - (now.to(tl.float32) * share).to(tl.int32)
    elif spec.count == "quota":
        return tl.maximum(now - _of_table(table, table_size, base, spec), 0)
    else:
        target = _of_table(table, table_size, base, spec)
        limit = now_batch if spec.count_rows == "first" else now
        clamps: tl.constexpr = spec.clamps
        for i in tl.static_range(len(clamps)):
            if clamps[i] == "commit_one":
                target = tl.minimum(target, limit - 1)
            else:
                target = tl.maximum(target, 1)
        return tl.minimum(tl.maximum(target, 0), now)


@triton.jit
def _ranks(confidence, tokens, eligible, drawn, mine, b, length, mask_token_id, spec: tl.constexpr):
    """(how many surer ones compete, the sum of their negative confidences), [block]."""
    block: tl.constexpr = spec.block
    others: tl.constexpr = spec.others
    n = tl.arange(0, block)
    rank = tl.zeros([block], tl.int32)
    before = tl.zeros([block], tl.float64)
    for first in range(0, length, others):
        other = first + tl.arange(0, others)
        _, _, _, competes = _competing(
            tokens, eligible, drawn, b, other, length, mask_token_id, spec
        )
        if _num(competes) > 0:
            key = tl.load(confidence + b * length + other, mask=competes, other=0.0)
            surer = (key[None, :] > mine[:, None]) | (
                (key[None, :] == mine[:, None]) & (other[None, :] < n[:, None])
            )
            surer = surer & competes[None, :]
            rank += tl.sum(surer.to(tl.int32), 1)
            if spec.count == "entropy_bound":
                before -= tl.sum(tl.where(surer, key[None, :].to(tl.float64), 0.0), 1)
    return rank, before


@triton.jit
def _ordered(confidence, competes, spec: tl.constexpr):
    """Unsigned integers in the order of the confidences, 0 at what does not compete."""
    if spec.wide:
        bits = (confidence + 0.0).to(tl.uint64, bitcast=True)
        top = tl.full(bits.shape, 1, tl.uint64) << 63
    else:
        bits = (confidence + 0.0).to(tl.uint32, bitcast=True)
        top = tl.full(bits.shape, 1, tl.uint32) << 31
    return tl.where(competes, tl.where(bits >= top, ~bits, bits | top), 0)


@triton.jit
def _of_rank(key, rank, spec: tl.constexpr):
    """The key that `rank` others are above, 0 where there are fewer."""
    bound = tl.min(key, 0) * 0
    bits: tl.constexpr = 64 if spec.wide else 32
    for i in range(bits):
        candidate = bound | ((bound * 0 + 1) << (bits - 1 - i))
        bound = tl.where(_num(key >= candidate) > rank, candidate, bound)
    return bound


@triton.jit
def _first(key, competes, take, spec: tl.constexpr):
    """The `take` largest keys, of equal ones the first."""
    bound = _of_rank(key, take - 1, spec)
    equal = competes & (key == bound)
    room = take - _num(key > bound)
    chosen = (key > bound) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    return competes & chosen & (take > 0)


@triton.jit
def _segmented(started, a, starts, b):
    return started | starts, tl.where(starts > 0, b, tl.maximum(a, b))


@triton.jit
def _best_of_runs(
    confidence, tokens, eligible, drawn, competes, b, length, mask_token_id, spec: tl.constexpr
):  # fmt: skip
    """The largest confidence of the run of neighbours that each position is in."""
    n = tl.arange(0, spec.block)
    _, _, _, left = _competing(tokens, eligible, drawn, b, n - 1, length, mask_token_id, spec)
    _, up = tl.associative_scan(((~(competes & left)).to(tl.int32), confidence), 0, _segmented)
    tl.debug_barrier()  # or both neighbours would be in registers
    _, _, _, right = _competing(tokens, eligible, drawn, b, n + 1, length, mask_token_id, spec)
    _, down = tl.associative_scan(
        ((~(competes & right)).to(tl.int32), confidence), 0, _segmented, reverse=True
    )
    return tl.maximum(up, down)


class Bounds(NamedTuple):
    """What scores are compared with: float64 numbers, each as three of float32 that add up to it."""

    threshold: Any
    slack: Any
    low: Any
    edit: Any
    factor: Any


def in_three(value: float) -> tuple[float, float, float]:
    """Three float32 numbers whose sum is `value`: a kernel is given no float64 ones."""
    high = float(np.float32(value))
    if not math.isfinite(high):
        return high, 0.0, 0.0
    middle = float(np.float32(value - high))
    return high, middle, float(np.float32(value - high - middle))


@triton.jit
def _exact(parts):
    """The float64 number of `in_three`."""
    high, middle = scalar(parts[0], tl.float64), scalar(parts[1], tl.float64)
    return (high + middle) + scalar(parts[2], tl.float64)


@triton.jit
def _bound(parts, spec: tl.constexpr):
    """The same in the dtype of the scores, in which it is one."""
    kind: tl.constexpr = tl.float64 if spec.wide else tl.float32
    return _exact(parts).to(kind)


@triton.jit
def _as_score(bound, spec: tl.constexpr):
    """A computed bound rounded to the dtype in which it is compared with scores."""
    if spec.compared_in == "bfloat16":
        return rounded_to(bound, tl.bfloat16)
    elif spec.compared_in == "float16":
        return rounded_to(bound, tl.float16)
    else:
        return bound


@triton.jit
def _take(mine, competes, rank, before, now, least, bounds, spec: tl.constexpr):
    """How many of the surest are committed by rules that look at their values."""
    if spec.count == "threshold":
        bound = _bound(bounds.threshold, spec)
        if spec.has_slack:
            top = tl.max(tl.where(competes, mine, -float("inf")), 0)
            bound = tl.minimum(bound, _as_score(top - _bound(bounds.slack, spec), spec))
        if spec.threshold_strict:
            passing = mine > bound
        else:
            passing = mine >= bound
        take = _num(competes & passing)
    elif spec.count == "entropy_bound":
        take = tl.min(tl.where(competes & ~(before <= _exact(bounds.threshold)), rank, now), 0)
    else:
        bound = (1.0 - _exact(bounds.factor) / (rank.to(tl.float64) + 2.0)).to(mine.dtype)
        bound = _as_score(bound, spec)
        take = tl.min(tl.where(competes & (rank >= 1) & (mine < bound), rank, now), 0)
        if spec.factor_tail:  # Fast-dLLM's off-by-one
            take = tl.where((now <= 2) | (take == now - 1), now, take)
    return tl.minimum(tl.maximum(take, least), now)


@triton.jit
def _cut(mine, competes, key, rank, take, now, spec: tl.constexpr):
    """The competing positions above the rule's cut where `take` of `now` are to be committed."""
    if spec.cut == "exact":
        if spec.ranks:
            return competes & (rank < take)
        else:
            return _first(key, competes, take, spec)
    elif spec.cut == "strict":
        if spec.ranks:
            last = tl.max(tl.where(competes & (rank == take - 1), mine, -float("inf")), 0)
            above = competes & (mine >= last)
        else:
            above = competes & (key >= _of_rank(key, take - 1, spec))
        return tl.where(take == now, competes, above & (take > 0))
    else:
        if spec.ranks:
            next = tl.max(tl.where(competes & (rank == take), mine, -float("inf")), 0)
            above = competes & (mine > next)
        else:
            above = competes & (key > _of_rank(key, take, spec))
        return tl.where(take == now, competes, above)


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
    token, known, takes_part, competes = _competing(
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
    now = _num(competes)
    if spec.count == "all":
        commit = competes
    elif spec.count == "bernoulli":
        commit = competes & (noise < commit_below)
    else:
        rank, before, key = n * 0, n * 0, n * 0
        if spec.ranks:
            tl.debug_barrier()
            rank, before = _ranks(
                confidence, tokens, eligible, drawn, mine, b, length, mask_token_id, spec
            )
        else:
            key = _ordered(mine, competes, spec)
        base, now_batch = _num(takes_part), now
        if spec.count_rows == "each":
            if starts is not None:
                base = tl.load(starts + b).to(tl.int32)
        else:
            rows_counted = 1 if spec.count_rows == "first" else batch
            base, now_batch = _over_batch(
                tokens, eligible, drawn, starts, rows_counted, length, mask_token_id, spec
            )
        least = now * 0 + 1
        if spec.least_is_quota:
            least = _of_table(table, table_size, base, spec)
        if spec.count == "runs":
            best = _best_of_runs(
                mine, tokens, eligible, drawn, competes, b, length, mask_token_id, spec
            )
            commit = (mine == best) & (mine > _bound(bounds.low, spec))
            commit = competes & (commit | (mine > _bound(bounds.threshold, spec)))
            top = tl.max(tl.where(competes, mine, -float("inf")), 0)
            surest = tl.min(tl.where(competes & (mine == top), n, spec.block), 0)
            commit = commit | (competes & (n == surest))
        elif spec.count == "threshold" or spec.count == "factor" or spec.count == "entropy_bound":
            take = _take(mine, competes, rank, before, now, least, bounds, spec)
            if spec.ranks:
                commit = competes & (rank < take)
            else:
                commit = _first(key, competes, take, spec)
        else:
            given = now * 0
            if num_commit is not None:
                given = tl.load(num_commit + b).to(tl.int32)
            stay = _stay_masked(table, table_size, base, now, now_batch, batch, given, share, spec)
            commit = _cut(mine, competes, key, rank, now - stay, now, spec)
    candidate = candidate.to(tl.int64)
    filled = tl.where(alive & ~known, candidate, token)
    result = tl.where(commit & alive, filled, tl.where(competes, mask_token_id, token))
    if spec.edits:
        edited = takes_part & known & (candidate >= 0) & (value > _bound(bounds.edit, spec))
        result, filled = tl.where(edited, candidate, result), tl.where(edited, candidate, filled)
    if spec.remasks:
        held = takes_part & known
        bound = _remask_bound(scores, held, row, remask_below, remask_chance, spec)
        result = tl.where(held & (noise < bound), mask_token_id, result)
    tl.store(next_tokens + row, result.to(next_tokens.dtype.element_ty), mask=inside)
    tl.store(candidates + row, filled.to(candidates.dtype.element_ty), mask=inside)
