"""The C++ backend: fills in the parameters and calls the extension (csrc/decode_step-inl.h).

Works on NumPy views of whatever host arrays came in; logits of any stride, never copied.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from maskgit import _C

from ..inputs import StepInputs
from ..rule.plan import RowPlan, StepPlan
from .threads import num_threads

_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_SCORES = ("prob", "log_prob", "top1_prob", "margin", "neg_entropy", "logit", "random", "given")
_COUNTS = (
    "masked", "quota", "fraction", "bernoulli", "threshold", "factor", "entropy_bound", "runs",
    "given",
)  # fmt: skip
_CUTS = ("strict", "inclusive", "exact")
_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_ROUNDING = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}


def decode_step(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence), each (B, N); `dtype` is that of the logits."""
    arrays = _arrays(x, plan)
    next_tokens = arrays["next_tokens"] = np.empty(x.tokens.shape, np.int64)
    if x.choice_gumbel is None:  # room for what is drawn
        arrays["choice_noise"] = np.empty(x.tokens.shape)
    else:
        arrays["choice_noise"] = x.choice_gumbel.astype(np.float64, order="C")
    if x.num_commit is not None:
        arrays["num_commit"] = np.ascontiguousarray(x.num_commit, dtype=np.int64)
    if plan.commit.remasks_by_score:
        arrays["remask_bounds"] = _remask_bounds(x, plan)
    if x.scores is not None:
        arrays["scores"] = x.scores.astype(np.float64, order="C")
    params = _parameters(x, plan, dtype, arrays)
    params.draw_choice_noise = x.choice_gumbel is None and plan.commit.uses_noise
    _C.decode_step(params)
    kind = np.float64 if plan.commit.is_wide else np.float32
    return next_tokens, arrays["candidates"], arrays["confidence"].astype(kind, copy=False)


