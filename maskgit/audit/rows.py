"""Ties in one row: of its largest logits, keys or rounded probabilities."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from ..kernels.common.rounding import round_to
from ..kernels.decode_step import reference
from ..kernels.decode_step.inputs import StepInputs
from ..kernels.decode_step.rule.plan import StepPlan
from .ties import EPS, F64, RowTie


def filtered(x: StepInputs, b: int, n: int, plan: StepPlan, kind: str) -> F64 | None:
    """The guided, banned and filtered row that candidates are taken from; None without a finite logit."""
    row = reference.guided(x, b, n, plan, kind)
    row[[i for i in plan.row.banned_columns(x.mask_token_id) if i < row.size]] = -np.inf
    if not np.isfinite(row).any():
        return None
    row = np.minimum(row, float(np.finfo(np.float32).max))
    return np.where(reference.keep_mask(row, plan), row, -np.inf)


def key_tie(row: F64, x: StepInputs, b: int, n: int, plan: StepPlan, kind: str) -> RowTie | None:
    """A tie of the largest logits, or of logits with injected noise; None for draws from seeds."""
    temperature = plan.numbers.sample_temperature
    if not plan.row.draws:
        if plan.row.greedy_on_probs:
            return None  # rounded probabilities decide: see prob_tie
        sizes = np.abs(row) if x.uncond_logits is None else _guided_sizes(row, x, b, n, plan)
        return _row_tie("logits", row, EPS[kind] * sizes / 2, b, n, plan)
    if x.token_gumbel is None:
        return None
    noise = temperature * x.token_gumbel[b, n].astype(np.float64)
    keys = np.where(np.isfinite(row), row + noise, -np.inf)
    keys = np.where(np.isnan(keys), -np.inf, keys)
    if not np.isfinite(keys).any():
        return None
    sizes = np.abs(row) + np.abs(noise)
    return _row_tie("keys", keys, 2 * EPS["float32"] * sizes, b, n, plan)


def _guided_sizes(row: F64, x: StepInputs, b: int, n: int, plan: StepPlan) -> F64:
    """The largest number that each guided logit is computed from, for what its rounding may be."""
    cond, uncond = (a[b, n].astype(np.float64) for a in (x.logits, x.uncond_logits))
    form, full = plan.row.guidance, x.guidance_scale
    with np.errstate(invalid="ignore"):
        if form == "weighted":
            parts = full * cond, (full - 1) * uncond
        elif form == "from_cond":
            parts = cond, (full - 1) * (cond - uncond)
        else:
            parts = uncond, full * (cond - uncond)
    return np.asarray(np.nanmax(np.abs([row, *parts]), axis=0))


def prob_tie(row: F64, b: int, n: int, plan: StepPlan, kind: str) -> RowTie | None:
    """A tie of the largest probabilities after rounding, for rules whose argmax is over them."""
    if not plan.row.greedy_on_probs:
        return None
    probs, score_dtype = reference.softmax(row), plan.row.score_dtype
    rounded = round_to(probs, score_dtype)
    error = 16 * EPS["float64" if score_dtype == "float64" else "float32"]
    high = round_to(probs * (1 + error), score_dtype)
    low = round_to(np.array(probs.max() * (1 - error)), score_dtype)
    return _tie_of("probs", rounded, high >= low, b, n, plan)


def _row_tie(
    what: Literal["logits", "keys"], values: F64, errors: F64, b: int, n: int, plan: StepPlan
) -> RowTie | None:
    """A tie of values that may each be off by `errors`."""
    best = int(np.argmax(values))
    with np.errstate(invalid="ignore"):
        near = np.isfinite(values) & (values + errors >= values[best] - errors[best])
    return _tie_of(what, values, near, b, n, plan)


def _tie_of(
    what: Literal["logits", "probs", "keys"], values: F64, near: npt.NDArray[np.bool_], b: int,
    n: int, plan: StepPlan,
) -> RowTie | None:  # fmt: skip
    """What the entries that equal the largest, or else those near it, amount to."""
    top = values.max()
    equal = values == top
    tied = np.flatnonzero(equal if equal.sum() > 1 else near | equal)
    if tied.size < 2:
        return None
    start = plan.row.vocab_start
    ids = [int(i) + start for i in tied]
    first, second = np.sort(values)[::-1][:2]
    return RowTie(
        sequence=b, position=n, what=what, kind="equal" if equal.sum() > 1 else "near",
        tokens=tuple(ids[:8]), count=len(ids), lowest=ids[0], highest=ids[-1],
        gap=float(first - second),
    )  # fmt: skip
