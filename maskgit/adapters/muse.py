"""lucidrains/muse-maskgit-pytorch at 6df7f33b: `generate` of a MaskGit instance.

    base = MaskGit(vae=vae, transformer=transformer, image_size=256)
    base.load("base.pt")

    with maskgit.adapters.fast_sampler(base) as handle:
        images = base.generate(texts=["a whale breaching from afar"], cond_scale=3.0)
    print(handle.report)

Replaced: `generate`, the whole loop, on this instance: alone, with a TokenCritic, with its own
SelfCritic, or with can_remask_prev_masked.  What stays: the transformer, the critic, the text encoder
and the autoencoders, called as theirs calls them.  The layer `to_logits` is left out of the forward
pass and applied to the masked rows alone, unless a hook or autocast is on it or the transformer does
more after it: `report.notes` says which.

What differs: random numbers come from one 64-bit seed per sequence, drawn in every call from torch's
generator: the same law, other tokens.  Scores are ranked as p, not 1 - p, which rounds; equal ones
commit the lower position.  Known tokens are masked again only by critics and can_remask_prev_masked,
whatever the schedule.  Critics are not run after the last step, nor the unconditional pass of a
SelfCritic, since theirs drops the results.  A position without a finite logit takes id 0, as in theirs,
at the end.  There is no progress bar.  Negative prompts raise
ValueError: in theirs they end in a NameError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..kernels.decode_step import StepNoise, StepResult, StepRule, commit_tokens
from .fingerprint import (
    TRUSTED,
    check_attributes,
    check_signature,
    check_version,
    original_of,
)
from .lazy_head import Head
from .patching import Handle, Report, draw_seeds
from .switch import evaluating, replaced

_CODEBASE = (
    "lucidrains/muse-maskgit-pytorch@6df7f33bcd33ba28a2f682d5bd293e4f8a513e6c "
    "muse_maskgit_pytorch/muse_maskgit_pytorch.py"
)
_ARGUMENTS = (
    "self, texts, negative_texts, cond_images, fmap_size, temperature, topk_filter_thres, "
    "can_remask_prev_masked, force_not_use_token_critic, timesteps, cond_scale, critic_noise_scale"
)
_FORWARD = (
    "x, return_embed, return_logits, labels, ignore_index, self_cond_embed, cond_drop_prob, "
    "conditioning_token_ids, texts, text_embeds"
)
_GUIDED = {"forward_with_cond_scale": "9d21df4b47c1a50a"}  # of the transformer and a TokenCritic
VERSIONS = {
    "6df7f33b": {  # since 2cc82dc
        "generate": "13299ca11ecc4942",
        "eval_decorator": "909cf2709c142948",
        "exists": "8526d5b855e1433f",
        "default": "352d4618d776ec48",
        "uniform": "93475b1dbdb342d6",
        "top_k": "3c604797cdfc48f0",
        "gumbel_sample": "9891a6eb67fb4e32",
        "gumbel_noise": "1a43688cca8c6a20",
        "log": "98e68e7e6919d9ff",
    }
}
_NETWORKS = {"6df7f33b": _GUIDED}
_SELF_CRITICS = {"6df7f33b": {"forward_with_cond_scale": "235001dfe83a7eb3"}}
_ATTRIBUTES = (
    "generate", "transformer", "token_critic", "noise_schedule", "mask_id", "vae", "cond_vae",
    "self_cond", "resize_image_for_cond_image", "no_mask_token_prob", "image_size",
)  # fmt: skip


def matches(target: Any) -> bool:
    """Whether the target is an object with MaskGit's attributes."""
    return not isinstance(target, type) and all(hasattr(target, name) for name in _ATTRIBUTES)


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
        target: the MaskGit.
        generator: the torch.Generator that seeds are drawn from; by default torch's own.
        noise: called with the number of the step, returns the noise to use instead; a critic's
            uniform noise is exp(-exp(-g)) of its `choice_gumbel`.
        hidden_states: whether `to_logits` may be left out of the forward pass.
        backend: as in `maskgit.decode_step`.
        trust_version: whether a target whose code is not known is taken for a known one.
    """
    check_attributes(target, _ATTRIBUTES, "MaskGit")
    check_signature(original_of(target.generate), _ARGUMENTS, "generate")
    check_attributes(target.transformer, ("forward", "encode_text", "to_logits"), "Transformer")
    check_signature(target.transformer.forward, _FORWARD, "Transformer.forward")
    critic = target.token_critic
    if critic is not None:
        check_attributes(critic, ("forward_with_cond_scale",), "the critic")
    version = _version_of(target, trust_version)
    report = Report("muse", _CODEBASE, version)
    report.note("random numbers: one seed per sequence and call, drawn from torch's generator")
    handle = Handle(target, report)
    options: dict[str, Any] = {"generator": generator, "noise": noise, "backend": backend}
    options |= {"hidden_states": hidden_states, "note": report.note}

    def call(model: Any, **kwargs: Any) -> Any:
        return generate(model, **(options | kwargs))

    call.__doc__ = generate.__doc__
    handle.replace_method("generate", call)
    return handle


def _version_of(target: Any, trusted: bool) -> str:
    """Which version this is; AdapterError for an unknown one of it, its transformer or its critic."""
    labels = [check_version(target, ("generate",), VERSIONS, what="MaskGit", trusted=trusted)]
    critic, what = target.token_critic, "MaskGit"
    parts = [("Transformer", target.transformer, _NETWORKS)]
    if critic is not None:
        what += f" with a {type(critic).__name__}"
        parts.append(("the critic", critic, _SELF_CRITICS if _is_self(critic) else _NETWORKS))
    for name, part, known in parts:
        relied = ("forward_with_cond_scale",)
        labels.append(check_version(part, (), known, relied=relied, what=name, trusted=trusted))
    return f"{what}, {TRUSTED if TRUSTED in labels else labels[0]}"


def _is_self(critic: Any) -> bool:
    """Whether a critic is a transformer with a layer of its own behind it."""
    return hasattr(critic, "net") and hasattr(critic, "to_pred")


def generate(
    model: Any,
    texts: list[str],
    negative_texts: list[str] | None = None,
    cond_images: Any = None,
    fmap_size: int | None = None,
    temperature: float = 1.0,
    topk_filter_thres: float = 0.9,
    can_remask_prev_masked: bool = False,
    force_not_use_token_critic: bool = False,
    timesteps: int = 18,
    cond_scale: float = 3,
    critic_noise_scale: float = 1,
    *,
    seeds: Any = None,
    generator: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    hidden_states: bool = True,
    backend: str = "auto",
    note: Callable[[str], None] = lambda sentence: None,
) -> Any:
    """Their loop from nothing: images, or (B, fmap_size, fmap_size) tokens without a vae.

    Args:
        model: the MaskGit.
        texts, cond_images, fmap_size, temperature, topk_filter_thres, can_remask_prev_masked,
            force_not_use_token_critic, timesteps, cond_scale, critic_noise_scale: as theirs.
        negative_texts: not supported.
        seeds: (B,) 64-bit integers; by default drawn from `generator`, or torch's own.
        generator, noise, hidden_states, backend: see `install`.
        note: called with sentences on what was done.

    Raises:
        ValueError: what is not supported, an image or a size that is missing; as `decode_step`.
    """
    import torch

    if negative_texts is not None:
        raise ValueError("negative_texts: expected None, theirs cannot run with them")
    if model.resize_image_for_cond_image and cond_images is None:
        raise ValueError("cond_images: expected images, which this model is conditioned on")
    if can_remask_prev_masked and model.no_mask_token_prob <= 0:
        raise ValueError(
            "can_remask_prev_masked: expected False for a model with no_mask_token_prob = 0"
        )
    if fmap_size is None and model.vae is None:
        raise ValueError("fmap_size: expected a number for a model without a vae, got None")
    size = model.vae.get_encoded_fmap_size(model.image_size) if fmap_size is None else fmap_size
    device = next(model.parameters()).device
    critic = None if force_not_use_token_critic else model.token_critic
    head = Head(model.transformer.to_logits, note, wanted=hidden_states)
    seeds = draw_seeds(len(texts), generator, device) if seeds is None else seeds
    with evaluating(model), torch.no_grad():
        given: dict[str, Any] = {"text_embeds": model.transformer.encode_text(texts)}
        given["conditioning_token_ids"] = (
            model.cond_vae.encode(cond_images)[1] if model.resize_image_for_cond_image else None
        )
        loop = _Loop(model, head, critic, given, cond_scale, float(critic_noise_scale))
        loop.remask = can_remask_prev_masked
        loop.filter = float(temperature), topk_filter_thres
        ids = torch.full((len(texts), size**2), model.mask_id, device=device)
        counts = _counts(model.noise_schedule, timesteps, size**2, device)
        for step in range(timesteps):
            numbers = {"mask_token_id": model.mask_id, "step": step, "num_steps": timesteps}
            options = numbers | {"seeds": seeds, "backend": backend}
            options["noise"] = None if noise is None else noise(step)
            ids = loop.step(ids, counts[step + 1], options)
        ids = ids.masked_fill(ids == model.mask_id, 0)  # left where no logit was finite
        ids = ids.view(len(texts), size, size)
        return ids if model.vae is None else model.vae.decode_from_ids(ids)


def _counts(schedule: Callable[[Any], Any], steps: int, length: int, device: Any) -> list[int]:
    """How many are masked at the start of each step, and 0 after the last one."""
    import torch

    times = torch.linspace(0, 1, steps, device=device)
    return [max(int((schedule(time) * length).item()), 1) for time in times] + [0]


@lru_cache(maxsize=256)
def _rule(temperature: float, top_k: int, score: Any, revise: Any, choice: float) -> StepRule:
    """Their step, with masking moved from the start of a step to the end of the one before."""
    return replace(
        StepRule.preset("muse"),
        count="given",  # the model has its own schedule
        revise=revise,
        sample_temperature=temperature,
        filters=("top_k",),
        top_k=top_k,
        score=score,
        choice_temperature=choice,
    )


@dataclass
class _Loop:
    """What a run's steps share."""

    model: Any
    head: Head
    critic: Any
    given: dict[str, Any]
    scale: float
    critic_noise: float
    remask: bool = False
    filter: tuple[float, float] = (1.0, 0.9)
    embed: Any = None  # of the step before, for a transformer that is conditioned on it

    def step(self, ids: Any, stay: int, options: dict[str, Any]) -> Any:
        """The tokens after one step, of which `stay` are masked."""
        competing = (ids == self.model.mask_id).sum(1)
        if self.critic is None:
            revise = "drawn" if self.remask else "no"
            competing = competing.fill_(ids.shape[1]) if self.remask else competing
            return self.draw(ids, "prob", revise, (competing - stay).clamp(min=0), options)[0]
        # all candidates, and the noise for the critic in place of a confidence
        everything = competing.fill_(ids.shape[1])
        _, filled, gumbels = self.draw(ids, "random", "held", everything, options)
        if stay == 0:
            return filled
        scores = self.judge(filled)
        uniforms = (-(-gumbels.double()).exp()).exp().to(scores.dtype)
        numbers = {k: v for k, v in options.items() if k not in ("noise", "seeds")}
        return commit_tokens(
            filled,
            -scores,
            ids,
            rule=_rule(self.filter[0], 1, "given", "held", self.critic_noise),
            choice_gumbel=0.5 - uniforms,
            num_commit=everything - stay,
            **numbers,
        ).next_tokens

    def draw(
        self, ids: Any, score: str, revise: str, num_commit: Any, options: dict[str, Any]
    ) -> StepResult:
        """One step on what the transformer says."""
        transformer, given = self.model.transformer, dict(self.given)
        given["self_cond_embed"] = self.embed
        embeds: list[Any] = []

        def conditional() -> Any:
            out, embed = transformer.forward(ids, return_embed=True, cond_drop_prob=0.0, **given)
            embeds.append(embed)
            return out

        def unconditional() -> Any:
            return transformer.forward(ids, cond_drop_prob=1.0, **given)

        passes = (conditional,) if self.scale == 1 else (conditional, unconditional)
        outs = self.head.run(*passes)
        self.embed = embeds[-1] if self.model.self_cond else None
        temperature, share = self.filter
        width = self.head.weight.shape[0] if self.head.is_used else outs[0].shape[-1]
        rule = _rule(temperature, math.ceil((1 - share) * width), score, revise, 0.0)
        options = options | {"rule": rule, "num_commit": num_commit}
        options["guidance_scale"] = None if self.scale == 1 else float(self.scale)
        return self.head.decode_step(outs[0], ids, *outs[1:], **options)

    def judge(self, filled: Any) -> Any:
        """The critic's scores (B, N), high where a token should be masked again."""
        is_self = _is_self(self.critic)
        own = is_self and self.critic.net is self.model.transformer
        scale = 1 if is_self else self.scale  # a SelfCritic drops the unconditional pass
        layer = self.model.transformer.to_logits  # whose logits are thrown away here
        skips = own and self.head.is_used
        with replaced(layer, "forward", lambda hidden: hidden) if skips else nullcontext():
            scores = self.critic.forward_with_cond_scale(filled, **self.given, cond_scale=scale)
        return scores.squeeze(-1).float()
