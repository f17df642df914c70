"""`decode_step_from_hidden`: signature, documentation, checks, and the way into the op."""

from __future__ import annotations

from typing import Any

from ..common.arrays import kind_of
from ..decode_step import dispatch
from ..decode_step.api import (
    counts_tensor,
    rule_and_noise,
    scale_tensor,
    seeds_like,
)
from ..decode_step.inputs import StepNoise, StepResult
from ..decode_step.rule.rule import StepRule
from ..decode_step.traced import at_step
from .dispatch import decode


def decode_step_from_hidden(
    hidden: Any,
    head_weight: Any,
    tokens: Any,
    *,
    rule: StepRule | str,
    mask_token_id: int,
    step: int,
    num_steps: int,
    head_bias: Any = None,
    uncond_hidden: Any = None,
    guidance_scale: Any = None,
    num_masked_at_start: Any = None,
    seeds: Any = None,
    noise: StepNoise | None = None,
    eligible: Any = None,
    scores: Any = None,
    num_commit: Any = None,
    positions: Any = None,
    temperature: Any = None,
    threshold: Any = None,
    backend: str = "auto",
    check: bool = False,
) -> StepResult:
    """`decode_step` on the logits `hidden @ head_weight.T + head_bias`, which are never all there.

    Args:
        hidden: (B, N, D) float16, bfloat16 or float32: what goes into the head's last product.
        head_weight: (V, D), head_bias: (V,) or None, in the dtype of `hidden`; a module's parameters
            as they are, since nothing here has a gradient.
        uncond_hidden, guidance_scale: given together: hidden states become u + scale * (c - u),
            mixed in float32 whatever the rule's `guidance_dtype` and `guidance_form`; the same as guiding
            the logits, up to their rounding, unless the head caps them.
        the rest: as in `decode_step`, V being the head's.

    Returns:
        `StepResult`, as `decode_step` would on the full logits up to rounding at near ties.  Under
        rules that choose positions without looking at logits (random and given scores, Bernoulli
        counts) only the committed positions are drawn: the others keep the mask token in
        `candidate_tokens` and -inf as confidence where it would come from the logits.

    Raises: as `decode_step`.

    Semantics: columns outside the rule's vocab_slice cost nothing.  Rows that are known, not eligible
    or not drawn cost nothing where they can be counted without waiting: NumPy, torch on the CPU, jax
    on the CPU outside a trace (their number is rounded up to a power of two).  Elsewhere all rows go
    through the head.  Extra memory: 2^23 logits at a time; none on a GPU where the rule allows the fused
    head (no filters, no float64 scores, no injected noise): there rows are listed on the device, and
    only those that take part are multiplied.
    """
    step_rule, token_gumbel, choice_gumbel = rule_and_noise(rule, noise, backend)
    head_weight, head_bias = _detached(head_weight), _detached(head_bias)
    seeds = seeds_like(seeds, hidden)
    if kind_of(hidden) != "torch":

        def at(step: int) -> Any:
            return decode(
                hidden, head_weight, tokens, step_rule, mask_token_id, step, num_steps, head_bias,
                uncond_hidden, guidance_scale, num_masked_at_start, seeds, token_gumbel,
                choice_gumbel, eligible, scores, num_commit, positions, temperature, threshold,
                backend, check,
            )  # fmt: skip

        step_rule = dispatch.with_scalars(step_rule, temperature, threshold)
        return StepResult(*at_step(at, step_rule, step, num_steps, hidden))
    from .ops import decode_step_from_hidden_op

    num_masked_at_start = counts_tensor("num_masked_at_start", num_masked_at_start, hidden)
    num_commit = counts_tensor("num_commit", num_commit, hidden)
    out = decode_step_from_hidden_op(
        hidden, head_weight, tokens, step_rule.encoded, mask_token_id, step, num_steps, head_bias,
        uncond_hidden, scale_tensor(guidance_scale), num_masked_at_start, seeds, token_gumbel,
        choice_gumbel, eligible, scores, num_commit, positions,
        scale_tensor(temperature, "temperature"), scale_tensor(threshold, "threshold"), backend, check,
    )  # fmt: skip
    return StepResult(*out)


def _detached(parameter: Any) -> Any:
    """A torch tensor without its gradient; anything else as it is."""
    return parameter.detach() if kind_of(parameter) == "torch" else parameter
