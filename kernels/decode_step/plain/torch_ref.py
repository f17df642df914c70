"""The decode step in plain torch, all rows at once: the unfused baseline, and the fallback.

It works wherever torch does.  The meaning is that of reference.py; the arithmetic is float32, for rules
that score in float64 float64.

Passes over the logits of a plain rule: their maximum; for greedy tokens its place; the exponentials
exp((l - max) / T), one array of the logits' size; their sums, by leaf of 128 where a token is drawn.  NaN
and infinities are cleared away in further passes, which the CPU makes only where the maximum shows that
there are any; elsewhere nothing waits for the device or depends on a tensor's values in its control flow,
so that it may be compiled and captured in a graph.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ...common import philox
from ...common.philox import GROUPS, LEAF, PER_GROUP, torch_form
from ..inputs import StepInputs
from ..rule.plan import StepPlan
from .commit import Library, commit

_FLOAT_MAX = float(np.finfo(np.float32).max)
PIECE = 2**19  # logits whose softmax stays in a CPU's cache
# columns of a span of a row, of which a CPU takes the maximum first, and the shortest row that gains by it
SPANS = {torch.float32: (64, 1024), torch.bfloat16: (256, 8192), torch.float16: (256, 8192)}


class Largest(NamedTuple):
    """The largest logits (B, N) of rows, and their columns."""

    values: torch.Tensor
    indices: torch.Tensor


def decode_step(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence), each (B, N); `dtype` is that of the logits."""
    drawn, score = x.drawn, x.scores
    if drawn is None:
        drawn, score, _ = sample_tokens(x, plan, dtype)
    return commit(_TORCH, x, plan, drawn, score, _choice_noise(x, plan))


