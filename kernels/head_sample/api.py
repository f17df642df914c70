"""`decode_step_from_hidden`: signature, documentation, checks, and the way into the op."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..common.arrays import check_no_grad, check_same_kind, check_shape, dtype_name, kind_of
from ..common.backends import check_name
from ..common.mesh import active
from ..decode_step import dispatch
from ..decode_step.api import (
    check_op_arguments,
    counts_tensor,
    rule_and_noise,
    scale_tensor,
    seeds_like,
)
from ..decode_step.checks import LOGIT_DTYPES, check_guidance
from ..decode_step.inputs import StepNoise, StepResult, inputs
from ..decode_step.rule.rule import StepRule


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
        return StepResult(*dispatch.at_step(at, step_rule, step, num_steps, hidden))
    from .ops import decode_step_from_hidden_op

    num_masked_at_start = counts_tensor("num_masked_at_start", num_masked_at_start, hidden)
    arrays = {"head_weight": head_weight, "tokens": tokens, "head_bias": head_bias, "seeds": seeds}
    arrays |= {"uncond_hidden": uncond_hidden, "noise.token_gumbel": token_gumbel}
    arrays |= {"noise.choice_gumbel": choice_gumbel, "eligible": eligible, "scores": scores}
    num_commit = counts_tensor("num_commit", num_commit, hidden)
    arrays |= {"num_masked_at_start": num_masked_at_start, "num_commit": num_commit}
    arrays |= {"positions": positions}
    numbers = {"mask_token_id": mask_token_id, "step": step, "num_steps": num_steps}
    check_op_arguments(hidden, arrays, numbers)
    out = decode_step_from_hidden_op(
        hidden, head_weight, tokens, step_rule.encoded, mask_token_id, step, num_steps, head_bias,
        uncond_hidden, scale_tensor(guidance_scale), num_masked_at_start, seeds, token_gumbel,
        choice_gumbel, eligible, scores, num_commit, positions,
        scale_tensor(temperature, "temperature"), scale_tensor(threshold, "threshold"), backend, check,
    )  # fmt: skip
    return StepResult(*out)


@dispatch.in_usual_jax
def decode(
    hidden: Any, head_weight: Any, tokens: Any, rule: StepRule, mask_token_id: int, step: int,
    num_steps: int, head_bias: Any, uncond_hidden: Any, guidance_scale: Any,
    num_masked_at_start: Any, seeds: Any, token_gumbel: Any, choice_gumbel: Any, eligible: Any,
    scores: Any, num_commit: Any, positions: Any, temperature: Any, threshold: Any, backend: str,
    check: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The checked call on arrays of one kind; what the op runs."""
    from . import plain

    check_name(backend)
    rule = dispatch.with_scalars(rule, temperature, threshold)
    check_head(hidden, head_weight, head_bias)
    scale = check_guidance(hidden, uncond_hidden, guidance_scale, "uncond_hidden", "hidden")
    x, plan = inputs(
        hidden, head_weight.shape[0], tokens, rule, mask_token_id, step, num_steps,
        num_masked_at_start, seeds, token_gumbel, choice_gumbel, eligible, scores, num_commit,
        positions,
    )  # fmt: skip
    mixed = mix(hidden, uncond_hidden, scale)
    way: Any = plain
    chosen = dispatch.backend_for(hidden, backend)
    if chosen in ("triton", "pallas") and active() is None:
        fused: Any = import_module(
            {"triton": ".triton_cuda", "pallas": ".pallas_tpu"}[chosen], __package__
        )
        way = fused if fused.fuses(x, plan, mixed, head_weight) else plain
    out, dead = way.decode_step(x, plan, mixed, head_weight, head_bias, backend)
    if dispatch.is_checked(check):
        dispatch.raise_on_dead(dead, "hidden")
    return dispatch.results(out, hidden, tokens)


def _detached(parameter: Any) -> Any:
    """A torch tensor without its gradient; anything else as it is."""
    return parameter.detach() if kind_of(parameter) == "torch" else parameter


def mix(hidden: Any, uncond: Any, scale: Any) -> Any:
    """u + scale * (c - u) in float32, back in the dtype of `hidden`."""
    if uncond is None:
        return hidden
    if kind_of(hidden) == "torch":
        c, u = hidden.float(), uncond.float()
        return (u + scale * (c - u)).to(hidden.dtype)
    c, u = hidden.astype("float32"), uncond.astype("float32")
    return (u + scale * (c - u)).astype(hidden.dtype)


def check_head(hidden: Any, weight: Any, bias: Any) -> None:
    """Hidden states, weight and bias fit each other."""
    if kind_of(hidden) is None:
        raise TypeError(
            f"hidden: expected a torch, jax or NumPy array, got {type(hidden).__name__}"
        )
    if len(hidden.shape) != 3 or hidden.shape[2] < 1:
        raise ValueError(f"hidden: expected shape (B, N, D) with D >= 1, got {tuple(hidden.shape)}")
    if dtype_name(hidden) not in LOGIT_DTYPES:
        raise TypeError(
            f"hidden: expected dtype {', '.join(LOGIT_DTYPES)}, got {dtype_name(hidden)}"
        )
    check_no_grad("hidden", hidden)
    check_same_kind("head_weight", weight, hidden)
    if len(weight.shape) != 2 or weight.shape[1] != hidden.shape[2] or weight.shape[0] < 1:
        raise ValueError(
            f"head_weight: expected shape (V, {hidden.shape[2]}), got {tuple(weight.shape)}"
        )
    for name, array in (("head_weight", weight), ("head_bias", bias)):
        if array is None:
            continue
        check_same_kind(name, array, hidden)
        if dtype_name(array) != dtype_name(hidden):
            raise TypeError(
                f"{name}: expected dtype {dtype_name(hidden)} like hidden, got {dtype_name(array)}"
            )
    if bias is not None:
        check_shape("head_bias", bias, (weight.shape[0],))
