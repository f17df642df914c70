"""Steps on layouts: logits that are shifted by one, and spans that are committed together."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from ..kernels.common.arrays import (
    as_index,
    check_same_kind,
    check_shape,
    dtype_name,
    kind_of,
    library_of,
    place_of,
    signed,
    to_numpy,
)
from ..kernels.decode_step import StepNoise, StepResult, StepRule, commit_tokens, decode_step
from ..kernels.decode_step.api import rule_and_noise
from ..kernels.decode_step.dispatch import is_checked
from ..kernels.decode_step.door import check_logits, raise_on_dead_rows
from ..kernels.decode_step.rule.derive import committing, drawing


def decode_shifted(
    logits: Any,
    tokens: Any,
    *,
    rule: StepRule | str,
    mask_token_id: int,
    step: int,
    num_steps: int,
    num_masked_at_start: Any = None,
    seeds: Any = None,
    noise: StepNoise | None = None,
    uncond_logits: Any = None,
    guidance_scale: Any = None,
    eligible: Any = None,
    scores: Any = None,
    num_commit: Any = None,
    positions: Any = None,
    temperature: Any = None,
    threshold: Any = None,
    backend: str = "auto",
    check: bool = False,
) -> StepResult:
    """`decode_step` where position i is predicted by row i - 1 of the logits, and position 0 by row 0.

    The same result, bit for bit, as shifting the logits by a copy and calling `decode_step`: the
    candidates come from `tokens[:, 1:]` against `logits[:, :-1]` and from the first column, as
    views; the count and the cut are taken over whole sequences.

    Args:
        logits, uncond_logits: (B, N, V) as the model gives them, not shifted.
        All others: as `decode_step`, in the order of the tokens (noise, positions and eligibility
            too: those of position i belong to the token there, not to its row of logits).

    Returns, raises and semantics: as `decode_step`.

    Source: Dream-org/Dream `diffusion_generate`, its copies in Fast-dLLM, dllm and Open-dLLM.
    """
    step_rule, token_gumbel, choice_gumbel = rule_and_noise(rule, noise, backend)
    _check_step(logits, tokens)
    batch, length = tokens.shape
    if positions is None:
        positions = _positions(tokens)
    given = {
        "uncond_logits": (uncond_logits, tuple(logits.shape)),
        "eligible": (eligible, (batch, length)),
        "scores": (scores, (batch, length)),
        "positions": (positions, (batch, length)),
        "noise.token_gumbel": (token_gumbel, None),
        "noise.choice_gumbel": (choice_gumbel, (batch, length)),
    }
    for name, (array, shape) in given.items():
        if array is not None:
            check_same_kind(name, array, logits)
            check_shape(name, array, shape or (batch, length, *array.shape[2:]))

    def part(rows: slice, columns: slice) -> StepResult:
        """The candidates of some columns of the tokens, from some rows of the logits."""

        def cut(x: Any) -> Any:
            return None if x is None else x[:, columns]

        return decode_step(
            logits[:, rows], tokens[:, columns], rule=drawing(step_rule),
            mask_token_id=mask_token_id, step=step, num_steps=num_steps, seeds=seeds,
            noise=StepNoise(cut(token_gumbel), cut(choice_gumbel)),
            uncond_logits=None if uncond_logits is None else uncond_logits[:, rows],
            guidance_scale=guidance_scale, eligible=cut(eligible), scores=cut(scores),
            positions=cut(positions), temperature=temperature, backend=backend,
        )  # fmt: skip

    parts = [part(slice(0, 1), slice(0, 1))]
    if length > 1:
        parts.append(part(slice(0, length - 1), slice(1, length)))
    library = library_of(logits)
    filled = library.concatenate([p.candidate_tokens for p in parts], 1)
    confidence = library.concatenate([p.confidence for p in parts], 1)
    dead = (filled == mask_token_id) & (confidence == -np.inf)
    if is_checked(check):
        taking_part = tokens == mask_token_id
        raise_on_dead_rows(
            to_numpy(dead & (taking_part if eligible is None else eligible & taking_part))
        )
    return commit_tokens(
        library.where(dead, -1, signed(filled)),
        scores if step_rule.score == "given" else confidence,
        tokens,
        rule=committing(step_rule, dtype_name(logits), ranked=step_rule.score != "given"),
        mask_token_id=mask_token_id, step=step, num_steps=num_steps,
        num_masked_at_start=num_masked_at_start, seeds=seeds, choice_gumbel=choice_gumbel,
        eligible=eligible, num_commit=num_commit, positions=positions, threshold=threshold,
        backend=backend,
    )  # fmt: skip


def decode_spans(
    logits: Any,
    tokens: Any,
    *,
    span: int,
    reduce: Literal["max", "sum"] = "max",
    rule: StepRule | str,
    mask_token_id: int,
    step: int,
    num_steps: int,
    num_masked_at_start: Any = None,
    seeds: Any = None,
    noise: StepNoise | None = None,
    uncond_logits: Any = None,
    guidance_scale: Any = None,
    eligible: Any = None,
    scores: Any = None,
    num_commit: Any = None,
    positions: Any = None,
    temperature: Any = None,
    threshold: Any = None,
    backend: str = "auto",
    check: bool = False,
) -> StepResult:
    """One step that commits whole spans: every token is drawn by itself, spans are ranked and kept.

    Positions 0 .. span - 1 are the first span, and so on.  A span is masked while any of its
    eligible positions is; only those of its positions are scored and filled in.

    Args:
        span: length of a span; it divides N.
        reduce: the score of a span, from its positions': "max", or "sum" (with score "log_prob"
            the product of the probabilities).
        num_masked_at_start, num_commit: counted in spans.
        noise: `StepNoise(token_gumbel (B, N, V), choice_gumbel (B, N / span))`.
        All others: as `decode_step`.  The rule's count, cut, threshold and choice noise are about
            spans; its draws, their temperature and scores are about tokens.

    Returns:
        `StepResult`, each (B, N); the confidence of a masked position is that of its span.

    Raises:
        TypeError, ValueError: as `decode_step`; also for a span that does not divide N, and for
        rules that change known tokens.

    Source: facebookresearch/audiocraft MAGNeT `_generate_stage` (span_arrangement "nonoverlap",
    span_scoring "max" and "prod").
    """
    step_rule, token_gumbel, choice_gumbel = rule_and_noise(rule, noise, backend)
    _check_step(logits, tokens)
    batch, length = tokens.shape
    if step_rule.touches_known:
        raise ValueError(f"rule: expected one that keeps known tokens, got {step_rule.name!r}")
    span = as_index("span", span, 1)
    if length % span:
        raise ValueError(f"span: expected a divisor of the {length} positions, got {span}")
    if reduce not in ("max", "sum"):
        raise ValueError(f"reduce: expected max or sum, got {reduce!r}")
    drawn = decode_step(
        logits, tokens, rule=_span_rule(step_rule), mask_token_id=mask_token_id, step=step,
        num_steps=num_steps, seeds=seeds,
        noise=None if token_gumbel is None else StepNoise(token_gumbel),
        uncond_logits=uncond_logits, guidance_scale=guidance_scale, eligible=eligible,
        scores=scores, positions=positions, temperature=temperature, backend=backend, check=check,
    )  # fmt: skip
    library, units = library_of(logits), (batch, length // span)
    masked = tokens == mask_token_id
    takes_part = masked if eligible is None else masked & eligible
    alive = takes_part & (drawn.candidate_tokens != mask_token_id)
    if not step_rule.skip_mask_token:  # then a mask token that was drawn is a candidate too
        alive = alive | (takes_part & (drawn.confidence > -np.inf))

    def grouped(x: Any) -> Any:
        return x.reshape(*units, span)

    def expanded(x: Any) -> Any:
        return library.broadcast_to(x[:, :, None], (*units, span)).reshape(batch, length)

    if reduce == "max":
        score = library.amax(grouped(library.where(alive, drawn.confidence, -np.inf)), -1)
    else:
        score = grouped(library.where(alive, drawn.confidence, 0.0)).sum(-1)
    is_open = grouped(takes_part).any(-1)
    out = commit_tokens(
        grouped(alive).any(-1) * 1 - 1,  # id 0 for a span with candidates, else -1
        score,
        is_open * 1,  # id 0 for a known span, 1 for a masked one
        rule=committing(step_rule, dtype_name(logits), ranked=False),
        mask_token_id=1, step=step, num_steps=num_steps,
        num_masked_at_start=num_masked_at_start, seeds=seeds, choice_gumbel=choice_gumbel,
        num_commit=num_commit, positions=None if positions is None else positions[:, ::span] // span,
        threshold=threshold, backend=backend,
    )  # fmt: skip
    committed = expanded(is_open & (out.next_tokens == 0)) & alive
    others = library.where(masked, -np.inf, np.inf)
    return StepResult(
        library.where(committed, drawn.candidate_tokens, tokens),
        library.where(alive, drawn.candidate_tokens, tokens),
        library.where(takes_part, expanded(out.confidence), _like_dtype(others, out.confidence)),
    )


def _span_rule(rule: StepRule) -> StepRule:
    """The rule's candidates and scores, without the noise, which is the spans'."""
    score = "prob" if rule.score == "random" else rule.score
    return dataclasses.replace(drawing(rule), score=score, choice_temperature=0.0)


def _check_step(logits: Any, tokens: Any) -> None:
    """Logits (B, N, V) and tokens (B, N) of one library."""
    check_logits(logits)
    check_same_kind("tokens", tokens, logits)
    check_shape("tokens", tokens, tuple(logits.shape[:2]))


def _positions(tokens: Any) -> Any:
    """0 .. N - 1 for every sequence, in the library and on the device of `tokens`."""
    library, length = library_of(tokens), tokens.shape[1]
    return library.broadcast_to(library.arange(length, **place_of(tokens)), tuple(tokens.shape))


def _like_dtype(x: Any, model: Any) -> Any:
    return x.to(model.dtype) if kind_of(x) == "torch" else x.astype(model.dtype)