def sample_tokens(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(candidate or -1, score, log_z), each (B, N)."""
    arrays = _arrays(x, plan)
    log_z = arrays["log_z"] = np.empty(x.tokens.shape)
    _C.sample_tokens(_parameters(x, plan, dtype, arrays))
    kind = np.float64 if plan.row.is_wide else np.float32
    score = arrays["confidence"].astype(kind, copy=False)
    return arrays["candidates"], score, log_z.astype(kind, copy=False)


def _whole_strides(x: Any) -> Any:
    """The array, copied only where a stride is no whole number of elements."""
    size = x.itemsize
    if not x.flags.c_contiguous and any(stride % size for stride in x.strides):
        return np.ascontiguousarray(x)
    return x


@lru_cache(maxsize=256)
def left_out(row: RowPlan, mask_token_id: int, vocab: int) -> dict[str, Any]:
    """The columns that are never drawn, and those outside the score's softmax, where there are any."""
    columns = {"banned": row.banned_columns(mask_token_id), "score_banned": row.score_banned}
    inside = {name: np.array([i for i in of if i < vocab]) for name, of in columns.items()}
    return {name: ids.astype(np.int64) for name, ids in inside.items() if ids.size}


def _remask_bounds(x: StepInputs, plan: StepPlan) -> Any:
    """(B, N) bounds under which a known position's choice noise masks it again, shared by scores."""
    known = x.eligible & (x.tokens != x.mask_token_id)
    keys = np.where(known & np.isfinite(x.scores), x.scores.astype(np.float64), -np.inf)
    top = np.maximum(keys.max(axis=1, keepdims=True, initial=-1e300), -1e300)
    weights = np.exp(keys - top)
    total = weights.sum(axis=1, keepdims=True)
    chance = plan.numbers.remask_chance * weights / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        return np.where(chance >= 1, np.inf, -np.log(-np.log(np.minimum(chance, 1 - 1e-16))))


def _arrays(x: StepInputs, plan: StepPlan) -> dict[str, Any]:
    """The arrays of a call, those that it fills among them, as csrc/params.h wants them."""
    arrays: dict[str, Any] = {
        "tokens": np.ascontiguousarray(x.tokens, dtype=np.int64),
        "eligible": np.ascontiguousarray(x.eligible).view(np.uint8),
        "masked_at_start": np.ascontiguousarray(x.num_masked_at_start, dtype=np.int64),
        "positions": np.ascontiguousarray(x.positions, dtype=np.uint32),
        "candidates": np.empty(x.tokens.shape, np.int64),
        "confidence": np.empty(x.tokens.shape),
    }
    if x.seeds is not None:
        arrays["seeds"] = np.ascontiguousarray(x.seeds, dtype=np.uint32)
    if x.drawn is not None:  # the core then draws none
        arrays["candidates"][...], arrays["confidence"][...] = x.drawn, x.scores
    if x.logits is None:
        return arrays
    arrays["logits"] = _whole_strides(x.logits)
    if x.uncond_logits is not None:
        arrays["uncond"] = _whole_strides(x.uncond_logits)
    if x.token_gumbel is not None:
        arrays["token_gumbel"] = _whole_strides(x.token_gumbel)
    return arrays | left_out(plan.row, x.mask_token_id, x.logits.shape[2])


def _parameters(x: StepInputs, plan: StepPlan, dtype: str, arrays: dict[str, Any]) -> Any:
    """The parameters of a call; they keep the arrays alive."""
    p = _C.StepParams(_numbers(plan, dtype), arrays)
    p.batch, p.length = x.tokens.shape
    p.vocab = 0 if x.logits is None else x.logits.shape[2]
    for name in ("banned", "score_banned"):
        if name in arrays:
            setattr(p, f"num_{name}", arrays[name].size)
    if x.token_gumbel is not None:
        p.noise_is_double = x.token_gumbel.dtype == np.float64
    p.guidance_scale = x.guidance_scale
    p.mask_token_id = x.mask_token_id
    p.num_threads = num_threads()
    return p


def numbers(plan: StepPlan, dtype: str, mask_token_id: int) -> Any:
    """The parameters of a step without its arrays, for csrc/ffi.cpp."""
    p = _C.StepParams(_numbers(plan, dtype), {})
    p.mask_token_id = mask_token_id
    p.draw_choice_noise = plan.commit.uses_noise
    return p


@lru_cache(maxsize=1024)
def _numbers(plan: StepPlan, dtype: str) -> Any:
    """The parameters that depend on the plan and the dtype alone."""
    row, commit, n = plan.row, plan.commit, plan.numbers
    p = _C.StepParams({"table": n.table})
    p.dtype = _DTYPES[dtype]
    p.table_size = n.table.size
    p.vocab_start = row.vocab_start
    p.step = n.step
    p.sample_temperature = n.sample_temperature
    p.score_temperature = n.score_temperature
    p.choice_temperature = n.choice_temperature
    p.filter_temperature = n.filter_temperature
    p.guide = row.guide
    p.greedy_on_probs = row.greedy_on_probs
    p.score = _SCORES.index(row.score)
    p.score_filtered = row.score_filtered
    p.score_rounding = _ROUNDING[row.score_dtype]
    p.compare_rounding = _ROUNDING[commit.compared_in]
    p.set_filters(_filters(row))
    p.top_p_below = row.nucleus_below
    p.commit_all = commit.count == "all"
    p.count = 0 if p.commit_all else _COUNTS.index(commit.count)
    p.cut = _CUTS.index(commit.cut)
    p.count_rows = ("each", "first", "mean", "sum").index(commit.count_rows)
    p.base_is_positions = commit.base_is_positions
    p.clamps = [("commit_one", "keep_one").index(clamp) + 1 for clamp in commit.clamps]
    p.revise = 1 if row.holds else 2 if commit.revises else 0
    p.edits, p.edit_threshold = commit.edits, n.edit_threshold
    p.remasks, p.remask_below = commit.remasks, n.remask_below
    p.skip_mask_token = commit.skips_mask
    p.threshold_strict, p.threshold, p.low_threshold = (
        commit.threshold_strict, n.threshold, n.low_threshold,
    )  # fmt: skip
    p.has_slack, p.threshold_slack = commit.has_slack, n.threshold_slack
    p.min_is_quota = commit.least_is_quota
    p.commit_fraction, p.commit_below = n.commit_fraction, n.commit_below
    p.factor, p.factor_tail = n.factor, commit.factor_tail
    return p


def _filters(row: RowPlan) -> list[tuple[int, float]]:
    """The filters in order, and the temperature where it does not divide before the first."""
    out = [(_FILTERS.index(name), float(value)) for name, value, _ in row.filters]
    unscaled = sum(not divides for _, _, divides in row.filters)
    if unscaled:
        out.insert(unscaled, (_FILTERS.index("temperature"), 0.0))
    return out
