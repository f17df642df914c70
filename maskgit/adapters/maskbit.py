"""markweberdev/maskbit at 5ea3d733: `sample` of modeling/modules/sampling.py.

    from modeling.modules import sampling

    with maskgit.adapters.fast_sampler(sampling) as handle:
        images, steps = sampling.sample(
            model, vqgan, num_samples=50, labels=labels, num_steps=64, randomize_temperature=7.8,
            guidance_scale=7.1, mask_schedule_strategy="arccos", guidance_annealing="cosine",
            codebook_size=2**14, codebook_splits=2, mask_token=128,
        )
    print(handle.report)

Replaced: `sample`, the whole loop, in the module that is given, with its arguments and results; where
other modules have imported the function by name, patch them instead: any module with `sample` of
these parameters will do.  What stays: the network, called on the doubled batch as theirs calls it,
and the tokenizer.  The factors of all positions are decoded as one sequence, as in theirs.

What differs: random numbers come from one 64-bit seed per sequence, drawn in every call from torch's
generator: the same law, other tokens.  Guided logits are rounded as theirs; the unconditional half is
left out at a step where its weight is 0.  Where a single token is left before the last step, theirs masks the
whole sequence again; here that token alone is drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

from ..kernels.decode_step import StepNoise, StepRule, decode_step
from .fingerprint import check_signature, check_version
from .patching import Handle, Report, draw_seeds, guided_by_tensor

_CODEBASE = (
    "markweberdev/maskbit@5ea3d733c62625eaf86dab8364bdb7e6e71def99 modeling/modules/sampling.py"
)
_ARGUMENTS = (
    "model, vqgan_model, num_samples, labels, softmax_temperature, randomize_temperature, "
    "mask_schedule_strategy, num_steps, guidance_scale, mask_token, patch_size, "
    "guidance_annealing, use_sampling_annealing, scale_pow, codebook_size, codebook_splits, use_tqdm"
)
VERSIONS = {
    "5ea3d733": {
        "sample": "1c9db9c250a11cb9",
        "get_masking_ratio": "25c8dcfe0a9514cd",
        "combine_factorized_tokens": "7e95a8b516dbaf7d",
    }
}
_SCHEDULES = {"arccos": "arccos", "cosine": "cosine", "linear": "linear", "root": "sqrt",
              "square": "square"}  # fmt: skip
_ANNEALINGS = ("none", "linear", "cosine")
_LABELS = (1, 7, 282, 604, 724, 179, 751, 404, 850)  # theirs, and one at random


def matches(target: Any) -> bool:
    """Whether the target is a module with a `sample` of their parameters."""
    import inspect

    function = getattr(target, "sample", None)
    if not isinstance(target, ModuleType) or not inspect.isroutine(function):
        return False
    try:
        return "codebook_splits" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def install(
    target: Any,
    *,
    generator: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    backend: str = "auto",
    trust_version: bool = False,
) -> Handle:
    """Replace `sample` in the module `target`.

    Args:
        target: the module.
        generator: the torch.Generator that seeds are drawn from; by default torch's own.
        noise: called with the number of the step, returns the noise to use instead.
        backend: as in `maskgit.decode_step`.
        trust_version: whether a target whose code is not known is taken for a known one.
    """
    check_signature(getattr(target, "sample", None), _ARGUMENTS, "sample")
    version = check_version(target, ("sample",), VERSIONS, what="sample", trusted=trust_version)
    report = Report("maskbit", _CODEBASE, version)
    report.note("works on logits: the network's last layer is its own")
    report.note("random numbers: one seed per sequence and call, drawn from torch's generator")
    handle = Handle(target, report)
    options: dict[str, Any] = {"generator": generator, "noise": noise, "backend": backend}

    def call(_: Any, **kwargs: Any) -> Any:
        return sample(**(options | kwargs))

    call.__doc__ = sample.__doc__
    handle.replace_method("sample", call)
    return handle


def sample(
    model: Any,
    vqgan_model: Any,
    num_samples: int = 10,
    labels: Any = None,
    softmax_temperature: float = 1.0,
    randomize_temperature: float = 4.5,
    mask_schedule_strategy: str = "linear",
    num_steps: int = 12,
    guidance_scale: float = 3.0,
    mask_token: int = 1024,
    patch_size: int = 16,
    guidance_annealing: str = "none",
    use_sampling_annealing: bool = False,
    scale_pow: float = 4.0,
    codebook_size: int = 1024,
    codebook_splits: int = 1,
    use_tqdm: bool = False,
    *,
    seeds: Any = None,
    generator: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    backend: str = "auto",
) -> tuple[Any, list[Any]]:
    """Their loop: (images, the (B, patch_size^2, codebook_splits) candidates of every step).

    Args:
        model: called as model(tokens, labels, drop), gives logits (B, N, splits, V).
        vqgan_model: has decode_tokens, which gets the tokens of the factors put together.
        labels: (num_samples,) classes; by default theirs, for multiples of 10.
        softmax_temperature: of the draw and of its probability.
        seeds: (B,) 64-bit integers; by default drawn from `generator`, or torch's own.
        generator, noise, backend: see `install`; noise is of shapes (B, N splits, V), (B, N splits).
        the rest: as theirs.

    Raises:
        ValueError: an unknown schedule or annealing, labels of another number, a position that never
            had a finite logit; as `decode_step`.
    """
    import torch

    _check_name("mask_schedule_strategy", mask_schedule_strategy, _SCHEDULES)
    _check_name("guidance_annealing", guidance_annealing, _ANNEALINGS)
    model.eval()
    vqgan_model.eval()
    labels = _labels(num_samples, model.device) if labels is None else labels
    if len(labels) != num_samples:
        raise ValueError(f"labels: expected {num_samples} (num_samples), got {len(labels)}")
    shape = (num_samples, patch_size**2, int(codebook_splits))
    x = torch.full(shape, mask_token, device=model.device)
    seeds = draw_seeds(num_samples, generator, model.device) if seeds is None else seeds
    steps: list[Any] = []
    for step in _bar(num_steps) if use_tqdm else range(num_steps):
        scale = guidance_scale * _share(guidance_annealing, scale_pow, step / num_steps)
        if use_sampling_annealing:
            softmax_temperature = 0.5 + 0.8 * (1 - (step + 1) / num_steps)
        with torch.no_grad():
            cond, uncond = _logits(model, x, labels, scale != 0)
            in_half = uncond is not None and cond.element_size() == 2
            if in_half and guidance_annealing == "cosine":  # whose scale is a tensor
                cond, uncond = guided_by_tensor(cond, cond, uncond, scale), None
            result = decode_step(
                cond,
                x.flatten(1),
                rule=_rule(
                    float(softmax_temperature), float(randomize_temperature), mask_schedule_strategy
                ),
                mask_token_id=mask_token,
                step=step,
                num_steps=num_steps,
                seeds=seeds,
                noise=None if noise is None else noise(step),
                uncond_logits=uncond,
                guidance_scale=None if uncond is None else 1.0 + scale,
                backend=backend,
            )
        x = result.next_tokens.view(shape)
        steps.append(result.candidate_tokens.view(shape))
    left = int((steps[-1] == mask_token).sum()) if mask_token >= cond.shape[-1] else 0
    if left:
        raise ValueError(f"logits: expected a finite one at each position, got none at {left}")
    with torch.no_grad():
        images = vqgan_model.decode_tokens(_together(steps[-1], codebook_size))
    return images, steps


@lru_cache(maxsize=256)
def _rule(softmax_temperature: float, randomize_temperature: float, strategy: str) -> StepRule:
    """Their step on the factors of all positions as one sequence."""
    return replace(
        StepRule.preset("maskbit"),
        schedule=_SCHEDULES[strategy],
        sample_temperature=softmax_temperature,
        choice_temperature=randomize_temperature,
    )


def _check_name(argument: str, name: str, legal: Any) -> None:
    if name not in legal:
        raise ValueError(f"{argument}: expected one of {', '.join(legal)}, got {name!r}")


def _share(annealing: str, power: float, done: float) -> float:
    """The share of the guidance scale at a step."""
    if annealing == "cosine":
        return (1 - math.cos(math.pi * done**power)) / 2
    return done if annealing == "linear" else 1.0


def _logits(model: Any, x: Any, labels: Any, guided: bool) -> tuple[Any, Any]:
    """(conditional, unconditional or None) logits (B, N splits, V)."""
    import torch

    drop = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if not guided:
        return model(x.clone(), labels, drop).flatten(1, 2), None
    both = model(torch.cat([x, x]), torch.cat([labels, labels]), torch.cat([drop, ~drop]))
    cond, uncond = both.flatten(1, 2).chunk(2)
    return cond, uncond


def _labels(num_samples: int, device: Any) -> Any:
    import torch

    labels = [*_LABELS, int(torch.randint(0, 999, (1,)))]
    return torch.tensor(labels * (num_samples // 10), device=device)


def _together(tokens: Any, codebook_size: int) -> Any:
    """(B, N) codes, in floating point as theirs, whose lowest bits are the first factor's."""
    import torch

    splits = tokens.shape[-1]
    bits = int(math.log2(codebook_size)) // splits
    codes = (tokens << (torch.arange(splits, device=tokens.device) * bits)).sum(-1)
    return codes.to(torch.get_default_dtype())


def _bar(num_steps: int) -> Any:
    from tqdm import tqdm

    return tqdm(range(num_steps), desc="Sampling steps", position=1)
