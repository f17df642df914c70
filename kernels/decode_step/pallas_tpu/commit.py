"""Count, select and re-mask on a TPU: sequences on sublanes, positions on lanes, no sort.

The score gets its noise and becomes the confidence.  The rank of a position is how many surer ones
compete, ties by position: each 128 confidences are compared with each other 128 in 128 rotations, which
makes N^2 / 1024 comparisons of registers for 8 sequences.  A rule's count and cut are then comparisons of
ranks; the k-th largest confidence is the one whose rank is k.

Limits: N at most 2^15, so that a block of sequences fits in VMEM (launch.py).  Scores
are float32, for rules that score in float64 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...common.philox import STREAM_CHOICE
from ...common.philox.pallas_form import exponentials
from .tiles import round_to

LANES = 128
UNROLL = 8  # rotations of a loop's body
ROUNDS = LANES // UNROLL
LOWEST = np.int32(-(2**31))


@dataclass(frozen=True)
class CommitSpec:
    """What the commit kernel is compiled for: the second half of a plan (plan.CommitPlan).

    rows: sequences of a block; length: N; source: where scores come from, "drawn", "random" or
    "given"; noise: "none", "stream" or "given".  looks_up: a sequence's count is an entry of the table;
    else it is the same for all, or given.
    """

    rows: int
    length: int
    mask_token_id: int
    count: str = "masked"
    cut: str = "exact"
    looks_up: bool = False
    least_is_quota: bool = False
    fraction_of_mean: bool = False
    limit_is_given: bool = False
    clamps: tuple[str, ...] = ()
    source: str = "drawn"
    noise: str = "none"
    adds_noise: bool = False
    threshold_strict: bool = False
    has_slack: bool = False
    factor_tail: bool = True
    revise: bool = False
    touches_known: bool = False
    edits: bool = False
    remasks: bool = False
    remasks_by_score: bool = False
    skip_mask_token: bool = False
    compared_in: str = ""  # the dtype of a bound that is computed

    @property
    def width(self) -> int:
        """N, to whole registers."""
        return -(-self.length // LANES) * LANES

    @property
    def needs_ranks(self) -> bool:
        """Whether positions are compared with each other."""
        return self.count not in ("all", "bernoulli")


class Scalars(NamedTuple):
    """What may change from step to step without a new kernel, in SMEM."""

    choice_temperature: Any
    commit_below: Any
    commit_fraction: Any
    remask_below: Any
    remask_chance: Any
    threshold: Any
    threshold_slack: Any
    low_threshold: Any
    edit_threshold: Any


class Inputs(NamedTuple):
    """Arrays in VMEM: [rows, width], of sequences [rows, 1 or 2], and the table [1, size]."""

    tokens: Any
    drawn: Any
    eligible: Any
    score: Any
    scores: Any
    positions: Any
    gumbel: Any
    start: Any
    num_commit: Any
    seeds: Any
    table: Any


def _num(condition: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(condition, 1, 0), axis=1, keepdims=True)


def _top(x: jax.Array) -> jax.Array:
    return jnp.max(x, axis=1, keepdims=True)


def _flipped(bits: jax.Array) -> jax.Array:
    """Bits of floats as signed integers in the order of the floats, and back."""
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _ranks(keys: Any, ranks: Any, before: Any, spec: CommitSpec) -> None:
    """Of each position: how many surer ones there are, and the sum of their negative confidences.

    keys, ranks, before: references, [rows, width]; keys are integers in the order of the confidences.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    blocks, sums = spec.width // LANES, spec.count == "entropy_bound"
    ranks[...] = jnp.zeros(ranks.shape, jnp.int32)
    if sums:
        before[...] = jnp.zeros(before.shape, jnp.float32)

    def at(i: Any) -> Any:
        return slice(None), pl.ds(
            i * LANES if isinstance(i, int) else pl.multiple_of(i * LANES, LANES), LANES
        )

    def others(k: Any, nothing: Any) -> Any:
        j, first = k >> ROUNDS.bit_length() - 1, (k & ROUNDS - 1) * UNROLL
        theirs = keys[at(j)]
        turned = [(first + r, pltpu.roll(theirs, first + r, 1)) for r in range(UNROLL)]

        def mine(i: Any, nothing: Any) -> Any:
            key, rank = keys[at(i)], ranks[at(i)]
            for shift, other in turned:
                # lane l meets position l - shift of theirs, an earlier one where it did not wrap
                start = jnp.where(j < i, 0, jnp.where((j == i) & (shift > 0), shift, LANES))
                surer = other > key - jnp.where(lane >= start, 1, 0)
                rank += jnp.where(surer, 1, 0)
                if sums:
                    value = jax.lax.bitcast_convert_type(_flipped(other), jnp.float32)
                    before[at(i)] -= jnp.where(surer, value, 0.0)
            ranks[at(i)] = rank
            return nothing

        if blocks <= 4:
            for i in range(blocks):
                mine(i, nothing)
            return nothing
        return jax.lax.fori_loop(0, blocks, mine, nothing)

    jax.lax.fori_loop(0, blocks * ROUNDS, others, 0)


