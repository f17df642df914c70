"""LLaDA (ML-GSAI/LLaDA at b7e6c356): `generate` of its module generate.py.

    import generate as llada                            # the codebase's own file
    with maskgit.adapters.fast_sampler(llada) as handle:
        out = llada.generate(model, prompt, steps=128, gen_length=128, block_length=32,
                             temperature=0.5, cfg_scale=0.0, remasking="low_confidence")
    print(handle.report)

Replaced: `generate`, on that module.  The same function can be called without patching:
`maskgit.adapters.llada.generate(model, prompt, ...)`, with the same arguments, in the same order.
What stays: the network, the tokenizer, the mask id, the blocks and their quotas, guidance, both ways
of remasking, the two options for end tokens with what they really do (at temperature above 0
`confidence_eos_eot_inf` keeps only the end-of-turn id from being sure).

Where the model's last layer is a plain linear one, it is left out of the forward pass and applied to
the masked positions of the active block alone, guidance mixed on its input: no (B, N, V) logits, no
float64 copies.  Otherwise the model's logits are used as they are; `report.notes` says which.

What differs: random numbers come from one 64-bit seed per sequence, drawn in every call from torch's
generator (or given as `seeds`): the same law, drawn exactly where theirs stops at 2^-24 or 2^-53;
they belong to a token's place among the real tokens of its row, so that a left-padded row draws
what it draws alone.  Equal confidences commit the lower position, where torch.topk's choice is open.
A step with nothing left to fill does not call the model.  cfg_scale > 0 without an attention mask,
which raises NameError there, works.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..kernels.common.arrays import kind_of
from ..kernels.common.selection import check_name
from ..kernels.decode_step import StepNoise, StepRule
from ..sampler import generate as run_steps
from .common import (
    AdapterError,
    Handle,
    Report,
    check_signature,
    draw_seeds,
    linear_head,
    without_head,
)

_CODEBASE = "ML-GSAI/LLaDA@b7e6c3565f194352da44b38dd12b6970597309f3 generate.py"
_OLD = "model, prompt, steps, gen_length, block_length, temperature, cfg_scale, remasking, mask_id"
_NEW = (
    "model, prompt, attention_mask, steps, gen_length, block_length, temperature, cfg_scale, "
    "remasking, mask_id, logits_eos_inf, confidence_eos_eot_inf"
)
_EOS, _EOT = 126081, 126348
_REMASKING = ("low_confidence", "random")


def matches(target: Any) -> bool:
    """Whether the target is a module with LLaDA's three functions."""
    names = ("generate", "add_gumbel_noise", "get_num_transfer_tokens")
    return (
        inspect.ismodule(target)
        and all(callable(getattr(target, n, None)) for n in names)
        and (not hasattr(target, "get_transfer_index"))
    )


def install(
    target: Any,
    *,
    noise: Callable[[int], StepNoise] | None = None,
    hidden_states: bool = True,
    backend: str = "auto",
) -> Handle:
    """Replace `generate` of the module.

    Args:
        target: the module of generate.py.
        noise: called with the number of the step, returns the `StepNoise` to use (for tests).
        hidden_states: whether to leave the last layer out where that is possible.
        backend: as in `decode_step`.
    """
    if not matches(target):
        raise AdapterError(
            "target: expected the module of LLaDA's generate.py, with generate, add_gumbel_noise "
            "and get_num_transfer_tokens"
        )
    check_name(backend)
    version = _version(target.generate)
    report = Report("llada", _CODEBASE, version)
    handle = Handle(target, report)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        report.calls += 1
        if version == "before f51cb17 (scores in float64)":
            names = [name.strip() for name in _OLD.split(",")]
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            args, kwargs["score_dtype"] = (), "float64"
        return generate(
            *args,
            **kwargs,
            noise=noise,
            backend=backend,
            hidden_states=hidden_states,
            report=report,
        )

    replacement.__doc__, replacement.__name__ = generate.__doc__, "generate"
    handle.replace("generate", replacement)
    return handle


def _version(function: Any) -> str:
    """Which of the known versions the function is; AdapterError for others."""
    parameters = inspect.signature(function).parameters
    if "attention_mask" in parameters:
        check_signature(function, _NEW, "LLaDA's generate")
        return "b7e6c356"
    check_signature(function, _OLD, "LLaDA's generate")
    return "before f51cb17 (scores in float64)"


@lru_cache(maxsize=64)
def rule_for(
    temperature: float,
    remasking: str,
    score_dtype: str,
    banned: tuple[int, ...],
    quiet: tuple[int, ...],
) -> StepRule:
    """The `StepRule` of a call's arguments."""
    fields: dict[str, Any] = {"sample_temperature": float(temperature), "banned_ids": banned}
    if remasking == "random":
        return StepRule(**(_fields("random") | fields))
    fields |= {"score_dtype": score_dtype, "guidance_dtype": "logits", "score_banned_ids": quiet}
    return StepRule(**(_fields("llada") | fields))


def _fields(preset: str) -> dict[str, Any]:
    return {k: v for k, v in vars(StepRule.preset(preset)).items() if not k.startswith("_")}


