"""`audit_ties`: a step by the float64 reference, and the places where a tie decides."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernels.common.arrays import dtype_name, kind_of, to_numpy, widen
from ..kernels.common.names import unknown
from ..kernels.decode_step import StepNoise, StepRule
from ..kernels.decode_step.api import rule_and_noise
from ..kernels.decode_step.dispatch import narrowed
from ..kernels.decode_step.door import (
    LOGIT_DTYPES,
    admit,
    check_guidance,
    check_logits,
    check_values,
    columns,
    plan_of,
)
from ..kernels.decode_step.inputs import StepInputs, complete
from ..kernels.decode_step.rule.plan import StepPlan
from .cuts import cut_ties
from .rows import filtered, key_tie, prob_tie
from .ties import RowTie, TieReport


def audit_ties(
    logits: Any,
    tokens: Any = None,
    *,
    rule: StepRule | str,
    mask_token_id: int | None = None,
    step: int = 0,
    num_steps: int = 8,
    num_masked_at_start: Any = None,
    seeds: Any = None,
    noise: StepNoise | None = None,
    uncond_logits: Any = None,
    guidance_scale: float | None = None,
    eligible: Any = None,
    scores: Any = None,
    num_commit: Any = None,
    positions: Any = None,
    dtype: str | None = None,
) -> TieReport:
    """Report where right implementations of one decode step may differ because of a tie.

    Args:
        logits: (B, N, V) float16, bfloat16 or float32, torch, jax or NumPy.
        tokens: (B, N) integers; by default everything is masked.
        rule: a `StepRule` or preset name.
        mask_token_id: the id of the mask token; needed with `tokens`.
        step, num_steps: which step of how many; they say how many positions are committed.
        seeds: by default 0 .. B - 1 for rules that draw.  Draws from seeds have no ties to audit;
            the confidences are then those of the tokens drawn.
        noise: the caller's own noise: the largest logits with their noise are audited instead.
        dtype: the dtype that the logits were computed in, where the array is a wider one.
        All others: as `decode_step`.

    Returns:
        `TieReport`.  Two values are near where one rounding of the logits' dtype (guidance
        included), or the float32 error of a softmax, can make them equal or change their order.

    Raises:
        TypeError, ValueError: as `decode_step`; tokens without their mask id.

    Semantics: the float64 reference computes the step, one row at a time, on the host.
    """
    step_rule, token_gumbel, choice_gumbel = rule_and_noise(rule, noise, "auto")
    x, plan, kind = _inputs(
        logits, tokens, step_rule, mask_token_id, step, num_steps, num_masked_at_start, seeds,
        token_gumbel, choice_gumbel, uncond_logits, guidance_scale, eligible, scores, num_commit,
        positions, dtype,
    )  # fmt: skip
    taking_part = x.eligible & ((x.tokens == x.mask_token_id) | (step_rule.revise != "no"))
    ties: dict[str, list[RowTie]] = {"logits": [], "probs": []}
    rows = [(int(b), int(n)) for b, n in zip(*np.nonzero(taking_part), strict=True)]
    for b, n in rows:
        held = step_rule.revise == "held" and x.tokens[b, n] != x.mask_token_id
        row = None if held else filtered(x, b, n, plan, kind)
        if row is None:
            continue
        for name, found in (
            ("logits", key_tie(row, x, b, n, plan, kind)),
            ("probs", prob_tie(row, b, n, plan, kind)),
        ):
            if found is not None:
                ties[name].append(found)
    cuts = cut_ties(x, plan, kind)
    return TieReport(
        step_rule.name, kind, step, num_steps, len(rows), tuple(ties["logits"]),
        tuple(ties["probs"]), tuple(cuts),
    )  # fmt: skip


def _inputs(
    logits: Any, tokens: Any, rule: StepRule, mask_token_id: int | None, step: int, num_steps: int,
    num_masked_at_start: Any, seeds: Any, token_gumbel: Any, choice_gumbel: Any,
    uncond_logits: Any, guidance_scale: Any, eligible: Any, scores: Any, num_commit: Any,
    positions: Any, dtype: str | None,
) -> tuple[StepInputs, StepPlan, str]:  # fmt: skip
    """The checked inputs of the step in NumPy, the rule at it, and the dtype of the logits."""
    batch, length, vocab = check_logits(logits)
    scale = check_guidance(logits, uncond_logits, guidance_scale)
    logits, uncond_logits = narrowed(logits), narrowed(uncond_logits)
    kind = dtype_name(logits) if dtype is None else dtype
    if kind not in LOGIT_DTYPES:
        raise ValueError(unknown("dtype", LOGIT_DTYPES, dtype))
    if tokens is None:
        mask_token_id = -1 if mask_token_id is None else mask_token_id
        tokens = np.full((batch, length), mask_token_id, np.int64)
        num_masked_at_start = length if num_masked_at_start is None else num_masked_at_start
    elif mask_token_id is None:
        raise ValueError("mask_token_id: expected an integer together with tokens, got None")
    has_noise = token_gumbel is not None or choice_gumbel is not None
    if seeds is None and not has_noise and rule.needs_seeds:
        seeds = np.arange(batch)
    model = _host(logits)
    plan = plan_of(rule, mask_token_id, step, num_steps, model, kind)
    x = admit(model, vocab, rule, plan, mask_token_id, {
        "tokens": _host(tokens), "num_masked_at_start": _host(num_masked_at_start),
        "seeds": _host(seeds), "token_gumbel": _host(token_gumbel),
        "choice_gumbel": _host(choice_gumbel), "eligible": _host(eligible), "scores": _host(scores),
        "num_commit": _host(num_commit), "positions": _host(positions),
    })  # fmt: skip
    check_values(x, vocab, rule, plan, step)
    x = complete(x, plan)._replace(
        logits=columns(model, rule),
        uncond_logits=columns(_host(uncond_logits), rule),
        guidance_scale=scale,
    )
    return x, plan, kind


def _host(x: Any) -> Any:
    """An array as NumPy, half precision as float32; everything else as it is."""
    if kind_of(x) is None:
        return np.asarray(x) if isinstance(x, (list, tuple)) else x
    return widen(to_numpy(x), dtype_name(x))