def sample_tokens(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(candidate or -1, score, log_z), each (B, N); (-1, -inf, -inf) where not eligible.

    score and log_z are float32, float64 for rules that score in float64.
    """
    how, start = plan.row, plan.row.vocab_start
    row, finite, best = _cleared(_banned(_guided(x, plan), x, plan), plan)
    alive, compute = _both(x.eligible, finite), compute_dtype(plan)
    filtered = row
    if how.filters:
        row = row.to(compute)
        filtered = torch.where(keep_mask(row, plan), row, -math.inf)
    own_best = best if filtered is row else None
    temperature, is_finite = plan.numbers.sample_temperature, finite is None
    drawn_from = Exponentials(filtered, temperature, compute, own_best, is_finite)
    token, scored = _draw(drawn_from, x, plan), alive
    holds = how.holds and x.tokens is not None
    if holds:  # scores the token that stands there
        known, own = x.eligible & (x.tokens != x.mask_token_id), x.tokens - start
        token = torch.where(known, own.clamp(0, row.shape[-1] - 1), token)
        scored = _both(alive, ~known | ((own >= 0) & (own < row.shape[-1])))
    base = filtered if how.score_filtered else row
    ids = [i for i in how.score_banned if i < row.shape[-1]]
    if ids:
        base = base.clone()
        base[..., ids] = -math.inf
    scored_by = drawn_from
    if base is not filtered or not how.same_temperature:
        own_best = drawn_from.best if base is filtered else best if base is row else None
        temperature, is_finite = plan.numbers.score_temperature, is_finite and not ids
        scored_by = Exponentials(base, temperature, compute, own_best, is_finite)
    score, log_z = _score(scored_by, token, plan)
    if ids:  # where nothing is left in the score's softmax
        score = torch.where(score.isnan(), 0.0 if how.score == "prob" else -math.inf, score)
    drawn = _where(alive, token + start if start else token, -1)
    return (
        torch.where(known, x.tokens, drawn) if holds else drawn,
        _where(scored, score, -math.inf),
        _where(alive, log_z, -math.inf),
    )


def _both(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """a & b, of which None is true everywhere."""
    return a if b is None else b if a is None else a & b


def _where(condition: torch.Tensor | None, values: torch.Tensor, other: float) -> torch.Tensor:
    """The values where a condition holds, of which None does everywhere."""
    return values if condition is None else torch.where(condition, values, other)


def _is_on_host(logits: torch.Tensor) -> bool:
    """Whether the values of a tensor may be looked at in passing."""
    return logits.device.type == "cpu" and not torch.compiler.is_compiling()


def compute_dtype(plan: StepPlan) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float64 if plan.row.is_wide else torch.float32


def _guided(x: StepInputs, plan: StepPlan) -> torch.Tensor:
    """The logits, or with guidance mixed in, in the compute dtype."""
    if x.uncond_logits is None:
        # a CPU is quicker to find the largest of float32, where the copy stays in its cache
        is_small = x.logits.numel() <= 2 * PIECE and _is_on_host(x.logits)
        return x.logits.float() if is_small else x.logits
    compute = compute_dtype(plan)
    if plan.row.guidance != "float32":
        return _guided_by_operations(x, plan.row.guidance).to(compute)
    row, uncond = x.logits.to(compute), x.uncond_logits.to(compute)
    apart = _in_float32(row - uncond)
    mixed = _in_float32(uncond + x.guidance_scale * apart)
    if compute == torch.float64 or (_is_on_host(mixed) and not bool(mixed.isinf().any())):
        return mixed
    # by halves, where the product overflows and the sum need not
    return torch.where(mixed.isinf(), 2 * (uncond / 2 + x.guidance_scale * (apart / 2)), mixed)


def _guided_by_operations(x: StepInputs, form: str) -> torch.Tensor:
    """Guidance in a form, each operation one of float32 rounded to the dtype of the logits."""
    cond, uncond = x.logits.float(), x.uncond_logits.float()
    full = torch.full((), x.guidance_scale, dtype=torch.float32, device=cond.device)
    rest = full - 1

    def near(values: torch.Tensor) -> torch.Tensor:
        return values.to(x.logits.dtype).float()

    if form == "weighted":
        return near(near(full * cond) - near(rest * uncond))
    start, weight = (uncond, full) if form == "from_uncond" else (cond, rest)
    return near(start + near(weight * near(cond - uncond)))


def _in_float32(x: torch.Tensor) -> torch.Tensor:
    """`x`, infinite where it overflows float32."""
    return x if x.dtype == torch.float32 else torch.where(x.float().isinf(), x * math.inf, x)


def _banned(row: torch.Tensor, x: StepInputs, plan: StepPlan) -> torch.Tensor:
    """The rows with -inf in the banned columns."""
    here = [i for i in plan.row.banned_columns(x.mask_token_id) if i < row.shape[-1]]
    if here:
        row = row.clone()
        for i in here:
            row[..., i] = -math.inf
    return row


def _cleared(row: torch.Tensor, plan: StepPlan) -> tuple[torch.Tensor, Any, Any]:
    """(rows with NaN as -inf and +inf as the largest float32, which have a finite logit, their maxima).

    The second is None where all have one, the third where it is not known yet.
    """
    best = _largest(row) if _is_on_host(row) else None  # NaN where there is one
    if best is not None and math.isfinite(best.values.sum(dtype=torch.float64).item()):
        return row, None, best
    finite = row.isfinite().any(-1)
    row = row.to(compute_dtype(plan)).nan_to_num(-math.inf, _FLOAT_MAX, -math.inf)
    return row, finite, None


def _largest(row: torch.Tensor) -> Largest:
    """The largest logits (B, N), NaN where there is one, and where they are, the lowest of equals.

    On a CPU torch's maximum with its place takes one logit at a time, that without it a vector: long
    rows are gone through without, span by span, and the place is looked for in the best span alone.
    """
    vocab = row.shape[-1]
    size, least = SPANS.get(row.dtype, (0, math.inf))
    if vocab < least or not _is_on_host(row):
        return Largest(*row.max(-1))
    whole = vocab // size * size
    tops = [row[..., :whole].unflatten(-1, (-1, size)).amax(-1)]
    if whole < vocab:
        tops.append(row[..., whole:].amax(-1, keepdim=True))
    values, span = torch.cat(tops, -1).max(-1)
    columns = (span[..., None] * size + torch.arange(size, device=row.device)).clamp(max=vocab - 1)
    inside = row.gather(-1, columns).argmax(-1)  # the first one: the last column may be there twice
    return Largest(values, span * size + inside)


def _once(method: Any) -> Any:
    """A property that is formed once; functools.cached_property has a lock, which cannot be traced."""

    def get(self: Any) -> Any:
        if method.__name__ not in self.kept:
            self.kept[method.__name__] = method(self)
        return self.kept[method.__name__]

    return property(get, doc=method.__doc__)


class Exponentials:
    """exp((row - its maximum) / temperature) and what is read off them, each formed when asked for.

    best: the largest logits, where they are known; is_finite: whether all of them are known to be.
    """

    def __init__(
        self,
        row: torch.Tensor,
        temperature: float,
        dtype: torch.dtype,
        best: Largest | None = None,
        is_finite: bool = False,
    ):
        self.row, self.temperature, self.dtype, self.is_finite = row, temperature, dtype, is_finite
        self.kept: dict[str, Any] = {} if best is None else {"best": best}

    @_once
    def best(self) -> Any:
        """The largest logits (B, N) and where they are."""
        return _largest(self.row)

    @_once
    def top(self) -> torch.Tensor:
        """(B, N), 0 where nothing is finite."""
        top = self.best.values.to(self.dtype)
        return top if self.is_finite else torch.where(top.isfinite(), top, 0.0)

    def scaled(self, row: torch.Tensor) -> torch.Tensor:
        """Some of the row's logits as exponents; finite entries never overflow to NaN."""
        shifted = row - self.top[..., None]
        return shifted if self.temperature == 1 else shifted.div_(self.temperature)

    @_once
    def exps(self) -> torch.Tensor:
        """(B, N, V), padded with 0 to whole leaves."""
        after = -self.row.shape[-1] % LEAF
        exps = self.scaled(self.row).exp_()
        return F.pad(exps, (0, after)) if after else exps

    @_once
    def leaf_sums(self) -> torch.Tensor:
        """(B, N, leaves)."""
        return self.exps.unflatten(-1, (-1, LEAF)).sum(-1)

    @_once
    def total(self) -> torch.Tensor:
        """(B, N); where nothing else is asked for from one softmax, in which the maximum has 1 / total."""
        if "exps" in self.kept:
            return self.leaf_sums.sum(-1)
        return self.best_prob.reciprocal()

    @_once
    def best_prob(self) -> torch.Tensor:
        """The probability (B, N) of the largest logits."""
        if "exps" in self.kept:
            return self.total.reciprocal()
        row = self.row if self.temperature == 1 else self.scaled(self.row)
        at, size = self.best.indices[..., None], PIECE // row.shape[-1]
        if row.numel() <= PIECE or not _is_on_host(row):
            return row.softmax(-1, dtype=self.dtype).gather(-1, at).squeeze(-1)
        row, at, size = row.flatten(0, -2), at.flatten(0, -2), max(1, size)
        pieces = zip(row.split(size), at.split(size), strict=True)
        probs = [piece.softmax(-1, dtype=self.dtype).gather(-1, i) for piece, i in pieces]
        return torch.cat(probs).view(self.best.indices.shape)

    def of(self, token: torch.Tensor) -> torch.Tensor:
        """The exponents (B, N) of tokens (B, N)."""
        return self.scaled(self.row.gather(-1, token[..., None])).squeeze(-1)


def _scaled(row: torch.Tensor, temperature: float) -> torch.Tensor:
    """(row - its maximum) / temperature in float32 at least."""
    dtype = row.dtype if row.dtype == torch.float64 else torch.float32
    return Exponentials(row, temperature, dtype).scaled(row)


def _draw(from_: Exponentials, x: StepInputs, plan: StepPlan) -> torch.Tensor:
    """Candidates (B, N): argmax, Gumbel-max on injected noise, or the hierarchical draw."""
    temperature, row = plan.numbers.sample_temperature, from_.row
    if not plan.row.draws:
        if plan.row.greedy_on_probs:
            probs = _scaled(row.to(from_.dtype), 1.0).softmax(-1)
            return round_to(probs, plan.row.score_dtype).argmax(-1)
        return from_.best.indices
    if x.token_gumbel is not None:
        row = row.to(from_.dtype)
        noisy = row + temperature * x.token_gumbel.to(row.dtype)
        keys = torch.where(row.isfinite() & ~noisy.isnan(), noisy, -math.inf)
        none = keys.isneginf().all(-1, keepdim=True)
        return torch.where(none, row, keys).argmax(-1)

    def variates(stream: int, size: int) -> torch.Tensor:
        return torch_form.gumbel(x.seeds, x.positions, plan.numbers.step, stream, size)

    sums = from_.leaf_sums
    leaf = (sums.log() + variates(philox.STREAM_LEAF, sums.shape[-1])).argmax(-1)
    columns = leaf[..., None] * LEAF + torch.arange(LEAF, device=row.device)
    own = row.gather(-1, columns.clamp(max=row.shape[-1] - 1))
    inside = from_.scaled(torch.where(columns < row.shape[-1], own, -math.inf))
    inside = inside.unflatten(-1, (PER_GROUP, GROUPS))
    inner = variates(philox.STREAM_INNER, GROUPS + PER_GROUP)
    group = (inside.logsumexp(-2) + inner[..., :GROUPS]).argmax(-1)
    inside = inside.take_along_dim(group[..., None, None], dim=-1).squeeze(-1)
    token = (inside + inner[..., GROUPS:]).argmax(-1)
    return leaf * LEAF + token * GROUPS + group


def _score(
    by: Exponentials, token: torch.Tensor, plan: StepPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule's score of the candidates and log Z, in the compute dtype."""
    kind = plan.row.score
    if kind in ("margin", "neg_entropy"):
        _ = by.exps  # of which the total is then formed
    total = by.total
    log_total = total.log()
    log_z = by.top
    if by.temperature != 1:
        log_z = log_z / by.temperature
    log_z = log_z + log_total
    if kind == "logit":
        value = by.row.gather(-1, token[..., None]).squeeze(-1).to(by.dtype)
    elif kind in ("random", "given"):
        value = torch.zeros_like(total)
    elif kind == "margin":  # the padding gives the second where there is but one column
        pair = round_to(by.exps.topk(2, dim=-1).values / total[..., None], plan.row.score_dtype)
        value = pair[..., 0] - pair[..., 1]
    elif kind == "neg_entropy":
        exps, z = by.exps[..., : by.row.shape[-1]], by.scaled(by.row)
        value = torch.where(exps > 0, exps * z, 0.0).sum(-1) / total - log_total
    elif kind == "log_prob":
        value = by.of(token) - log_total
    elif kind == "prob" and token is not by.best.indices:
        value = by.of(token).exp() / total
    else:
        value = by.best_prob
    return round_to(value, plan.row.score_dtype), log_z


def keep_mask(row: torch.Tensor, plan: StepPlan) -> torch.Tensor:
    """Which tokens survive the rule's filters, applied one after the other."""
    keep = row.isfinite()
    for name, value, divides in plan.row.filters:
        left = torch.where(keep, row, -math.inf)
        if name == "top_k":  # on the logits: two of them may not become equal by a division
            size = min(int(value), row.shape[-1])
            keep = keep & (row >= left.topk(size, dim=-1).values[..., -1:])
            continue
        scaled = _scaled(row, plan.numbers.filter_temperature if divides else 1.0)
        kept = torch.where(keep, scaled, -math.inf)
        if name == "min_p":
            keep = keep & (scaled >= kept.amax(-1, keepdim=True) + math.log(value))
        else:
            below = name == "top_p" and plan.row.nucleus_below
            keep = keep & _nucleus(kept, left, name, value, below)
    return keep


def _nucleus(
    scaled: torch.Tensor, row: torch.Tensor, name: str, limit: float, below: bool
) -> torch.Tensor:
    """top_p: the most probable tokens until their sum passes p; typical_p: the most typical ones.

    The token that passes the limit is kept; among equals the lowest index comes first.
    """
    probs = scaled.softmax(-1)
    if name == "top_p":
        key = -row
    else:
        log_p = scaled - scaled.logsumexp(-1, keepdim=True)
        entropy = -torch.where(probs > 0, probs * log_p, 0.0).sum(-1, keepdim=True)
        key = torch.where(log_p.isfinite(), (-log_p - entropy).abs(), math.inf)
    order = key.sort(dim=-1, stable=True).indices
    ranked = probs.gather(-1, order)
    total = ranked.cumsum(-1)
    within = (total if below else total - ranked) <= limit
    within[..., :1] = True
    return torch.zeros_like(within).scatter(-1, order, within)


def _choice_noise(x: StepInputs, plan: StepPlan) -> torch.Tensor | None:
    """(B, N) Gumbel noise for confidences, or None where this step has no use for it."""
    if not plan.commit.uses_noise:
        return None
    if x.choice_gumbel is not None:
        return torch.as_tensor(x.choice_gumbel)
    gumbel = torch_form.gumbel(x.seeds, x.positions, plan.numbers.step, philox.STREAM_CHOICE, 1)
    return gumbel.squeeze(-1)


def round_to(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """`values` rounded to a dtype, in their own."""
    if values.dtype == getattr(torch, dtype):
        return values
    return values.to(getattr(torch, dtype)).to(values.dtype)


def _remask_below(x: StepInputs, plan: StepPlan) -> Any:
    """The bounds that the noise of a known position stays under with its chance to be masked again."""
    chance: Any = torch.as_tensor(plan.numbers.remask_chance, dtype=torch.float64)
    if plan.commit.remasks_by_score:  # shared out by the scores
        known = x.eligible & (x.tokens != x.mask_token_id)
        scores = x.scores.to(torch.float64)
        keys = torch.where(known & scores.isfinite(), scores, -math.inf)
        chance = plan.numbers.remask_chance * keys.softmax(-1).nan_to_num(0.0)
    inside = -torch.log(-torch.log(chance.clamp(max=1 - 1e-16)))
    return torch.where(chance >= 1, math.inf, inside)


def _beside(values: Any, x: torch.Tensor) -> torch.Tensor:
    """A tensor as it is; a number without a copy from the host, which breaks the capture of a graph."""
    if isinstance(values, torch.Tensor):
        return values
    if isinstance(values, np.ndarray):
        return torch.as_tensor(values, device=x.device)
    kind = torch.float64 if isinstance(values, float) else torch.int64
    return torch.full((), values, dtype=kind, device=x.device)


def _largest_of(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """The largest value (B, N) of each element's group, numbered 0..N."""
    least = torch.full_like(values[:, :1], -math.inf).expand(-1, values.shape[1] + 1)
    return least.scatter_reduce(-1, group, values, "amax").gather(-1, group)


_TORCH = Library(
    np=torch,
    beside=_beside,
    cast=lambda x, dtype: x.to(dtype),
    take=lambda x, index: x.gather(-1, index),
    largest_of=_largest_of,
    floating=lambda is_wide: torch.float64 if is_wide else torch.float32,
    round_to=round_to,
    remask_below=_remask_below,
)
