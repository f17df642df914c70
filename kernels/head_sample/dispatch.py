"""From the arguments of `decode_step_from_hidden` to the fused head, or to chunks of rows, and back."""

from __future__ import annotations

from typing import Any

from ..common.arrays import check_no_grad, check_same_kind, check_shape, dtype_name, kind_of
from ..common.backends import check_name, module_of
from ..common.mesh import active
from ..decode_step import dispatch as step_dispatch
from ..decode_step.door import LOGIT_DTYPES, admit, check_guidance, check_values, plan_of
from ..decode_step.inputs import signed_inputs
from ..decode_step.rule.rule import StepRule
from . import chunked


@step_dispatch.in_usual_jax
def decode(
    hidden: Any, head_weight: Any, tokens: Any, rule: StepRule, mask_token_id: int, step: int,
    num_steps: int, head_bias: Any, uncond_hidden: Any, guidance_scale: Any,
    num_masked_at_start: Any, seeds: Any, token_gumbel: Any, choice_gumbel: Any, eligible: Any,
    scores: Any, num_commit: Any, positions: Any, temperature: Any, threshold: Any, backend: str,
    check: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The checked call on arrays of one kind; what the op runs."""
    check_name(backend)
    rule = step_dispatch.with_scalars(rule, temperature, threshold)
    check_head(hidden, head_weight, head_bias)
    scale = check_guidance(hidden, uncond_hidden, guidance_scale, "uncond_hidden", "hidden")
    plan = plan_of(rule, mask_token_id, step, num_steps, hidden)
    x = admit(hidden, head_weight.shape[0], rule, plan, mask_token_id, {
        "tokens": tokens, "num_masked_at_start": num_masked_at_start, "seeds": seeds,
        "token_gumbel": token_gumbel, "choice_gumbel": choice_gumbel, "eligible": eligible,
        "scores": scores, "num_commit": num_commit, "positions": positions,
    })  # fmt: skip
    check_values(x, head_weight.shape[0], rule, plan, step)
    x = signed_inputs(x)
    mixed = mix(hidden, uncond_hidden, scale)
    way: Any = chunked
    chosen = step_dispatch.backend_for(hidden, backend)
    if chosen in ("triton", "pallas") and active() is None:
        fused: Any = module_of("head_sample", chosen)
        way = fused if fused.fuses(x, plan, mixed, head_weight) else chunked
    out, dead = way.decode_step(x, plan, mixed, head_weight, head_bias, backend)
    if step_dispatch.is_checked(check):
        step_dispatch.raise_on_dead(dead, "hidden")
    return step_dispatch.results(out, hidden, tokens)


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