def _ranks_of_one(mine: jax.Array, keys: Any, before: Any, spec: CommitSpec) -> Any:
    """`_ranks` of one sequence, [1, width], whose blocks of 128 go on sublanes; in one array each."""
    blocks, sums = spec.width // LANES, spec.count == "entropy_bound"
    for i in range(blocks):
        keys[i : i + 1, :] = mine[:, i * LANES : (i + 1) * LANES]
    key = keys[...]
    lane = jax.lax.broadcasted_iota(jnp.int32, key.shape, 1)
    block = jax.lax.broadcasted_iota(jnp.int32, key.shape, 0)

    def others(k: Any, carry: Any) -> Any:
        rank, total = carry
        j, first = k >> ROUNDS.bit_length() - 1, (k & ROUNDS - 1) * UNROLL
        theirs = jnp.max(jnp.where(block == j, key, LOWEST), axis=0, keepdims=True)
        start = jnp.where(block == j, 0, jnp.where(block > j, -LANES, LANES))
        for r in range(UNROLL):
            shift = first + r
            other = pltpu.roll(theirs, shift, 1)
            earlier = (lane >= start + shift) & ((start != 0) | (shift > 0))
            surer = other > key - jnp.where(earlier, 1, 0)
            rank += jnp.where(surer, 1, 0)
            if sums:
                value = jax.lax.bitcast_convert_type(_flipped(other), jnp.float32)
                total -= jnp.where(surer, value, 0.0)
        return rank, total

    start = jnp.zeros(key.shape, jnp.int32), jnp.zeros(key.shape, jnp.float32)
    rank, total = jax.lax.fori_loop(0, blocks * ROUNDS, others, start)
    rows = [x[i : i + 1] for x in (rank, total) for i in range(blocks)]
    flat = [jnp.concatenate(part, axis=1) for part in (rows[:blocks], rows[blocks:])]
    before[...] = flat[1]
    return flat[0]


def _of_table(x: Inputs, takes_part: jax.Array) -> jax.Array:
    """Each sequence's entry of the table, [rows, 1]: at the number masked at the start."""
    base = _num(takes_part) if x.start is None else x.start
    size = x.table.shape[1]
    entry = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    found = jnp.where(entry == jnp.clip(base, 0, size - 1), x.table, 0)
    return jnp.sum(found, axis=1, keepdims=True)


def _stay(target: Any, limit: Any, now: Any, n: Scalars, spec: CommitSpec) -> jax.Array:
    """counts.next_masked_counts: how many of a sequence's U = `now` stay masked, [rows, 1]."""
    if spec.count == "given":
        return jnp.clip(now - target, 0, now)
    if spec.count == "fraction":
        if spec.fraction_of_mean:
            return jnp.maximum(now - target, 0)
        return now - (now.astype(jnp.float32) * n.commit_fraction).astype(jnp.int32)
    if spec.count == "quota":
        return jnp.maximum(now - target, 0)
    limit = limit if spec.limit_is_given else now
    for clamp in spec.clamps:
        is_upper = clamp == "commit_one"
        target = jnp.minimum(target, limit - 1) if is_upper else jnp.maximum(target, 1)
    return jnp.clip(target, 0, now)


