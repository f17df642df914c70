"""The decode step in float64 NumPy, one row at a time: slow, obvious, and the judge of all others.

For a row of logits l (V,) at temperature T the hierarchical draw is three Gumbel races:

    leaf   a: max over leaves of 128 consecutive logits of  log sum exp(l/T) + g_leaf[a]
    group  b: max over the leaf's 16 groups (ids = b mod 16) of  log sum exp(l/T) + g_inner[b]
    token  c: max over the group's 8 ids (id = 16 c + b)    of  l/T + g_inner[16 + c]

The maximum of independent Gumbels shifted by log-masses falls on each with probability
proportional to its mass, so the product of the three choices is softmax(l/T) exactly, for
V/128 + 24 variates instead of V.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..common import philox
from ..common.philox import GROUPS, LEAF, PER_GROUP
from ..common.rounding import F64, round_to
from .inputs import StepInputs
from .rule.counts import count_bases, next_masked_counts
from .rule.plan import StepPlan


def decode_step(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence), each (B, N); `dtype` is that of the logits."""
    how, known = plan.commit, x.tokens != x.mask_token_id
    drawn, score = x.drawn, x.scores
    if drawn is None:
        drawn, score, _ = sample_tokens(x, plan, dtype)
    eligible = x.eligible & (~known | how.revises)  # who competes
    if how.skips_mask:
        eligible = eligible & (drawn != x.mask_token_id)
    alive = eligible & (known | (drawn >= 0))
    candidates = np.where(alive & ~known, drawn, x.tokens)
    noise = _choice_noise(x, plan)
    if how.source == "random":
        score = np.asarray(noise, np.float64)
    elif how.source == "given":
        score = np.asarray(x.scores, np.float64)
    if how.adds_noise:
        with np.errstate(invalid="ignore"):
            score = score + plan.numbers.choice_temperature * noise
    kind = np.float64 if how.is_wide else np.float32
    score = score.astype(kind)
    ranked = np.where(alive & ~np.isnan(score), score, -np.inf).astype(kind)
    commit = select(ranked, eligible, x, noise, plan)
    confidence = np.where(known & ~eligible, np.inf, ranked).astype(kind)
    left = np.where(eligible, x.mask_token_id, x.tokens)
    next_tokens = np.where(commit & alive, candidates, left)
    if how.edits:
        bound = kind(plan.numbers.edit_threshold)
        edited = x.eligible & known & (drawn >= 0) & (score > bound)
        next_tokens = np.where(edited, drawn, next_tokens)
        candidates = np.where(edited, drawn, candidates)
    if how.remasks:
        assert noise is not None
        again = x.eligible & known & (noise < _gumbel_below(remask_chance(x, plan)))
        next_tokens = np.where(again, x.mask_token_id, next_tokens)
    return next_tokens, candidates, confidence


def remask_chance(x: StepInputs, plan: StepPlan) -> F64:
    """The chance of each position to be masked again; for "conf" shared out by the scores."""
    if not plan.commit.remasks_by_score:
        return np.full(x.tokens.shape, plan.numbers.remask_chance)
    known = x.eligible & (x.tokens != x.mask_token_id)
    keys = np.where(known & np.isfinite(x.scores), x.scores.astype(np.float64), -np.inf)
    weights = np.exp(keys - np.maximum(keys.max(axis=1, keepdims=True, initial=-1e300), -1e300))
    total = weights.sum(axis=1, keepdims=True)
    return np.asarray(plan.numbers.remask_chance * weights / np.where(total > 0, total, 1))


def _gumbel_below(chance: F64) -> F64:
    """The bound that a standard Gumbel variate stays under with this probability."""
    with np.errstate(divide="ignore"):
        return np.where(chance >= 1, np.inf, -np.log(-np.log(np.minimum(chance, 1 - 1e-16))))


