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
from .commit import Library, commit

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
    drawn, score = x.drawn, x.scores
    if drawn is None:
        drawn, score, _ = sample_tokens(x, plan, dtype)
    return commit(_JAX, x, plan, drawn, score, _choice_noise(x, plan))


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


def _largest_of(values: jax.Array, group: jax.Array) -> jax.Array:
    """The largest value (B, N) of each element's group, numbered 0..N."""
    batch, length = values.shape
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    largest = jnp.full((batch, length + 1), -jnp.inf, values.dtype)
    return largest.at[rows, group].max(values)[rows, group]


_JAX = Library(
    np=jnp,
    beside=lambda values, x: jnp.asarray(values),
    cast=lambda x, dtype: x.astype(dtype),
    take=lambda x, index: jnp.take_along_axis(x, index, -1),
    largest_of=_largest_of,
    floating=float_of,
    round_to=round_to,
    remask_below=lambda x, plan: gumbel_below(remask_chance(x, plan)),
)