def _bounds_of_ranks(bounds: Any, rank: Any, spec: CommitSpec) -> jax.Array:
    """bounds[rank] of numbers in SMEM: they come from the host, rounded once from float64."""

    def of(k: Any, found: Any) -> Any:
        return jnp.where(rank == k, bounds[0, k], found)

    return jax.lax.fori_loop(0, spec.length, of, jnp.zeros(rank.shape, jnp.float32))


def _take(
    mine: Any, competes: Any, rank: Any, before: Any, now: Any, least: Any, bounds: Any,
    n: Scalars, spec: CommitSpec,
) -> jax.Array:  # fmt: skip
    """How many of the surest are committed by rules that look at their values, [rows, 1]."""
    if spec.count == "threshold":
        bound = jnp.full(now.shape, n.threshold, jnp.float32)
        if spec.has_slack:
            top = _top(jnp.where(competes, mine, -jnp.inf))
            below = top - n.threshold_slack
            bound = jnp.minimum(bound, round_to(below, spec.compared_in))
        take = _num(competes & ((mine > bound) if spec.threshold_strict else (mine >= bound)))
    elif spec.count == "entropy_bound":
        failing = competes & ~(before <= n.threshold)
        take = jnp.min(jnp.where(failing, rank, now), axis=1, keepdims=True)
    else:
        bound = _bounds_of_ranks(bounds, rank, spec)
        failing = competes & (rank >= 1) & (mine < bound)
        take = jnp.min(jnp.where(failing, rank, now), axis=1, keepdims=True)
        if spec.factor_tail:  # Fast-dLLM's off-by-one
            take = jnp.where((now <= 2) | (take == now - 1), now, take)
    return jnp.minimum(jnp.maximum(take, least), now)


def _cut(mine: Any, competes: Any, rank: Any, take: Any, now: Any, spec: CommitSpec) -> jax.Array:
    """The competing positions above the rule's cut where `take` of `now` are to be committed."""
    exact = competes & (rank < take)
    if spec.cut == "exact":
        return exact
    index = take - 1 if spec.cut == "strict" else take
    value = _top(jnp.where(competes & (rank == index), mine, -jnp.inf))
    above = (mine >= value) & (take > 0) if spec.cut == "strict" else mine > value
    cut = competes & above
    return (exact & (take == now)) | (cut & (take != now))


def _best_of_runs(mine: Any, competes: Any, lane: Any, spec: CommitSpec) -> jax.Array:
    """The largest confidence of the run of neighbours that each position is in, by doubling."""
    best = jnp.where(competes, mine, -jnp.inf)
    for sign in (1, -1):  # from the left, then of that from the right
        joined, reach, value = jnp.where(competes, 1, 0), 1, best
        while reach < spec.length:
            shift = reach if sign > 0 else spec.width - reach
            inside = (lane >= reach) if sign > 0 else (lane < spec.width - reach)
            left = jnp.where(inside, pltpu.roll(value, shift, 1), -jnp.inf)
            linked = jnp.where(inside, pltpu.roll(joined, shift, 1), 0)
            value = jnp.where(joined > 0, jnp.maximum(value, left), value)
            joined = joined * linked
            reach *= 2
        best = value
    return best


def _remask_bound(scores: Any, held: Any, n: Scalars, spec: CommitSpec) -> jax.Array:
    """What a known position's noise must stay under to mask it again."""
    if not spec.remasks_by_score:
        return jnp.full(held.shape, n.remask_below)
    usable = held & (jnp.abs(scores) < jnp.inf)
    key = jnp.where(usable, scores, -jnp.inf)
    top = _top(key)
    weight = jnp.where(usable, jnp.exp(key - jnp.where(top > -jnp.inf, top, 0.0)), 0.0)
    total = jnp.sum(weight, axis=1, keepdims=True)
    share = n.remask_chance * weight / jnp.where(total > 0, total, 1.0)
    inside = jnp.where(share > 0, jnp.minimum(share, 1 - 1e-7), 0.5)
    bound = jnp.where(share >= 1, jnp.inf, -jnp.log(-jnp.log(inside)))
    return jnp.where(share > 0, bound, -jnp.inf)