def generate(
    model: Any,
    prompt: Any,
    attention_mask: Any = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    seeds: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    backend: str = "auto",
    hidden_states: bool = True,
    score_dtype: str = "logits",
    report: Report | None = None,
) -> Any:
    """LLaDA's `generate`: prompt (B, L) with `gen_length` tokens after it, (B, L + gen_length).

    The positional arguments are the original's.  `seeds`: (B,) 64-bit integers, by default drawn
    from torch's generator.  `attention_mask` (B, L): 0 at padding, as the original's.

    Raises:
        ValueError: lengths or steps that do not divide, an unknown `remasking`.
    """
    import torch

    _check_tensors(prompt, attention_mask)
    _check(steps, gen_length, block_length, remasking, temperature, cfg_scale)
    report = Report("llada", _CODEBASE, "called directly") if report is None else report
    batch, length = prompt.shape
    device = getattr(model, "device", prompt.device)
    x = torch.full((batch, length + gen_length), mask_id, dtype=torch.long, device=device)
    x[:, :length] = prompt
    if attention_mask is not None:
        more = torch.ones((batch, gen_length), dtype=attention_mask.dtype, device=device)
        attention_mask = torch.cat([attention_mask.to(device), more], dim=-1)
    if seeds is None and noise is None:
        seeds = draw_seeds(batch, None, device)
    head = linear_head(model) if hidden_states and cfg_scale >= 0 else None
    report.note(
        "works on logits: the model has no plain linear head"
        if head is None
        else "works on hidden states: the head is applied to masked rows of the block alone"
    )
    forward = _Forward(model, x != mask_id, mask_id, attention_mask, float(cfg_scale), head)
    quiet: tuple[int, ...] = ()
    if confidence_eos_eot_inf:
        quiet = (_EOS, _EOT) if temperature == 0 else (_EOT,)
    banned = (_EOS,) if logits_eos_inf else ()
    rule = rule_for(float(temperature), remasking, score_dtype, banned, quiet)
    with torch.no_grad():
        out = run_steps(
            forward,
            x,
            rule=rule,
            mask_token_id=mask_id,
            num_steps=steps,
            seeds=seeds,
            guidance_scale=float(cfg_scale) + 1.0 if cfg_scale > 0.0 else None,
            backend=backend,
            block_length=block_length,
            prompt_length=length,
            positions=_positions(attention_mask, x),
            head_weight=None if head is None else head.weight,
            head_bias=None if head is None else head.bias,
            noise=noise,
        )
    return out.tokens


class _Forward:
    """The model on tokens: logits or hidden states, with guidance a pair."""

    def __init__(
        self, model: Any, given: Any, mask_id: int, attention_mask: Any, scale: float, head: Any
    ):
        self.model, self.given, self.mask_id = model, given, mask_id
        self.attention_mask, self.scale, self.head = attention_mask, scale, head

    def __call__(self, tokens: Any) -> Any:
        import torch

        if self.scale <= 0.0:
            return self._run(tokens, self.attention_mask)
        uncond = torch.where(self.given, self.mask_id, tokens)
        mask = self.attention_mask
        both = self._run(
            torch.cat([tokens, uncond]), None if mask is None else torch.cat([mask, mask])
        )
        return tuple(torch.chunk(both, 2))

    def _run(self, tokens: Any, mask: Any) -> Any:
        options = {} if mask is None else {"attention_mask": mask}
        with without_head(self.head):
            return self.model(tokens, **options).logits


def _positions(attention_mask: Any, x: Any) -> Any:
    """Each token's place among the real tokens of its row; None without padding."""
    if attention_mask is None or bool((attention_mask != 0).all()):
        return None
    return ((attention_mask != 0).long().cumsum(1) - 1).clamp(min=0)


def _check_tensors(prompt: Any, attention_mask: Any) -> None:
    for name, x in (("prompt", prompt), ("attention_mask", attention_mask)):
        if name == "attention_mask" and x is None:
            continue
        if kind_of(x) != "torch":
            raise TypeError(f"{name}: expected a torch tensor, got {type(x).__name__}")
        if x.ndim != 2 or x.shape != prompt.shape:
            like = (
                "shape (B, L)" if name == "prompt" else f"the prompt's shape {tuple(prompt.shape)}"
            )
            raise ValueError(f"{name}: expected {like}, got {tuple(x.shape)}")


def _check(
    steps: int, gen_length: int, block_length: int, remasking: str, temperature: float, scale: float
) -> None:
    for name, count in {
        "steps": steps,
        "gen_length": gen_length,
        "block_length": block_length,
    }.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {count!r}")
    for name, number in {"temperature": temperature, "cfg_scale": scale}.items():
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{name}: expected a finite number, got {number!r}")
    if remasking not in _REMASKING:
        raise ValueError(f"remasking: expected {' or '.join(_REMASKING)}, got {remasking!r}")
    if gen_length % block_length:
        raise ValueError(
            f"block_length: expected a divisor of gen_length {gen_length}, got {block_length}"
        )
    blocks = gen_length // block_length
    if steps % blocks:
        raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")
