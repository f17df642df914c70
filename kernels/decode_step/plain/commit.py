"""The second half of a step in torch and in jax.numpy alike: count, select and re-mask.

Written once with what both libraries spell alike (`Library.np`) and the few functions that they do not.
The meaning is that of reference.py, which shares nothing with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..inputs import StepInputs
from ..rule.plan import StepPlan


class Library(NamedTuple):
    """torch or jax.numpy, and what the two spell in two ways.

    beside(values, x): an array or a number of the host as an array on the device of `x`; cast(x, dtype);
    take(x, index): x (B, N) at places of its last axis; largest_of(values, group): the largest value of
    each element's group, groups being 0..N; floating(is_wide): float64 or float32; round_to(x, name):
    rounded to a dtype, in its own; remask_below(x, plan): bounds under which a known position's noise
    masks it again.
    """

    np: Any
    beside: Callable[[Any, Any], Any]
    cast: Callable[[Any, Any], Any]
    take: Callable[[Any, Any], Any]
    largest_of: Callable[[Any, Any], Any]
    floating: Callable[[bool], Any]
    round_to: Callable[[Any, str], Any]
    remask_below: Callable[[StepInputs, StepPlan], Any]


def commit(
    lib: Library, x: StepInputs, plan: StepPlan, drawn: Any, score: Any, noise: Any
) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence) of candidates (-1 for none), scores and noise, (B, N)."""
    np, how, numbers = lib.np, plan.commit, plan.numbers
    known, wide = x.tokens != x.mask_token_id, lib.floating(how.is_wide)
    eligible = x.eligible if how.revises else x.eligible & ~known  # who competes
    if how.skips_mask:
        eligible = eligible & (drawn != x.mask_token_id)
    found = drawn >= 0  # before a dtype without a sign
    drawn = lib.cast(drawn, x.tokens.dtype)
    alive = eligible & (known | found)
    candidates = np.where(alive & ~known, drawn, x.tokens)
    score = lib.cast(x.scores if how.source == "given" else score, wide)
    if noise is not None and how.source == "random":
        score = lib.cast(noise, wide)
    elif noise is not None and how.adds_noise:
        score = score + numbers.choice_temperature * lib.cast(noise, wide)
    ranked = np.where(alive & ~np.isnan(score), score, -math.inf)
    chosen = _select(lib, ranked, eligible, x, noise, plan)
    mask = lib.cast(lib.beside(x.mask_token_id, x.tokens), x.tokens.dtype)
    next_tokens = np.where(chosen & alive, candidates, np.where(eligible, mask, x.tokens))
    if how.edits:
        edited = x.eligible & known & found & (score > numbers.edit_threshold)
        next_tokens = np.where(edited, drawn, next_tokens)
        candidates = np.where(edited, drawn, candidates)
    if how.remasks:
        again = x.eligible & known & (noise < lib.remask_below(x, plan))
        next_tokens = np.where(again, mask, next_tokens)
    return next_tokens, candidates, np.where(known & ~eligible, math.inf, ranked)


def _select(
    lib: Library, confidence: Any, eligible: Any, x: StepInputs, noise: Any, plan: StepPlan
) -> Any:
    """Which of the competing positions are committed, (B, N) bool."""
    np, count, cut = lib.np, plan.commit.count, plan.commit.cut
    if count == "all" or not eligible.shape[-1]:
        return eligible
    if count == "bernoulli":
        return eligible & (noise < plan.numbers.commit_below)
    now = eligible.sum(-1)[:, None]
    order = np.argsort(-np.where(eligible, confidence, -math.inf), stable=True)
    among = np.cumsum(lib.take(eligible, order), -1) - 1
    rank = lib.take(among, np.argsort(order))  # 0 is the surest

    def ranked(index: Any) -> Any:
        """Confidence of the eligible position of rank `index` (B, 1); -inf where there is none."""
        return np.amax(np.where(eligible & (rank == index), confidence, -math.inf), -1)[:, None]

    if count == "runs":
        return _best_of_runs(lib, confidence, eligible, plan) | (eligible & (rank == 0))
    if count in ("threshold", "factor", "entropy_bound"):
        take = _confident(lib, confidence, eligible, rank, now, plan)
        least = np.ones_like(now)
        if plan.commit.least_is_quota:
            least = _of_table(lib, plan, x, now[:, 0])[:, None]
        return eligible & (rank < np.maximum(take, least))
    stay = _stay_masked(lib, plan, x, now[:, 0])[:, None]
    exact = eligible & (rank < now - stay)
    if cut == "exact":
        return exact
    if cut == "strict":  # rank U - 1 - k is sorted[k]; known positions are +inf above it
        floor = np.where(stay < now, ranked(now - 1 - stay), math.inf)
        surest = eligible & (confidence >= floor)
    else:
        surest = eligible & (confidence > ranked(now - stay))
    return np.where(stay == 0, exact, surest)


