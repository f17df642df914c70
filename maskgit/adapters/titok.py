"""bytedance/1d-tokenizer (TiTok) at 942a96fb: `generate` of an ImageBert or UViTBert instance.

    generator = ImageBert.from_pretrained("yucornetto/generator_titok_l32_imagenet")

    with maskgit.adapters.fast_sampler(generator) as handle:
        tokens = generator.generate(labels, guidance_scale=4.5, randomize_temperature=9.5)
    print(handle.report)

Replaced: `generate`, the whole loop, on this instance, with its arguments.  What stays: the network,
called as theirs calls it.  The last linear layer is left out of the forward pass and applied to the
masked rows alone, unless a hook or autocast is on it or the network does more after it: `report.notes`
says which.

What differs: random numbers come from one 64-bit seed per sequence, drawn in every call from torch's
generator: the same law, other tokens (the network's own `rand_like` comes after it).  Guided logits
are rounded as theirs where the adapter works on logits; on hidden states guidance is in float32, and in
half precision they are then rounded once.  The unconditional pass is left out wherever its weight is 0,
as at the first step of guidance_decay="power-cosine".  A position without a finite logit takes id 0, as
in theirs, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from ..kernels.decode_step import StepNoise, StepRule
from .fingerprint import check_attributes, check_signature, check_version
from .lazy_head import Head
from .patching import Handle, Report, draw_seeds, guided_by_tensor

_CODEBASE = "bytedance/1d-tokenizer@942a96fbdd873780179d1b78d5462911528bf8c8 modeling/maskgit.py"
_ARGUMENTS = (
    "condition, guidance_scale, guidance_decay, guidance_scale_pow, randomize_temperature, "
    "softmax_temperature_annealing, num_sample_steps"
)
_ATTRIBUTES = ("forward", "generate", "image_seq_len", "mask_token_id")
VERSIONS = {"942a96fb": {"generate": "9bb776da759f02cb"}}  # since be0b076
_DECAYS = ("constant", "linear", "power-cosine")


def matches(target: Any) -> bool:
    """Whether the target is an object with ImageBert's attributes."""
    names = (*_ATTRIBUTES, "masking_input_tokens", "target_codebook_size")
    return not isinstance(target, type) and all(hasattr(target, name) for name in names)


def install(
    target: Any,
    *,
    generator: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    hidden_states: bool = True,
    backend: str = "auto",
    trust_version: bool = False,
) -> Handle:
    """Replace `generate` of the model `target`.

    Args:
        target: the model.
        generator: the torch.Generator that seeds are drawn from; by default torch's own.
        noise: called with the number of the step, returns the noise to use instead.
        hidden_states: whether the last layer may be left out of the forward pass.
        backend: as in `maskgit.decode_step`.
        trust_version: whether a target whose code is not known is taken for a known one.
    """
    check_attributes(target, _ATTRIBUTES, "ImageBert")
    check_signature(target.generate, _ARGUMENTS, "generate")
    version = check_version(
        target, ("generate",), VERSIONS, what="ImageBert", trusted=trust_version
    )
    report = Report("titok", _CODEBASE, f"{type(target).__name__} of {version}")
    report.note("random numbers: one seed per sequence and call, drawn from torch's generator")
    handle = Handle(target, report)
    options: dict[str, Any] = {"generator": generator, "noise": noise, "backend": backend}
    options |= {"hidden_states": hidden_states, "note": report.note}

    def call(model: Any, **kwargs: Any) -> Any:
        return generate(model, **(options | kwargs))

    call.__doc__ = generate.__doc__
    handle.replace_method("generate", call)
    return handle


