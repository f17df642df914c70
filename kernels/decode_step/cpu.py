"""The C++ backend: fills in the parameters and calls the extension (csrc/decode_step-inl.h).

Works on NumPy views of whatever host arrays came in; logits of any stride, never copied.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .plan import ResolvedStep, guide_of, gumbel_below, in_score_dtype
from .spec import StepInputs

_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_SCORES = ("prob", "log_prob", "top1_prob", "margin", "neg_entropy", "logit", "random", "given")
_COUNTS = (
    "masked", "quota", "fraction", "bernoulli", "threshold", "factor", "entropy_bound", "runs",
    "given",
)  # fmt: skip
_CUTS = ("strict", "inclusive", "exact")
_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_ROUNDING = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}


def decode_step(x: StepInputs, plan: ResolvedStep, dtype: str) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence), each (B, N); `dtype` is that of the logits."""
    from maskgit import _C

    params, keep, out = _parameters(x, plan, dtype)
    next_tokens = np.empty(x.tokens.shape, np.int64)
    noise = None if x.choice_gumbel is None else x.choice_gumbel.astype(np.float64, order="C")
    params.draw_choice_noise = noise is None and _uses_choice_noise(plan)
    noise = np.empty(x.tokens.shape) if noise is None else noise
    keep += [next_tokens, noise]
    if x.num_commit is not None:
        num_commit = np.ascontiguousarray(x.num_commit, dtype=np.int64)
        params.num_commit = num_commit
        keep.append(num_commit)
    if plan.rule.remask == "conf":
        bounds = _remask_bounds(x, plan)
        params.remask_bounds = bounds
        keep.append(bounds)
    if x.scores is not None:
        scores = x.scores.astype(np.float64, order="C")
        params.scores = scores
        keep.append(scores)
    params.next_tokens = next_tokens
    params.choice_noise = noise
    _C.decode_step(params)
    candidates, confidence = out
    kind = np.float64 if plan.rule.score_dtype == "float64" else np.float32
    return next_tokens, candidates, confidence.astype(kind, copy=False)


def sample_tokens(x: StepInputs, plan: ResolvedStep, dtype: str) -> tuple[Any, Any, Any]:
    """(candidate or -1, score, log_z), each (B, N)."""
    from maskgit import _C

    params, keep, (candidates, confidence) = _parameters(x, plan, dtype)
    log_z = np.empty(x.tokens.shape)
    keep += [log_z]
    params.log_z = log_z
    _C.sample_tokens(params)
    kind = np.float64 if plan.rule.score_dtype == "float64" else np.float32
    return candidates, confidence.astype(kind, copy=False), log_z.astype(kind, copy=False)


def num_threads() -> int:
    """Threads to use: torch's number where torch is loaded, MASKGIT_NUM_THREADS, all CPUs."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        _share_threads_with_torch()
        return int(torch.get_num_threads())
    setting = os.environ.get("MASKGIT_NUM_THREADS", "")
    if setting:
        if not setting.isdigit() or not 1 <= int(setting) <= 1024:
            raise ValueError(f"MASKGIT_NUM_THREADS: expected 1 to 1024, got {setting!r}")
        return int(setting)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _share_threads_with_torch() -> None:
    """Let the core run on the threads of the OpenMP runtime that torch brought, where it is found."""
    from maskgit import _C

    if is_forked():
        return
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    names = ("libgomp", "libiomp5", "libomp")
    paths = {line.split(maxsplit=5)[-1] for line in maps if any(name in line for name in names)}
    for path in sorted(paths, key=lambda p: "torch" not in p)[:1]:
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            return
        _C.use_openmp(ctypes.cast(function, ctypes.c_void_p).value or 0)


def is_forked() -> bool:
    """Whether this process was forked and has not called exec since, whatever was imported when.

    OpenMP's threads stay with the parent, and a call in the child would wait for them for ever.  Linux
    keeps it among the flags of a process (PF_FORKNOEXEC); elsewhere the threads are not shared.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return bool(int(fields[6]) & 0x40)


def _uses_choice_noise(plan: ResolvedStep) -> bool:
    return plan.choice_temperature > 0 or plan.rule.score == "random" or plan.count == "bernoulli"


def _whole_strides(x: Any) -> Any:
    """The array, copied only where a stride is no whole number of elements."""
    size = x.itemsize
    if any(stride % size for stride in x.strides):
        return np.ascontiguousarray(x)
    return x


@lru_cache(maxsize=256)
def banned(rule: Any, mask_token_id: int, vocab: int) -> Any:
    """Columns that are never drawn."""
    ids = set(rule.banned_ids) | ({mask_token_id} if rule.ban_mask_token else set())
    return without_slice(ids, rule, vocab)


def without_slice(ids: Any, rule: Any, vocab: int) -> Any:
    """Ids as indices of the columns that are left."""
    start = rule.vocab_slice[0] if rule.vocab_slice else 0
    return np.array(sorted(i - start for i in ids if 0 <= i - start < vocab), np.int64)


def _remask_bounds(x: StepInputs, plan: ResolvedStep) -> Any:
    """(B, N) bounds under which a known position's choice noise masks it again, shared by scores."""
    known = x.eligible & (x.tokens != x.mask_token_id)
    keys = np.where(known & np.isfinite(x.scores), x.scores.astype(np.float64), -np.inf)
    top = np.maximum(keys.max(axis=1, keepdims=True, initial=-1e300), -1e300)
    weights = np.exp(keys - top)
    total = weights.sum(axis=1, keepdims=True)
    chance = plan.remask_chance * weights / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        return np.where(chance >= 1, np.inf, -np.log(-np.log(np.minimum(chance, 1 - 1e-16))))