def sample_tokens(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(candidate or -1, score, log_z), each (B, N); rows that are not eligible give (-1, -inf, -inf)."""
    batch, length, _ = x.logits.shape
    drawn = np.full((batch, length), -1, np.int64)
    score, log_z = (np.full((batch, length), -np.inf) for _ in range(2))
    for b, n in zip(*np.nonzero(x.eligible), strict=True):
        row = guided(x, b, n, plan, dtype)
        start = plan.row.vocab_start
        row[[i for i in plan.row.banned_columns(x.mask_token_id) if i < row.size]] = -np.inf
        held = plan.row.holds and x.tokens[b, n] != x.mask_token_id
        drawn[b, n] = x.tokens[b, n] if held else -1
        if not np.isfinite(row).any():
            continue
        row = np.minimum(row, float(np.finfo(np.float32).max))  # +inf wins like the largest float
        key = None if x.seeds is None else (x.seeds[b, 0], x.seeds[b, 1])
        noise = None if x.token_gumbel is None else x.token_gumbel[b, n].astype(np.float64)
        kept = keep_mask(row, plan)
        filtered = np.where(kept, row, -np.inf)
        base = (filtered if plan.row.score_filtered else row).copy()
        base[[i for i in plan.row.score_banned if i < row.size]] = -np.inf
        log_z[b, n] = log_sum_exp(base / plan.numbers.score_temperature)
        if held:
            token = int(x.tokens[b, n]) - start
            if not 0 <= token < row.size:
                continue
        else:
            token = draw(filtered, plan, noise, key, int(x.positions[b, n]))
        drawn[b, n] = token + start
        score[b, n] = row_score(base, token, plan)
    return drawn, score, log_z


def guided(x: StepInputs, b: int, n: int, plan: StepPlan, dtype: str) -> F64:
    """One row in float64, guidance mixed in, NaN as -inf."""
    with np.errstate(invalid="ignore"):
        row = x.logits[b, n].astype(np.float64)
        if x.uncond_logits is not None:
            uncond = x.uncond_logits[b, n].astype(np.float64)
            if plan.row.guidance != "float32":
                row = _guided_by_operations(row, uncond, x.guidance_scale, plan, dtype)
            else:
                difference = _in_float32(row - uncond)
                row = _in_float32(uncond + x.guidance_scale * difference)
    row[np.isnan(row)] = -np.inf
    return np.asarray(row, dtype=np.float64)


def _guided_by_operations(cond: F64, uncond: F64, scale: float, plan: StepPlan, dtype: str) -> F64:
    """Guidance in the rule's form, each operation one of float32 rounded to the dtype of the logits."""

    def near(x: F64) -> F64:
        with np.errstate(over="ignore"):
            return round_to(x.astype(np.float32), dtype)

    form, full = plan.row.guidance, np.float32(scale)
    rest = full - np.float32(1)
    if form == "weighted":
        return near(near(full * cond) - near(rest * uncond))
    start, weight = (uncond, full) if form == "from_uncond" else (cond, rest)
    return near(start + near(weight * near(cond - uncond)))


def _in_float32(x: F64) -> F64:
    """`x`, infinite where it overflows float32: guided logits are such numbers."""
    with np.errstate(over="ignore"):
        return np.where(np.isinf(x.astype(np.float32)), np.sign(x) * np.inf, x)


def draw(row: F64, plan: StepPlan, noise: F64 | None, key: Any, position: int) -> int:
    """The candidate of one row: argmax, Gumbel-max on injected noise, or the hierarchical draw."""
    temperature = plan.numbers.sample_temperature
    if not plan.row.draws:
        if plan.row.greedy_on_probs:
            return int(np.argmax(round_to(softmax(row), plan.row.score_dtype)))
        return int(np.argmax(row))
    if noise is not None:
        perturbed = np.where(np.isfinite(row), row + temperature * noise, -np.inf)
        perturbed = np.where(np.isnan(perturbed), -np.inf, perturbed)
        return int(np.argmax(row if np.isneginf(perturbed).all() else perturbed))
    leaves = -(-row.size // LEAF)
    scaled = np.full(leaves * LEAF, -np.inf)
    scaled[: row.size] = (row - row.max()) / temperature
    tree = scaled.reshape(leaves, PER_GROUP, GROUPS)

    def variates(index: Any, stream: int) -> F64:
        return philox.gumbel(key, index, position, plan.numbers.step, stream)

    mass = np.array([log_sum_exp(leaf) for leaf in tree])
    leaf = int(np.argmax(mass + variates(np.arange(leaves), philox.STREAM_LEAF)))
    inner = variates(np.arange(GROUPS + PER_GROUP), philox.STREAM_INNER)
    groups = np.array([log_sum_exp(tree[leaf, :, g]) for g in range(GROUPS)])
    group = int(np.argmax(groups + inner[:GROUPS]))
    token = int(np.argmax(tree[leaf, :, group] + inner[GROUPS:]))
    return leaf * LEAF + token * GROUPS + group


def row_score(row: F64, token: int, plan: StepPlan) -> float:
    """The rule's score of a candidate, rounded to the rule's score dtype."""
    kind, temperature = plan.row.score, plan.numbers.score_temperature
    if np.isneginf(row).all():  # nothing is in the score's softmax
        value = 0.0 if kind == "prob" else -np.inf
    elif kind == "logit":
        value = row[token]
    elif kind in ("random", "given"):
        value = 0.0
    else:
        probs = softmax(row / temperature)
        if kind == "log_prob" and np.isneginf(row[token]):
            value = -np.inf
        elif kind == "margin":
            pair = np.sort(round_to(probs, plan.row.score_dtype))[::-1][:2]
            value = pair[0] - (pair[1] if pair.size > 1 else 0.0)
        elif kind == "neg_entropy":
            value = float(np.sum(probs[probs > 0] * np.log(probs[probs > 0])))
        elif kind == "log_prob":
            z = (row - row.max()) / temperature
            value = z[token] - log_sum_exp(z)
        else:
            value = probs[token] if kind == "prob" else probs.max()
    return float(round_to(np.asarray(value), plan.row.score_dtype))


def keep_mask(row: F64, plan: StepPlan) -> npt.NDArray[np.bool_]:
    """Which tokens survive the rule's filters, applied one after the other."""
    keep = np.isfinite(row)
    for name, value, divides in plan.row.filters:
        scaled = row / plan.numbers.filter_temperature if divides else row
        if name == "top_k":
            ranked = np.sort(scaled[keep])[::-1]
            keep = keep & (scaled >= ranked[min(int(value), ranked.size) - 1])
        elif name == "min_p":
            keep = keep & (scaled >= scaled[keep].max() + np.log(value))
        else:
            below = name == "top_p" and plan.row.nucleus_below
            keep = _nucleus(np.where(keep, scaled, -np.inf), name, value, below)
    return keep


def _nucleus(scaled: F64, name: str, limit: float, below: bool) -> npt.NDArray[np.bool_]:
    """top_p: the most probable tokens until their sum passes p; typical_p: the most typical ones.

    The token that passes the limit is kept; among equals the lowest index comes first.
    """
    probs = softmax(scaled)
    if name == "top_p":
        order = np.argsort(-scaled, kind="stable")
    else:
        log_p = scaled - log_sum_exp(scaled)
        entropy = -np.sum(probs[probs > 0] * log_p[probs > 0])
        distance = np.where(np.isfinite(log_p), np.abs(-log_p - entropy), np.inf)
        order = np.argsort(distance, kind="stable")
    total = np.cumsum(probs[order])
    within = total if below else total - probs[order]
    keep = np.zeros(scaled.size, bool)
    keep[order[within <= limit]] = True
    keep[order[0]] = True
    return keep & np.isfinite(scaled)


def select(
    confidence: npt.NDArray[Any],
    eligible: npt.NDArray[np.bool_],
    x: StepInputs,
    noise: npt.NDArray[Any] | None,
    plan: StepPlan,
) -> npt.NDArray[np.bool_]:
    """Which of the competing positions are committed, (B, N) bool."""
    count, cut = plan.commit.count, plan.commit.cut
    if count == "all":
        return eligible
    if count == "bernoulli":
        assert noise is not None
        return np.asarray(eligible & (noise < plan.numbers.commit_below))
    now, start = eligible.sum(axis=1), np.asarray(x.num_masked_at_start)
    commit = np.zeros_like(eligible)
    if count in ("masked", "quota", "fraction", "given"):
        stay = next_masked_counts(plan, start, now, x.num_commit)
    for b in np.flatnonzero(now):
        where = np.flatnonzero(eligible[b])
        order = where[np.argsort(-confidence[b, where], kind="stable")]  # surest, lowest first
        ranked = confidence[b, order]
        if count == "runs":
            commit[b, where[best_of_runs(confidence[b, where], where, plan)]] = True
        elif count in ("threshold", "factor", "entropy_bound"):
            least = 1
            if plan.commit.least_is_quota:
                least = int(plan.numbers.table[count_bases(plan, start)[b]])
            commit[b, order[: max(confident(ranked, plan), least)]] = True
        elif cut == "exact" or stay[b] == 0:
            commit[b, order[: order.size - stay[b]]] = True
        elif cut == "strict":  # ranked[::-1][k] is sorted[k]; known positions are +inf above it
            floor = ranked[::-1][stay[b]] if stay[b] < order.size else np.inf
            commit[b, order[ranked >= floor]] = True
        else:
            commit[b, order[ranked > ranked[::-1][stay[b] - 1]]] = True
    return commit


def confident(ranked: npt.NDArray[Any], plan: StepPlan) -> int:
    """How many of the descending confidences a rule commits that looks at their values; 0 or more."""
    how, numbers, kind = plan.commit, plan.numbers, ranked.dtype.type
    bound = kind(numbers.threshold)
    if how.count == "threshold":
        if how.has_slack:
            slack = kind(ranked[0] - kind(numbers.threshold_slack))
            bound = min(bound, kind(round_to(slack[None], how.compared_in)[0]))
        return int((ranked > bound if how.threshold_strict else ranked >= bound).sum())
    if how.count == "entropy_bound":  # confidences are negative entropies
        total = np.add.accumulate(-ranked, dtype=kind)
        return int(np.cumprod((total + ranked) <= bound).sum())
    size = ranked.size
    bounds = numbers.bounds[:size].astype(kind)
    failing = np.flatnonzero(ranked[1:] < bounds[1:]) + 1  # the first always passes
    first = int(failing[0]) if failing.size else size
    ends = how.factor_tail and (size <= 2 or first == size - 1)  # Fast-dLLM's off-by-one
    return size if ends else first


def best_of_runs(
    confidence: npt.NDArray[Any], where: npt.NDArray[Any], plan: StepPlan
) -> npt.NDArray[np.bool_]:
    """Of each run of neighbouring positions the best above `low_threshold`, and all above `threshold`."""
    kind = confidence.dtype.type
    low, high = kind(plan.numbers.low_threshold), kind(plan.numbers.threshold)
    commit = confidence > high
    runs = np.cumsum(np.diff(where, prepend=where[0] - 1) != 1)
    for run in np.unique(runs):
        best = confidence[runs == run].max()
        commit |= (runs == run) & (confidence == best) & (confidence > low)
    commit[np.argmax(confidence)] = True
    return np.asarray(commit)


def _choice_noise(x: StepInputs, plan: StepPlan) -> Any:
    """(B, N) Gumbel noise for confidences, or None where the rule has no use for it at this step."""
    if not plan.commit.uses_noise:
        return None
    if x.choice_gumbel is not None:
        return x.choice_gumbel.astype(np.float64)
    key = (x.seeds[:, :1], x.seeds[:, 1:])
    return philox.gumbel(key, 0, x.positions, plan.numbers.step, philox.STREAM_CHOICE)


def log_sum_exp(x: F64) -> float:
    """log of the sum of exp(x); -inf where nothing is finite."""
    top = x.max(initial=-np.inf)
    if not np.isfinite(top):
        return -np.inf
    return float(top + np.log(np.exp(x - top).sum()))


def softmax(x: F64) -> F64:
    """Probabilities of a row with at least one finite entry."""
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())
