"""kuleshov-group/remdm at f830d659: the updates of a `Diffusion` object that re-masks.

    model = Diffusion.load_from_checkpoint(path, tokenizer=tokenizer, config=config)

    with maskgit.adapters.fast_sampler(model) as handle:
        tokens = model.restore_model_and_sample(num_steps=1024)
    print(handle.report)

Replaced: `_ddpm_caching_update` with all its samplers (mdlm, forward-backward, remdm-cap,
remdm-rescale, remdm-conf, remdm-loop), `_dfm_caching_update` and `_ddpm_update`.  Whether a position
is filled in, or masked again, is a matter of chances that do not depend on the model's output, so the
positions come first, as in the mdlm adapter: the model is not run where no position is filled in, and
its last linear layer is applied to those that are, which alone are filtered and drawn.  What stays:
the loops, `forward`, the schedule, and the greedy fill at the end, which makes all logits.

What differs: as in the mdlm adapter, random numbers come from one 64-bit seed per sequence and call,
and no probabilities are kept between calls.  The confidences of remdm-conf are kept in the tensor
that is passed (bfloat16), but turned into chances in float32, and it runs in float32 too.  An
unknown sampler raises ValueError.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ..kernels.decode_step import StepNoise, StepRule
from . import mdlm
from .fingerprint import check_signature
from .lazy_head import Head
from .patching import Handle, Report

_CODEBASE = "kuleshov-group/remdm@f830d659fb98d9b2c79ff71bfa12d578312b688a diffusion.py"
_UPDATE = "x, t, dt, p_x0, conf"
UPDATES = (*mdlm.UPDATES, "_dfm_caching_update")
VERSIONS = {
    "f830d659": {
        "_ddpm_update": "96517de258d34b7e",
        "_ddpm_caching_update": "a1a0d5708ced3fc6",
        "_dfm_caching_update": "9e57c8b2e4fea65e",
        "_sample_categorical": "efb22d64a7e8d9d4",
    }
    | mdlm.RELIED
}
SAMPLERS = (
    "mdlm", "forward-backward", "remdm-cap", "remdm-rescale", "remdm-conf", "remdm-loop",
)  # fmt: skip


def matches(target: Any) -> bool:
    """Whether the target is a `Diffusion` object of remdm."""
    import inspect

    update = getattr(target, "_ddpm_caching_update", None)
    if isinstance(target, type) or not callable(update):
        return False
    known = hasattr(target, "_dfm_caching_update") and hasattr(target, "mask_index")
    return known and ", ".join(inspect.signature(update).parameters) == _UPDATE


def install(
    target: Any, *, generator: Any = None, backend: str = "auto", trust_version: bool = False
) -> Handle:
    """Replace the three updates of one `Diffusion` object.

    Args:
        target: the object.
        generator: the torch.Generator that seeds are drawn from; by default torch's own.
        backend: as in `maskgit.decode_step`.
        trust_version: whether a target whose code is not known is taken for a known one.

    Raises:
        AdapterError: an unknown version, or another parameterization than SUBS.
    """
    check_signature(
        getattr(target, "_dfm_caching_update", None), "x, t, p_x0", "_dfm_caching_update"
    )
    version = mdlm.check_diffusion(target, _UPDATE, UPDATES, VERSIONS, trust_version)
    report = Report("remdm", _CODEBASE, f"{version}, {mdlm.parameters_of(target)}")
    head = mdlm.head_of(target, report.note)
    report.note("positions first: the model is not run where nothing is filled in")
    report.note("the fill after the last step is upstream's and makes all logits")
    handle = Handle(target, report)
    options: dict[str, Any] = {"generator": generator, "backend": backend, "head": head}
    handle.replace_method("_ddpm_update", partial(mdlm.ddpm_update, **options))
    handle.replace_method("_ddpm_caching_update", partial(ddpm_caching_update, **options))
    handle.replace_method("_dfm_caching_update", partial(dfm_caching_update, **options))
    return handle


def ddpm_caching_update(
    model: Any,
    x: Any,
    t: Any,
    dt: Any,
    p_x0: Any = None,
    conf: Any = None,
    *,
    seeds: Any = None,
    generator: Any = None,
    noise: StepNoise | None = None,
    step: int = 0,
    backend: str = "auto",
    head: Head | None = None,
) -> tuple[None, Any, Any]:
    """(None, x after the step from time t to t - dt, conf) by `model.config.sampling.sampler`.

    Args:
        conf: (B, N), minus the probability with which a token was drawn, -inf where masked; it is
            changed in place, by remdm-conf alone.
        the rest: see `mdlm.ddpm_caching_update`.  `noise.choice_gumbel` decides for masked positions
            whether they are filled in, and for known ones whether they are masked again.
    """
    sampling, masked = model.config.sampling, x == model.mask_index
    if sampling.sampler not in SAMPLERS:
        raise ValueError(
            f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampling.sampler!r}"
        )
    sigma, t = _time(model, t)
    uses_conf = sampling.sampler == "remdm-conf"
    if uses_conf and conf is None:
        raise ValueError(
            "conf: expected the (B, N) confidences of the sampler remdm-conf, got None"
        )
    if sampling.sampler == "mdlm":
        commit, remask = mdlm.fall(t, t - dt), None
    else:
        commit, remask = chances(sampling, t, dt, conf, masked)
    options: dict[str, Any] = {"seeds": seeds, "generator": generator, "noise": noise}
    after, filled, scores = mdlm.update(
        model, x, sigma, commit, p_x0, remask=remask, rule=_rule(model, p_x0, uses_conf), step=step,
        backend=backend, head=head, **options,
    )  # fmt: skip
    if uses_conf:
        conf[filled] = -scores.to(conf.dtype)
        conf[~masked & (after == model.mask_index)] = float("-inf")
    return None, after, conf


def dfm_caching_update(
    model: Any,
    x: Any,
    t: Any,
    p_x0: Any = None,
    *,
    seeds: Any = None,
    generator: Any = None,
    noise: StepNoise | None = None,
    step: int = 0,
    backend: str = "auto",
    head: Head | None = None,
) -> tuple[None, Any, float]:
    """(None, x after a step, the time after it): discrete flow matching with its corrector.

    The arguments are those of `ddpm_caching_update`; the length of the step follows from t.
    """
    sigma, t = _time(model, t)
    now = t[0].item()
    forward = 10 * now**0.25 * (1 - now) ** 0.25 + 1
    width = 1 / model.config.sampling.steps
    if now == 1:
        commit, remask = mdlm.fall(t, t - width), None
    else:
        width = min(width, 1 / (forward / now + (forward - 1) / (1 - now)))
        # the two levels have the precision of t, as the chances of the other samplers have
        a, b = 1 - t[:1].double(), 1 - (t[:1] - width).double()
        commit, remask = (
            (forward * (b - a) / (1 - a))[:, None],
            ((forward - 1) * (b / a - 1))[:, None],
        )
    after, _, _ = mdlm.update(
        model, x, sigma, commit, p_x0, remask=remask, rule=_rule(model, p_x0, False), seeds=seeds,
        generator=generator, noise=noise, step=step, backend=backend, head=head,
    )  # fmt: skip
    return None, after, now - width


def chances(sampling: Any, t: Any, dt: Any, conf: Any, masked: Any) -> tuple[Any, Any]:
    """(chance of a masked position to be filled in, of a known one to be masked again), float64.

    With a and b the shares of known tokens before and after the step and r the chance to be masked
    again, masked positions are filled in with (b - (1 - r) a) / (1 - a) (arXiv 2503.00307).
    """
    import torch

    before, after = t[0].item(), (t - dt)[0].item()
    a, b, kind = 1 - before, 1 - after, sampling.sampler
    bound = min(1.0, (1 - b) / a) if a > 0 else 1.0
    if kind == "remdm-loop" and before > sampling.t_on:
        slope = sampling.alpha_on / (1 - sampling.t_on)
        return mdlm.fall(1 - (1 - t) * slope, 1 - (1 - t + dt) * slope), None
    if kind == "remdm-loop" and before <= sampling.t_off:
        return mdlm.fall(t, t - dt), None
    again = torch.full((1, 1), _remask_chance(sampling, a, b, bound), dtype=torch.float64)
    if kind == "remdm-conf":
        share = conf.double().softmax(-1).masked_fill(masked, 0.0)
        return torch.full_like(share, (b - a) / (1 - a)), share * bound
    if kind == "remdm-loop":
        a = b = sampling.alpha_on
    again = again.to(t.device)
    return (b - (1 - again) * a) / (1 - a), again


def _remask_chance(sampling: Any, a: float, b: float, bound: float) -> float:
    """The chance of known positions to be masked again, the same for all of them."""
    if sampling.sampler == "forward-backward":
        return (b - a) / a if a > 0 else 1.0
    if sampling.sampler == "remdm-rescale":
        return float(sampling.eta * bound)
    if sampling.sampler == "remdm-cap":
        return float(min(sampling.eta, (1 - b) / a) if a > 0 else sampling.eta)
    return float(sampling.eta) if sampling.sampler == "remdm-loop" else 0.0


def _time(model: Any, t: Any) -> tuple[Any, Any]:
    """(sigma, t as (B,)) of the log-linear schedule."""
    if model.config.noise.type != "loglinear":
        raise ValueError(f"noise.type: expected loglinear, got {model.config.noise.type!r}")
    return model.noise(t)[0], t.squeeze(-1) if t.ndim > 1 else t


def _rule(model: Any, p_x0: Any, scored: bool) -> StepRule:
    """How tokens are drawn: from a nucleus that ends below p, unless the probabilities are given."""
    given: dict[str, Any] = {}
    top_p = model.config.sampling.nucleus_p
    if p_x0 is None and top_p < 1:
        given = {"filters": ("top_p",), "top_p": float(top_p), "top_p_keep": "below"}
        given["score_filtered"] = True
    return StepRule(
        banned_ids=(int(model.mask_index),), score="prob" if scored else "logit", **given
    )