def generate(
    model: Any,
    condition: Any,
    guidance_scale: float = 3.0,
    guidance_decay: str = "constant",
    guidance_scale_pow: float = 3.0,
    randomize_temperature: float = 4.5,
    softmax_temperature_annealing: bool = False,
    num_sample_steps: int = 8,
    *,
    seeds: Any = None,
    generator: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    hidden_states: bool = True,
    backend: str = "auto",
    note: Callable[[str], None] = lambda sentence: None,
) -> Any:
    """TiTok's loop from nothing: (B, image_seq_len) tokens.

    Args:
        model: called as model.forward(tokens, condition, cond_drop_prob=), gives logits (B, N, V).
        condition: (B,) or (B, ...) classes.
        guidance_scale, guidance_decay, guidance_scale_pow: as theirs; decays are "constant",
            "linear" (the scale of a step is its share of the steps), "power-cosine".
        randomize_temperature: of the draw and of the noise on its logit, falling to 0.
        softmax_temperature_annealing: whether logits are divided by 0.5 + 0.8 (steps left / steps).
        num_sample_steps: T.
        seeds: (B,) 64-bit integers; by default drawn from `generator`, or torch's own.
        generator, noise, hidden_states, backend: see `install`.
        note: called with sentences on what was done.

    Raises:
        ValueError: an unknown decay; and as `decode_step`.
    """
    import torch

    if guidance_decay not in _DECAYS:
        raise ValueError(
            f"guidance_decay: expected one of {', '.join(_DECAYS)}, got {guidance_decay!r}"
        )
    batch, device, mask_id = len(condition), condition.device, int(model.mask_token_id)
    if seeds is None and randomize_temperature > 0:
        seeds = draw_seeds(batch, generator, device)
    head = Head(_layer_of(model), note, wanted=hidden_states)
    ids = torch.full((batch, int(model.image_seq_len)), mask_id, device=device)
    for step in range(num_sample_steps):
        scale = _scale(guidance_decay, guidance_scale, guidance_scale_pow, step, num_sample_steps)
        left = 1 - (step + 1) / num_sample_steps
        divisor = 0.5 + 0.8 * left if softmax_temperature_annealing else 1.0
        options = {
            "rule": _rule(float(randomize_temperature) * divisor, guidance_decay),
            "mask_token_id": mask_id,
            "step": step,
            "num_steps": num_sample_steps,
            "seeds": seeds,
            "noise": None if noise is None else noise(step),
            "backend": backend,
        }
        with torch.no_grad():
            ids = _step(model, ids, condition, head, scale, guidance_decay, options)
    return ids.masked_fill(ids == mask_id, 0)  # left where no logit was finite


@lru_cache(maxsize=256)
def _rule(temperature: float, decay: str) -> StepRule:
    """Their step: l / c + t g and (l / c) + t g rank as l + c t g does."""
    return replace(
        StepRule.preset("titok"),
        sample_temperature=temperature,
        choice_temperature=temperature,
        guidance_form="from_uncond" if decay == "power-cosine" else "from_cond",
    )


def _scale(decay: str, scale: float, power: float, step: int, steps: int) -> float:
    """s in u + s (c - u) at a step; theirs is c + (s - 1) (c - u) save for the power cosine."""
    if decay == "constant":
        return 1.0 + scale
    if decay == "linear":
        return 1.0 + scale * step / steps
    return 1.0 + (scale - 1) * (1 - math.cos(math.pi * (step / steps) ** power)) / 2


def _layer_of(model: Any) -> Any:
    """The last layer: ImageBert's is inside its BertModel, UViTBert's its own."""
    return getattr(getattr(model, "model", model), "lm_head", None)


def _step(
    model: Any, ids: Any, condition: Any, head: Head, scale: float, decay: str,
    options: dict[str, Any],
) -> Any:  # fmt: skip
    """The tokens after one step."""
    chances = (0.0, 1.0) if scale != 1 else (0.0,)  # of the condition to be dropped
    passes = [partial(model.forward, ids, condition, cond_drop_prob=chance) for chance in chances]
    outs = head.run(*passes)
    in_half = not head.is_used and outs[0].element_size() == 2
    if in_half and scale != 1 and decay == "power-cosine":  # whose scale is a tensor
        cond, uncond = outs
        outs, scale = (guided_by_tensor(uncond, cond, uncond, scale),), 1
    options = options | {"guidance_scale": scale if scale != 1 else None}
    return head.decode_step(outs[0], ids, *outs[1:], **options).next_tokens