def _of_table(lib: Library, plan: StepPlan, x: StepInputs, now: Any) -> Any:
    """Each row's entry of the table, (B,)."""
    table, rows = lib.beside(plan.numbers.table, now), plan.commit.count_rows
    if plan.commit.base_is_positions:
        return lib.np.broadcast_to(table[-1], now.shape)
    start = lib.cast(lib.beside(x.num_masked_at_start, now), now.dtype)
    if rows == "first":
        start = lib.np.broadcast_to(start[:1], start.shape)
    elif rows == "sum":
        start = lib.np.broadcast_to(start.sum(), start.shape)
    return lib.cast(table[start.clip(0, table.shape[0] - 1)], now.dtype)


def _stay_masked(lib: Library, plan: StepPlan, x: StepInputs, now: Any) -> Any:
    """counts.next_masked_counts on arrays: how many of each row's positions stay masked, (B,)."""
    np, how, none = lib.np, plan.commit, lib.np.zeros_like(now)
    if how.count == "given":
        left = now - lib.cast(lib.beside(x.num_commit, now), now.dtype)
        return np.minimum(np.maximum(left, none), now)
    if how.count == "fraction":  # from the host: not every device rounds a division correctly
        shares = lib.cast(lib.beside(plan.numbers.shares, now), now.dtype)
        base = np.broadcast_to(now.sum(), now.shape) if how.count_rows == "mean" else now
        return np.maximum(now - shares[base], none)
    target = _of_table(lib, plan, x, now)
    if how.count == "quota":
        return np.maximum(now - target, none)
    limit = np.broadcast_to(now[:1], now.shape) if how.count_rows == "first" else now
    for clamp in how.clamps:
        is_upper = clamp == "commit_one"
        target = np.minimum(target, limit - 1) if is_upper else np.maximum(target, none + 1)
    return np.minimum(np.maximum(target, none), now)


def _confident(
    lib: Library, confidence: Any, eligible: Any, rank: Any, now: Any, plan: StepPlan
) -> Any:
    """How many of the surest a rule commits that looks at their values, (B, 1)."""
    np, how, numbers = lib.np, plan.commit, plan.numbers
    bound = lib.cast(lib.beside(numbers.threshold, confidence), confidence.dtype)
    if how.count == "threshold":
        if how.has_slack:
            top = np.amax(np.where(eligible, confidence, -math.inf), -1)[:, None]
            slack = lib.cast(lib.beside(numbers.threshold_slack, confidence), confidence.dtype)
            bound = np.minimum(bound, lib.round_to(top - slack, how.compared_in))
        above = confidence > bound if how.threshold_strict else confidence >= bound
        return (eligible & above).sum(-1)[:, None]
    if how.count == "entropy_bound":
        order = np.argsort(np.where(eligible, rank, rank.shape[-1]), stable=True)
        falling = lib.take(np.where(eligible, confidence, 0.0), order)
        fails = np.cumsum(-falling, -1) + falling > bound
        return (np.cumsum(fails, -1) == 0).sum(-1)[:, None]
    bounds = lib.cast(lib.beside(numbers.bounds, confidence), confidence.dtype)
    failing = eligible & (rank >= 1) & (confidence < bounds[rank])  # the first always passes
    first = np.amin(np.where(failing, rank, now), -1)[:, None]
    # Fast-dLLM's off-by-one: a failure at the last index is committed all the same.
    ends = (now <= 2) | (first == now - 1)
    return np.where(ends, now, first) if how.factor_tail else first


def _best_of_runs(lib: Library, confidence: Any, eligible: Any, plan: StepPlan) -> Any:
    """Of each run of neighbouring positions the best above `low_threshold`, and all above `threshold`."""
    np = lib.np
    follows = np.concatenate((np.zeros_like(eligible[:, :1]), eligible[:, :-1]), -1)
    run = np.where(eligible, np.cumsum(eligible & ~follows, -1), 0)
    best = lib.largest_of(np.where(eligible, confidence, -math.inf), run)
    is_best = (confidence == best) & (confidence > plan.numbers.low_threshold)
    return eligible & (is_best | (confidence > plan.numbers.threshold))