def _noise(x: Inputs, lane: Any, step: Any, spec: CommitSpec) -> jax.Array | None:
    if spec.noise == "none":
        return None
    if spec.noise == "given":
        return x.gumbel
    position = lane if x.positions is None else x.positions
    key = x.seeds[:, :1], x.seeds[:, 1:2]
    wait, _ = exponentials(lane * 0, position, step, STREAM_CHOICE, key)
    return -jnp.log(wait)


def commit_kernel(*refs: Any, spec: CommitSpec, names: tuple[str, ...]) -> None:
    """Grid (blocks of sequences,): what `decode_step` returns, from candidates and scores.

    `names` are the fields of Inputs that are there.
    """
    integers, scalars, *rest = refs
    bounds = rest.pop(0) if spec.count == "factor" else None
    fields = {name: ref[...] for name, ref in zip(names, rest, strict=False)}
    next_ref, candidates_ref, confidence_ref, keys, ranks, before = rest[len(names) :]
    x = Inputs(**{name: fields.get(name) for name in Inputs._fields})
    n = Scalars(*(scalars[0, i] for i in range(len(Scalars._fields))))
    step, target, limit = (integers[0, i] for i in range(3))
    lane = jax.lax.broadcasted_iota(jnp.int32, x.tokens.shape, 1)
    inside = lane < spec.length
    known = inside & (x.tokens != spec.mask_token_id)
    takes_part = inside if spec.touches_known else inside & ~known
    if x.eligible is not None:
        takes_part = takes_part & (x.eligible != 0)
    competes = takes_part if spec.revise else takes_part & ~known
    if spec.skip_mask_token:
        competes = competes & (x.drawn != spec.mask_token_id)
    alive = competes & (known | (x.drawn >= 0))
    filled = jnp.where(alive & ~known, x.drawn, x.tokens)
    noise = _noise(x, lane, step, spec)
    value = {"drawn": x.score, "given": x.scores, "random": noise}[spec.source]
    if spec.adds_noise:
        value = value + n.choice_temperature * noise
    mine = jnp.where(alive & (value == value), value, -jnp.inf)
    now = _num(competes)
    if spec.needs_ranks:
        bits = jax.lax.bitcast_convert_type(mine + 0.0, jnp.int32)  # -0 is 0
        key = jnp.where(competes, _flipped(bits), LOWEST)
        if spec.rows == 1:
            rank = _ranks_of_one(key, keys, before, spec)
        else:
            keys[...] = key
            _ranks(keys, ranks, before, spec)
            rank = ranks[...]
    if spec.looks_up:
        target = _of_table(x, takes_part)
    elif x.num_commit is not None:
        target = x.num_commit
    if spec.count == "all":
        commit = competes
    elif spec.count == "bernoulli":
        commit = competes & (noise < n.commit_below)
    elif spec.count == "runs":
        best = _best_of_runs(mine, competes, lane, spec)
        commit = ((mine == best) & (mine > n.low_threshold)) | (mine > n.threshold)
        commit = competes & (commit | (rank == 0))
    elif spec.count in ("threshold", "factor", "entropy_bound"):
        sums = before[...] if spec.count == "entropy_bound" else None
        least = target if spec.least_is_quota else jnp.ones_like(now)
        commit = competes & (rank < _take(mine, competes, rank, sums, now, least, bounds, n, spec))
    else:
        commit = _cut(mine, competes, rank, now - _stay(target, limit, now, n, spec), now, spec)
    mask = np.int32(spec.mask_token_id)
    result = jnp.where(commit & alive, filled, jnp.where(competes, mask, x.tokens))
    if spec.edits:
        edited = takes_part & known & (x.drawn >= 0) & (value > n.edit_threshold)
        result, filled = jnp.where(edited, x.drawn, result), jnp.where(edited, x.drawn, filled)
    if spec.remasks:
        held = takes_part & known
        again = held & (noise < _remask_bound(x.scores, held, n, spec))
        result = jnp.where(again, mask, result)
    next_ref[...] = result
    candidates_ref[...] = filled
    confidence_ref[...] = jnp.where(known & ~competes, jnp.inf, mine)
