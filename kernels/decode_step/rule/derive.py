"""One part of a rule's step as a rule of its own: its draw, its distribution, its commit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ...common.rounding import rounded
from .rule import Score, StepRule


def drawing(rule: StepRule) -> StepRule:
    """The same candidates and confidences, whatever is committed."""
    return dataclasses.replace(
        rule, count="quota", count_rows="each", count_base="positions", min_commit="one",
        threshold_slack=None, remask="none", skip_mask_token=False,
    )  # fmt: skip


def candidates_of(rule: StepRule) -> StepRule:
    """The same candidates, for known tokens too where the rule edits them; -inf where there is none."""
    edits = None if rule.edit_threshold is None else -1e30
    return dataclasses.replace(
        drawing(rule), score="prob", score_banned_ids=(), choice_temperature=0.0, revise="no",
        edit_threshold=edits,
    )  # fmt: skip


def committing(rule: StepRule, dtype: str, *, ranked: bool) -> StepRule:
    """What is left for `commit_tokens`; `ranked`: the scores have their noise already.

    Without logits a threshold in their dtype would not be rounded, so it is here.
    """
    changes: dict[str, Any] = {}
    if ranked:
        changes["choice_temperature"] = 0.0
        if rule.score == "random":
            changes["score"] = "given"
    if rule.score_dtype == "logits":
        for field in ("threshold", "threshold_slack", "low_threshold", "edit_threshold"):
            value = getattr(rule, field)
            bound = None if value is None else rounded(value, dtype)
            if bound is not None and math.isfinite(bound):  # else it bounds nothing either way
                changes[field] = bound
    return dataclasses.replace(rule, **changes)


def scoring(rule: StepRule, score: Score, mask_token_id: int) -> StepRule:
    """Scores the tokens that are there under the model's own distribution; draws nothing.

    That is the guided one, over the ids that the rule may draw, at temperature 1, unfiltered and not
    rounded.  The step must be called with a mask token that is nowhere, so that all tokens are held.
    """
    banned = rule.banned_ids
    if rule.ban_mask_token and mask_token_id >= 0:
        banned = (*banned, mask_token_id)
    return StepRule(
        name=f"{score} under {rule.name}",
        count="quota",
        revise="held",
        sample_temperature=0.0,
        guidance_dtype=rule.guidance_dtype,
        guidance_form=rule.guidance_form,
        vocab_slice=rule.vocab_slice,
        banned_ids=banned,
        score=score,
        score_dtype="float64" if rule.score_dtype == "float64" else "float32",
    )
