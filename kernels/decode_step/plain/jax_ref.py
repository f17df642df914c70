"""The decode step in plain jax.numpy, all rows at once: the unfused baseline, and the fallback.

It runs wherever jax does and traces under `jax.jit` with the plan static.  The meaning is that of
reference.py; the arithmetic is float32.  Rules that score in float64 do so where 64-bit types are
enabled (`jax_enable_x64`); without them they are scored, and confidences returned, in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...common import philox
from ...common.philox import GROUPS, LEAF, PER_GROUP, jax_form
from ..inputs import StepInputs
from ..jax_shared import float_of, gumbel_below, remask_chance
from ..rule.plan import StepPlan

_BIG = 2**31 - 1
_FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Columns:
    """Which columns of the vocabulary are here: all, or a shard's, from column `first` on.

    Of a shard, every result is that of the whole row, on every chip of the mesh's `axis`; chips
    exchange one number a row for each call.
    """

    axis: str | None = None
    first: Any = 0

    def top(self, x: jax.Array) -> jax.Array:
        """The largest of each row, (..., 1)."""
        top = x.max(-1, keepdims=True)
        return top if self.axis is None else jax.lax.pmax(top, self.axis)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of each row, (...)."""
        total = x.sum(-1)
        return total if self.axis is None else jax.lax.psum(total, self.axis)

    def best(self, keys: jax.Array, first: Any) -> jax.Array:
        """Number of the largest key, (...), of equal ones the lowest; `first`: that of keys[..., 0]."""
        here = keys.argmax(-1) + first
        if self.axis is None:
            return here
        top = keys.max(-1)
        is_best = top == jax.lax.pmax(top, self.axis)
        return jax.lax.pmin(jnp.where(is_best, here, _BIG), self.axis)

    def take(self, values: jax.Array, column: jax.Array) -> jax.Array:
        """values (..., columns here) at a column of the whole row, (...)."""
        size = values.shape[-1]
        place = column - self.first
        found = _take(values, place.clip(0, size - 1))
        return self.of_owner(found, (place >= 0) & (place < size))

    def of_owner(self, x: jax.Array, is_here: jax.Array) -> jax.Array:
        """x (...) of the chip that has it."""
        if self.axis is None:
            return x
        return jax.lax.pmax(
            jnp.where(is_here, x, -jnp.inf if x.dtype.kind == "f" else -1), self.axis
        )

    def pair(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The two largest of each row, (...); 0 for a second where there is but one column."""
        found = jax.lax.top_k(x, min(2, x.shape[-1]))[0]
        found = jnp.pad(found, [(0, 0)] * (x.ndim - 1) + [(0, 2 - found.shape[-1])])
        if self.axis is None:
            return found[..., 0], found[..., 1]
        first = jax.lax.pmax(found[..., 0], self.axis)
        mine = jax.lax.axis_index(self.axis)
        owner = jax.lax.pmin(jnp.where(found[..., 0] == first, mine, _BIG), self.axis)
        rest = jnp.where(owner == mine, found[..., 1], found[..., 0])
        return first, jax.lax.pmax(rest, self.axis)


_ALL = Columns()


def decode_step(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence), each (B, N); `dtype` is that of the logits."""
    how, known = plan.commit, x.tokens != x.mask_token_id
    drawn, score = x.drawn, x.scores
    if drawn is None:
        drawn, score, _ = sample_tokens(x, plan, dtype)
    wide = float_of(how.is_wide)
    eligible = x.eligible if how.revises else x.eligible & ~known  # who competes
    if how.skips_mask:
        eligible = eligible & (drawn != x.mask_token_id)
    found = drawn >= 0  # before a dtype without a sign
    drawn = drawn.astype(x.tokens.dtype)
    alive = eligible & (known | found)
    candidates = jnp.where(alive & ~known, drawn, x.tokens)
    noise = _choice_noise(x, plan)
    score = (x.scores if how.source == "given" else score).astype(wide)
    if noise is not None and how.source == "random":
        score = noise.astype(wide)
    elif noise is not None and how.adds_noise:
        score = score + plan.numbers.choice_temperature * noise.astype(wide)
    ranked = jnp.where(alive & ~jnp.isnan(score), score, -jnp.inf)
    commit = select(ranked, eligible, x, noise, plan)
    mask = jnp.asarray(x.mask_token_id, x.tokens.dtype)
    next_tokens = jnp.where(commit & alive, candidates, jnp.where(eligible, mask, x.tokens))
    if how.edits:
        edited = x.eligible & known & found & (score > plan.numbers.edit_threshold)
        next_tokens = jnp.where(edited, drawn, next_tokens)
        candidates = jnp.where(edited, drawn, candidates)
    if how.remasks:
        assert noise is not None
        again = x.eligible & known & (noise < gumbel_below(remask_chance(x, plan)))
        next_tokens = jnp.where(again, mask, next_tokens)
    return next_tokens, candidates, jnp.where(known & ~eligible, jnp.inf, ranked)


def sample_tokens(
    x: StepInputs, plan: StepPlan, dtype: str, columns: Columns = _ALL
) -> tuple[Any, Any, Any]:
    """(candidate or -1, score, log_z), each (B, N); (-1, -inf, -inf) where not eligible.

    Of a shard of the logits, on every chip the whole rows' results (jax_mesh.py).  Candidates are
    int32, int64 with 64-bit types enabled; score and log_z float32, float64 for rules that score in
    float64 with 64-bit types enabled.
    """
    how, start = plan.row, plan.row.vocab_start
    row = _rows(x, plan, dtype, columns)
    alive = x.eligible & jnp.isfinite(columns.top(jnp.where(row < jnp.inf, row, -jnp.inf)))[..., 0]
    row = jnp.minimum(row, _FLOAT_MAX)  # +inf wins like the largest float
    filtered = jnp.where(keep_mask(row, plan), row, -jnp.inf) if how.filters else row
    token = _draw(filtered, x, plan, columns)
    known = x.eligible & (x.tokens != x.mask_token_id)
    scored = alive
    if how.holds:  # scores the token that stands there
        own, size = x.tokens - start, row.shape[-1] * columns_of(columns)
        token = jnp.where(known, own.clip(0, size - 1), token)
        scored = alive & (~known | ((own >= 0) & (own < size)))
    base = filtered if how.score_filtered else row
    if how.score_banned:
        is_out = _is_one_of(how.score_banned, row.shape[-1], columns)
        base = jnp.where(is_out, -jnp.inf, base)
    score, log_z = _score(base, token, plan, columns)
    if how.score_banned:  # where nothing is left in the score's softmax
        score = jnp.where(jnp.isnan(score), 0.0 if how.score == "prob" else -jnp.inf, score)
    drawn = jnp.where(alive, token + start, -1)
    return (
        jnp.where(known, x.tokens, drawn) if how.holds else drawn,
        jnp.where(scored, score, -jnp.inf),
        jnp.where(alive, log_z, -jnp.inf),
    )


def columns_of(columns: Columns) -> int:
    """Number of shards."""
    return 1 if columns.axis is None else jax.lax.axis_size(columns.axis)


def _is_one_of(wanted: tuple[int, ...], size: int, columns: Columns) -> jax.Array:
    """(size,) bool: whether a column is one of those."""
    here = jnp.arange(size, dtype=jnp.int32) + columns.first
    return (here[:, None] == np.array(wanted, np.int32)).any(-1)


def _rows(x: StepInputs, plan: StepPlan, dtype: str, columns: Columns) -> jax.Array:
    """Rows with guidance mixed in, NaN and banned columns as -inf."""
    compute = float_of(plan.row.is_wide)
    row = jnp.asarray(x.logits).astype(compute)
    if x.uncond_logits is not None:
        if plan.row.guidance != "float32":
            row = _guided_by_operations(x, plan.row.guidance, dtype).astype(compute)
        else:
            uncond, scale = (
                jnp.asarray(a).astype(compute) for a in (x.uncond_logits, x.guidance_scale)
            )
            row = _in_float32(uncond + scale * _in_float32(row - uncond))
    odd, banned = jnp.isnan(row), plan.row.banned_columns(x.mask_token_id)
    if banned:
        odd = odd | _is_one_of(banned, row.shape[-1], columns)
    return jnp.where(odd, -jnp.inf, row)


def _guided_by_operations(x: StepInputs, form: str, dtype: str) -> jax.Array:
    """Guidance in a form, each operation one of float32 rounded to the dtype of the logits."""
    cond, uncond, full = (
        jnp.asarray(a).astype(jnp.float32) for a in (x.logits, x.uncond_logits, x.guidance_scale)
    )
    rest = full - 1

    def near(values: jax.Array) -> jax.Array:
        return round_to(values, dtype)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        rounded = near(a * b)  # the choice keeps XLA from joining it with the sum after it
        return jnp.where(rounded == 0, 0.0, rounded)

    if form == "weighted":
        return near(product(full, cond) - product(rest, uncond))
    start, weight = (uncond, full) if form == "from_uncond" else (cond, rest)
    return near(start + product(weight, near(cond - uncond)))


def _in_float32(x: jax.Array) -> jax.Array:
    """`x`, infinite where it overflows float32."""
    if x.dtype == jnp.float32:
        return x
    return jnp.where(jnp.isinf(x.astype(jnp.float32)), x * jnp.inf, x)


def _scaled(
    row: jax.Array, temperature: Any, columns: Columns = _ALL
) -> tuple[jax.Array, jax.Array]:
    """(row - its maximum) / temperature, and that maximum; finite entries never overflow to NaN."""
    top = columns.top(row)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return (row - top) / temperature, top


def _log_sum_exp(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """log of the sum of exp(x); -inf where nothing is finite."""
    top = x.max(axis, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.log(jnp.exp(x - top).sum(axis)) + jnp.squeeze(top, axis)


def _take(values: jax.Array, index: jax.Array) -> jax.Array:
    """values (..., K) at index (...), along the last axis."""
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _draw(row: jax.Array, x: StepInputs, plan: StepPlan, columns: Columns) -> jax.Array:
    """Candidates (B, N): argmax, Gumbel-max on injected noise, or the hierarchical draw."""
    temperature = plan.numbers.sample_temperature
    if not plan.row.draws:
        if plan.row.greedy_on_probs:
            exps = jnp.exp(_scaled(row, 1.0, columns)[0])
            probs = exps / columns.total(exps)[..., None]
            row = round_to(probs, plan.row.score_dtype)
        return columns.best(row, columns.first)
    if x.token_gumbel is not None:
        noisy = row + temperature * jnp.asarray(x.token_gumbel).astype(row.dtype)
        keys = jnp.where(jnp.isfinite(row) & ~jnp.isnan(noisy), noisy, -jnp.inf)
        none = jnp.isneginf(columns.top(keys))
        return columns.best(jnp.where(none, row, keys), columns.first)
    scaled = _scaled(row, temperature, columns)[0]
    leaves = -(-row.shape[-1] // LEAF)
    after = leaves * LEAF - row.shape[-1]
    scaled = jnp.pad(scaled, ((0, 0), (0, 0), (0, after)), constant_values=-jnp.inf)
    tree = scaled.reshape(*row.shape[:2], leaves, PER_GROUP, GROUPS)
    start = columns.first // LEAF  # a shard begins with a leaf

    def variates(stream: int, size: int, first: Any = 0) -> jax.Array:
        return jax_form.gumbel(x.seeds, x.positions, plan.numbers.step, stream, size, first)

    keys = _log_sum_exp(tree, (-2, -1)) + variates(philox.STREAM_LEAF, leaves, start)
    leaf = columns.best(keys, start)
    here = (leaf - start).clip(0, leaves - 1)
    inside = jnp.take_along_axis(tree, here[..., None, None, None], axis=-3)[..., 0, :, :]
    inner = variates(philox.STREAM_INNER, GROUPS + PER_GROUP)
    group = (_log_sum_exp(inside, -2) + inner[..., :GROUPS]).argmax(-1)
    inside = jnp.take_along_axis(inside, group[..., None, None], axis=-1)[..., 0]
    token = leaf * LEAF + (inside + inner[..., GROUPS:]).argmax(-1) * GROUPS + group
    return columns.of_owner(token, here == leaf - start)


def _score(
    row: jax.Array, token: jax.Array, plan: StepPlan, columns: Columns
) -> tuple[jax.Array, jax.Array]:
    """The rule's score of the candidates and log Z, in the compute dtype."""
    kind, temperature = plan.row.score, plan.numbers.score_temperature
    z, top = _scaled(row, temperature, columns)
    exps = jnp.exp(z)
    total = columns.total(exps)
    log_total = jnp.log(total)
    log_z = top[..., 0] / temperature + log_total
    if kind == "logit":
        value = columns.take(row, token)
    elif kind in ("random", "given"):
        value = jnp.zeros_like(total)
    elif kind == "margin":
        one, two = (v / total for v in columns.pair(exps))
        one, two = (round_to(v, plan.row.score_dtype) for v in (one, two))
        value = one - two
    elif kind == "neg_entropy":
        value = columns.total(jnp.where(exps > 0, exps * z, 0.0)) / total - log_total
    elif kind == "log_prob":
        value = columns.take(z, token) - log_total
    elif kind == "prob":
        value = jnp.exp(columns.take(z, token)) / total
    else:
        value = columns.top(exps)[..., 0] / total
    return round_to(value, plan.row.score_dtype), log_z


def keep_mask(row: jax.Array, plan: StepPlan) -> jax.Array:
    """Which tokens survive the rule's filters, applied one after the other."""
    keep = jnp.isfinite(row)
    for name, value, divides in plan.row.filters:
        left = jnp.where(keep, row, -jnp.inf)
        if name == "top_k":  # on the logits: two of them may not become equal by a division
            size = min(int(value), row.shape[-1])
            keep = keep & (row >= jax.lax.top_k(left, size)[0][..., -1:])
            continue
        scaled = _scaled(row, plan.numbers.filter_temperature if divides else 1.0)[0]
        kept = jnp.where(keep, scaled, -jnp.inf)
        if name == "min_p":
            keep = keep & (scaled >= kept.max(-1, keepdims=True) + math.log(value))
        else:
            below = name == "top_p" and plan.row.nucleus_below
            keep = keep & _nucleus(kept, left, name, value, below)
    return keep


def _nucleus(scaled: jax.Array, row: jax.Array, name: str, limit: float, below: bool) -> jax.Array:
    """top_p: the most probable tokens until their sum passes p; typical_p: the most typical ones.

    The token that passes the limit is kept; among equals the lowest index comes first.
    """
    log_p = scaled - _log_sum_exp(scaled, -1)[..., None]
    probs = jnp.exp(log_p)
    if name == "top_p":
        key = -row
    else:
        entropy = -jnp.where(probs > 0, probs * log_p, 0.0).sum(-1, keepdims=True)
        key = jnp.where(jnp.isfinite(log_p), jnp.abs(-log_p - entropy), jnp.inf)
    order = jnp.argsort(key, axis=-1, stable=True)
    ranked = jnp.take_along_axis(probs, order, axis=-1)
    total = jnp.cumsum(ranked, axis=-1)
    within = ((total if below else total - ranked) <= limit).at[..., 0].set(True)
    return jnp.take_along_axis(within, jnp.argsort(order, axis=-1), axis=-1)


def select(
    confidence: jax.Array,
    eligible: jax.Array,
    x: StepInputs,
    noise: jax.Array | None,
    plan: StepPlan,
) -> jax.Array:
    """Which of the competing positions are committed, (B, N) bool."""
    count, cut = plan.commit.count, plan.commit.cut
    if count == "all":
        return eligible
    if count == "bernoulli":
        assert noise is not None
        return eligible & (noise < plan.numbers.commit_below)
    now = eligible.sum(-1, keepdims=True, dtype=jnp.int32)
    order = jnp.argsort(-jnp.where(eligible, confidence, -jnp.inf), axis=-1, stable=True)
    falling = jnp.take_along_axis(eligible, order, axis=-1)
    among = jnp.cumsum(falling, axis=-1, dtype=jnp.int32) - 1
    rank = jnp.take_along_axis(among, jnp.argsort(order, axis=-1), axis=-1)  # 0 is the surest

    def ranked(index: jax.Array) -> jax.Array:
        """Confidence of the eligible position of rank `index` (B, 1); -inf where there is none."""
        here = eligible & (rank == index)
        return jnp.where(here, confidence, -jnp.inf).max(-1, keepdims=True, initial=-jnp.inf)

    if count == "runs":
        return _best_of_runs(confidence, eligible, plan) | (eligible & (rank == 0))
    if count in ("threshold", "factor", "entropy_bound"):
        take = _confident(confidence, eligible, rank, now, plan)
        least = jnp.ones_like(now)
        if plan.commit.least_is_quota:
            least = _of_table(plan, x.num_masked_at_start, now[:, 0])[:, None]
        return eligible & (rank < jnp.maximum(take, least))
    stay = _stay_masked(plan, x, now[:, 0])[:, None]
    exact = eligible & (rank < now - stay)
    if cut == "exact":
        return exact
    if cut == "strict":  # rank U - 1 - k is sorted[k]; known positions are +inf above it
        floor = jnp.where(stay < now, ranked(now - 1 - stay), jnp.inf)
        commit = eligible & (confidence >= floor)
    else:
        commit = eligible & (confidence > ranked(now - stay))
    return jnp.where(stay == 0, exact, commit)


def _of_table(plan: StepPlan, at_start: Any, now: jax.Array) -> jax.Array:
    """Each row's entry of the table, (B,)."""
    table = jnp.asarray(plan.numbers.table, dtype=jnp.int32)
    if plan.commit.base_is_positions:
        return jnp.broadcast_to(table[-1], now.shape)
    start = jnp.asarray(at_start).astype(jnp.int32)
    if plan.commit.count_rows == "first":
        start = jnp.broadcast_to(start[:1], start.shape)
    elif plan.commit.count_rows == "sum":
        start = jnp.broadcast_to(start.sum(), start.shape)
    return table[start.clip(0, table.size - 1)]


def _stay_masked(plan: StepPlan, x: StepInputs, now: jax.Array) -> jax.Array:
    """counts.next_masked_counts on arrays: how many of each row's positions stay masked, (B,)."""
    how = plan.commit
    if how.count == "given":
        return jnp.clip(now - jnp.asarray(x.num_commit).astype(jnp.int32), 0, now)
    if how.count == "fraction":  # from the host: not every device rounds a division correctly
        shares = jnp.asarray(plan.numbers.shares, dtype=jnp.int32)
        return jnp.maximum(now - shares[now.sum() if how.count_rows == "mean" else now], 0)
    target = _of_table(plan, x.num_masked_at_start, now)
    if how.count == "quota":
        return jnp.maximum(now - target, 0)
    limit = jnp.broadcast_to(now[:1], now.shape) if how.count_rows == "first" else now
    for clamp in how.clamps:
        is_upper = clamp == "commit_one"
        target = jnp.minimum(target, limit - 1) if is_upper else jnp.maximum(target, 1)
    return jnp.clip(target, 0, now)


def _confident(
    confidence: jax.Array,
    eligible: jax.Array,
    rank: jax.Array,
    now: jax.Array,
    plan: StepPlan,
) -> jax.Array:
    """How many of the surest a rule commits that looks at their values, (B, 1)."""
    how, numbers, kind = plan.commit, plan.numbers, confidence.dtype
    bound = jnp.asarray(numbers.threshold, kind)
    if how.count == "threshold":
        if how.has_slack:
            top = jnp.where(eligible, confidence, -jnp.inf).max(-1, keepdims=True, initial=-jnp.inf)
            below = top - jnp.asarray(numbers.threshold_slack, kind)
            bound = jnp.minimum(bound, round_to(below, how.compared_in))
        above = confidence > bound if how.threshold_strict else confidence >= bound
        return (eligible & above).sum(-1, keepdims=True, dtype=jnp.int32)
    if how.count == "entropy_bound":
        order = jnp.argsort(jnp.where(eligible, rank, rank.shape[-1]), axis=-1, stable=True)
        falling = jnp.take_along_axis(jnp.where(eligible, confidence, 0.0), order, axis=-1)
        within = jnp.cumsum(-falling, axis=-1) + falling <= bound
        return jnp.cumprod(within.astype(jnp.int32), axis=-1).sum(-1, keepdims=True)
    size = eligible.shape[-1]
    bounds = jnp.asarray(numbers.bounds, kind)
    failing = eligible & (rank >= 1) & (confidence < bounds[rank])  # the first passes
    first = jnp.where(failing, rank, now).min(-1, keepdims=True, initial=size)
    first = jnp.minimum(first, now)
    # Fast-dLLM's off-by-one: a failure at the last index is committed all the same.
    ends = (now <= 2) | (first == now - 1)
    return jnp.where(ends, now, first) if how.factor_tail else first


def _best_of_runs(confidence: jax.Array, eligible: jax.Array, plan: StepPlan) -> jax.Array:
    """Of each run of neighbouring positions the best above `low_threshold`, and all above `threshold`."""
    batch, length = eligible.shape
    starts = eligible & ~jnp.pad(eligible, ((0, 0), (1, 0)))[:, :-1]
    run = jnp.where(eligible, jnp.cumsum(starts, axis=-1, dtype=jnp.int32), 0)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    best = jnp.full((batch, length + 1), -jnp.inf, confidence.dtype)
    best = best.at[rows, run].max(jnp.where(eligible, confidence, -jnp.inf))
    is_best = (confidence == best[rows, run]) & (confidence > plan.numbers.low_threshold)
    return eligible & (is_best | (confidence > plan.numbers.threshold))


def _choice_noise(x: StepInputs, plan: StepPlan) -> jax.Array | None:
    """(B, N) Gumbel noise for confidences, or None where this step has no use for it."""
    if not plan.commit.uses_noise:
        return None
    if x.choice_gumbel is not None:
        return jnp.asarray(x.choice_gumbel)
    gumbel = jax_form.gumbel(x.seeds, x.positions, plan.numbers.step, philox.STREAM_CHOICE, 1)
    return gumbel[..., 0]


def round_to(values: jax.Array, dtype: str) -> jax.Array:
    """`values` rounded to a dtype, in their own."""
    if dtype in ("float32", "float64"):
        return values if dtype == "float64" else values.astype(jnp.float32).astype(values.dtype)
    # XLA may drop a conversion there and back; `reduce_precision` it has to perform, but that
    # flushes subnormals, which matter in float16 (below 2^-14, in steps of 2^-24).
    if dtype == "bfloat16":
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    normal = jax.lax.reduce_precision(values, exponent_bits=5, mantissa_bits=10)
    return jnp.where(jnp.abs(values) < 2.0**-14, jnp.round(values * 2.0**24) * 2.0**-24, normal)
