"""Which positions a step commits, in Triton: who competes, how many, and the cut.

commit.py has the derivation, and calls these in its kernel.
"""

# mypy: ignore-errors

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl

from ...common.triton_tools import rounded_to, scalar

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
def competing(tokens, eligible, drawn, b, n, length, mask_token_id, spec: tl.constexpr):
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
def num_of(condition):
    """How many positions a condition holds at."""
    return tl.sum(condition.to(tl.int32), 0)


@triton.jit
def over_batch(
    tokens, eligible, drawn, starts, rows, length, mask_token_id, spec: tl.constexpr
):  # fmt: skip
    """(sum of U0, sum of U) over the first `rows` sequences."""
    n = tl.arange(0, spec.block)
    start, now = 0, 0
    for b in range(0, rows):
        _, _, takes_part, competes = competing(
            tokens, eligible, drawn, b, n, length, mask_token_id, spec
        )
        if starts is not None:
            start += tl.load(starts + b).to(tl.int32)
        else:
            start += num_of(takes_part)
        now += num_of(competes)
    return start, now


@triton.jit
def of_table(table, table_size, base, spec: tl.constexpr):
    """A sequence's entry of the table of counts."""
    if spec.base_is_positions:
        base = table_size - 1
    return tl.load(table + tl.minimum(tl.maximum(base, 0), table_size - 1))


@triton.jit
def stay_masked(table, table_size, base, now, now_batch, batch, given, share, spec: tl.constexpr):
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
        return tl.maximum(now - of_table(table, table_size, base, spec), 0)
    else:
        target = of_table(table, table_size, base, spec)
        limit = now_batch if spec.count_rows == "first" else now
        clamps: tl.constexpr = spec.clamps
        for i in tl.static_range(len(clamps)):
            if clamps[i] == "commit_one":
                target = tl.minimum(target, limit - 1)
            else:
                target = tl.maximum(target, 1)
        return tl.minimum(tl.maximum(target, 0), now)


@triton.jit
def ranks(confidence, tokens, eligible, drawn, mine, b, length, mask_token_id, spec: tl.constexpr):
    """(how many surer ones compete, the sum of their negative confidences), [block]."""
    block: tl.constexpr = spec.block
    others: tl.constexpr = spec.others
    n = tl.arange(0, block)
    rank = tl.zeros([block], tl.int32)
    before = tl.zeros([block], tl.float64)
    for first in range(0, length, others):
        other = first + tl.arange(0, others)
        _, _, _, competes = competing(
            tokens, eligible, drawn, b, other, length, mask_token_id, spec
        )
        if num_of(competes) > 0:
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
def ordered(confidence, competes, spec: tl.constexpr):
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
        bound = tl.where(num_of(key >= candidate) > rank, candidate, bound)
    return bound


@triton.jit
def first_of(key, competes, take, spec: tl.constexpr):
    """The `take` largest keys, of equal ones the first."""
    bound = _of_rank(key, take - 1, spec)
    equal = competes & (key == bound)
    room = take - num_of(key > bound)
    chosen = (key > bound) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    return competes & chosen & (take > 0)


@triton.jit
def _segmented(started, a, starts, b):
    return started | starts, tl.where(starts > 0, b, tl.maximum(a, b))


@triton.jit
def best_of_runs(
    confidence, tokens, eligible, drawn, competes, b, length, mask_token_id, spec: tl.constexpr
):  # fmt: skip
    """The largest confidence of the run of neighbours that each position is in."""
    n = tl.arange(0, spec.block)
    _, _, _, left = competing(tokens, eligible, drawn, b, n - 1, length, mask_token_id, spec)
    _, up = tl.associative_scan(((~(competes & left)).to(tl.int32), confidence), 0, _segmented)
    tl.debug_barrier()  # or both neighbours would be in registers
    _, _, _, right = competing(tokens, eligible, drawn, b, n + 1, length, mask_token_id, spec)
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
def bound_of(parts, spec: tl.constexpr):
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
def num_confident(mine, competes, rank, before, now, least, bounds, spec: tl.constexpr):
    """How many of the surest are committed by rules that look at their values."""
    if spec.count == "threshold":
        bound = bound_of(bounds.threshold, spec)
        if spec.has_slack:
            top = tl.max(tl.where(competes, mine, -float("inf")), 0)
            bound = tl.minimum(bound, _as_score(top - bound_of(bounds.slack, spec), spec))
        if spec.threshold_strict:
            passing = mine > bound
        else:
            passing = mine >= bound
        take = num_of(competes & passing)
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
def cut(mine, competes, key, rank, take, now, spec: tl.constexpr):
    """The competing positions above the rule's cut where `take` of `now` are to be committed."""
    if spec.cut == "exact":
        if spec.ranks:
            return competes & (rank < take)
        else:
            return first_of(key, competes, take, spec)
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