def _parameters(x: StepInputs, plan: ResolvedStep, dtype: str) -> tuple[Any, list[Any], Any]:
    """The filled parameters, the arrays that must stay alive, and the two outputs."""
    from maskgit import _C

    p = _C.StepParams(_numbers(plan, dtype))
    p.batch, p.length = x.tokens.shape
    keep = [plan.table]
    if x.logits is not None:
        p.logits = logits = _whole_strides(x.logits)
        p.vocab = logits.shape[2]
        keep.append(logits)
    tokens = np.ascontiguousarray(x.tokens, dtype=np.int64)
    eligible = np.ascontiguousarray(x.eligible, dtype=np.uint8)
    start = np.ascontiguousarray(x.num_masked_at_start, dtype=np.int64)
    positions = np.ascontiguousarray(x.positions, dtype=np.uint32)
    candidates, confidence = np.empty(tokens.shape, np.int64), np.empty(tokens.shape)
    if x.drawn is not None:  # the core then draws none
        candidates[...], confidence[...] = x.drawn, x.scores
    keep += [tokens, eligible, start, positions]
    if x.logits is not None and (plan.rule.banned_ids or plan.rule.ban_mask_token):
        ids = banned(plan.rule, x.mask_token_id, x.logits.shape[2])
        p.banned, p.num_banned = ids, ids.size
        keep.append(ids)
    if x.logits is not None and plan.rule.score_banned_ids:
        ids = without_slice(plan.rule.score_banned_ids, plan.rule, x.logits.shape[2])
        p.score_banned, p.num_score_banned = ids, ids.size
        keep.append(ids)
    if x.uncond_logits is not None:
        p.uncond = uncond = _whole_strides(x.uncond_logits)
        p.guidance_scale = x.guidance_scale
        keep.append(uncond)
    if x.token_gumbel is not None:
        p.token_gumbel = noise = _whole_strides(x.token_gumbel)
        p.noise_is_double = noise.dtype == np.float64
        keep.append(noise)
    if x.seeds is not None:
        seeds = np.ascontiguousarray(x.seeds, dtype=np.uint32)
        p.seeds = seeds
        keep.append(seeds)
    p.tokens, p.eligible = tokens, eligible
    p.masked_at_start, p.positions = start, positions
    p.candidates, p.confidence = candidates, confidence
    p.mask_token_id = x.mask_token_id
    p.num_threads = num_threads()
    return p, keep, (candidates, confidence)


def numbers(plan: ResolvedStep, dtype: str, mask_token_id: int) -> Any:
    """The parameters of a step without its arrays, for csrc/ffi.cpp."""
    from maskgit import _C

    p = _C.StepParams(_numbers(plan, dtype))
    p.mask_token_id = mask_token_id
    p.draw_choice_noise = _uses_choice_noise(plan)
    return p


@lru_cache(maxsize=1024)
def _numbers(plan: ResolvedStep, dtype: str) -> Any:
    """The parameters that depend on the plan and the dtype alone."""
    from maskgit import _C

    plan = in_score_dtype(plan, dtype)
    rule, p = plan.rule, _C.StepParams()
    p.dtype = _DTYPES[dtype]
    p.table, p.table_size = plan.table, plan.table.size
    p.vocab_start = rule.vocab_slice[0] if rule.vocab_slice else 0
    p.step = plan.step
    p.sample_temperature = plan.sample_temperature
    p.score_temperature = plan.score_temperature
    p.choice_temperature = plan.choice_temperature
    p.greedy_on_probs = plan.sample_temperature == 0 and rule.greedy_on == "probs"
    p.score = _SCORES.index(rule.score)
    p.score_filtered = rule.score_filtered
    p.score_rounding = _ROUNDING[dtype if rule.score_dtype == "logits" else rule.score_dtype]
    p.compare_rounding = _ROUNDING[plan.compared_in]
    p.set_filters([(_FILTERS.index(f), float(getattr(rule, f, 0) or 0)) for f in rule.filters])
    p.count, p.cut = _COUNTS.index(plan.count), _CUTS.index(rule.cut)
    p.count_rows = ("each", "first", "mean", "sum").index(plan.count_rows)
    p.base_is_positions = plan.count_base == "positions"
    p.clamps = [("commit_one", "keep_one").index(clamp) + 1 for clamp in plan.clamps]
    p.revise = ("no", "held", "drawn").index(rule.revise)
    p.edits = plan.edit_threshold is not None
    p.edit_threshold = plan.edit_threshold or 0.0
    p.remasks = rule.remask != "none"
    p.remask_below = gumbel_below(plan.remask_chance)
    p.skip_mask_token = rule.skip_mask_token
    p.filter_temperature = plan.filter_temperature
    p.guide = guide_of(rule)
    p.top_p_below = rule.top_p_keep == "below"
    p.threshold_strict, p.low_threshold = rule.threshold_strict, plan.low_threshold
    p.has_slack, p.threshold_slack = plan.threshold_slack is not None, plan.threshold_slack or 0.0
    p.min_is_quota = rule.min_commit == "quota"
    p.commit_all = plan.commit_all
    p.commit_fraction, p.commit_below = plan.commit_fraction, plan.commit_below
    p.threshold, p.factor, p.factor_tail = plan.threshold, rule.factor, rule.factor_tail
    return p
