"""kuleshov-group/mdlm at c112c526: `_ddpm_update` and `_ddpm_caching_update` of a `Diffusion` object.

    model = Diffusion.load_from_checkpoint(path, tokenizer=tokenizer, config=config)

    with maskgit.adapters.fast_sampler(model) as handle:
        tokens = model.restore_model_and_sample(num_steps=1000)
    print(handle.report)

Replaced: the two updates, which are one step of `_sample` and `sample_subs_guidance`.  Whether a
masked position changes at a step does not depend on the model: it does so with probability 1 - s/t.
So the positions come first.  Where none changes, the model is not run at all; otherwise its last
linear layer is applied to the positions that change (of other backbones than DIT, and of one that does
more after that layer, all logits are made and those rows used), and tokens are drawn for them alone.
An accelerator is waited for once in a step, as upstream's comparison of x before and after does.  What
stays: the loops, `forward`, the schedule, and the greedy fill at the end, which makes all logits.

What differs: random numbers come from one 64-bit seed per sequence, drawn in every call from
torch's generator: the same law, without the tail of the Gumbel variates that upstream's 1e-10 cuts
off, and other tokens.  Both halves of a position's draw are independent there too.  The cached
probabilities that `_ddpm_caching_update` returns first are None; given ones are used.  A position without a
finite logit stays masked until the fill at the end, where theirs takes id 0 at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..kernels.decode_step import StepNoise, StepRule, sample_tokens
from ..kernels.decode_step.api import seeds_like
from .fingerprint import AdapterError, Known, check_attributes, check_signature, check_version
from .lazy_head import Head
from .patching import Handle, Report, draw_seeds
from .switch import replaced

_CODEBASE = "kuleshov-group/mdlm@c112c526d193436838c98d81455ee51f90309470 diffusion.py"
_NEEDED = (
    "_subs_parameterization", "_ddpm_update", "_ddpm_caching_update", "forward", "noise", "backbone",
    "mask_index", "parameterization", "config",
)  # fmt: skip

UPDATES = ("_ddpm_update", "_ddpm_caching_update")
RELIED = {"_subs_parameterization": "b434997a464e4579", "forward": "6fcf562b8b66fa95"}
VERSIONS = {
    "c112c526": {  # since 06dd29f
        "_ddpm_update": "96517de258d34b7e",
        "_ddpm_caching_update": "282e3129f13a354e",
        "_sample_categorical": "e69e674f6c81a059",
    }
    | RELIED
}


def matches(target: Any) -> bool:
    """Whether the target is a `Diffusion` object of mdlm, and not of a codebase grown from it."""
    import inspect

    update = getattr(target, "_ddpm_caching_update", None)
    if isinstance(target, type) or not callable(update) or hasattr(target, "block_size"):
        return False
    known = all(hasattr(target, name) for name in _NEEDED)
    return known and list(inspect.signature(update).parameters) == ["x", "t", "dt", "p_x0"]


def install(
    target: Any, *, generator: Any = None, backend: str = "auto", trust_version: bool = False
) -> Handle:
    """Replace the two updates of one `Diffusion` object.

    Args:
        target: the object.
        generator: the torch.Generator that seeds are drawn from; by default torch's own.
        backend: as in `maskgit.decode_step`.
        trust_version: whether a target whose code is not known is taken for a known one.

    Raises:
        AdapterError: an unknown version, or another parameterization than SUBS.
    """
    version = check_diffusion(target, "x, t, dt, p_x0", UPDATES, VERSIONS, trust_version)
    report = Report("mdlm", _CODEBASE, f"{version}, {parameters_of(target)}")
    head = head_of(target, report.note)
    report.note("positions first: the model is not run where nothing changes")
    report.note("the fill after the last step is upstream's and makes all logits")
    handle = Handle(target, report)
    options: dict[str, Any] = {"generator": generator, "backend": backend, "head": head}
    handle.replace_method("_ddpm_update", partial(ddpm_update, **options))
    handle.replace_method("_ddpm_caching_update", partial(ddpm_caching_update, **options))
    return handle


def ddpm_caching_update(
    model: Any,
    x: Any,
    t: Any,
    dt: Any,
    p_x0: Any = None,
    *,
    seeds: Any = None,
    generator: Any = None,
    noise: StepNoise | None = None,
    step: int = 0,
    backend: str = "auto",
    head: Head | None = None,
) -> tuple[None, Any]:
    """(None, x after the step from time t to t - dt) under the log-linear schedule.

    Args:
        model: a `Diffusion` object.
        x: (B, N) integers.
        t: (B,) or (B, 1), the time before the step; dt: the step.
        p_x0: (B, N, V) probabilities in place of the model's.
        seeds: (B,) 64-bit integers; by default drawn from `generator`, or torch's own.
        generator, backend: see `install`.
        noise: `StepNoise(token_gumbel, choice_gumbel)` in place of the seeds: the token's, with a
            column for the mask token that is not used, and the position's, (B, N); it changes
            where the latter is below -log(-log(1 - s/t)).
        step: the step whose random numbers are used.
        head: `head_of(model)`, where it is kept from call to call.
    """
    if model.config.noise.type != "loglinear":
        raise ValueError(f"noise.type: expected loglinear, got {model.config.noise.type!r}")
    sigma, _ = model.noise(t)
    t = t.squeeze(-1) if t.ndim > 1 else t
    options: dict[str, Any] = {"seeds": seeds, "generator": generator, "noise": noise, "step": step}
    options |= {"backend": backend, "head": head}
    return None, update(model, x, sigma, fall(t, t - dt), p_x0, **options)[0]


def ddpm_update(
    model: Any,
    x: Any,
    t: Any,
    dt: Any,
    *,
    seeds: Any = None,
    generator: Any = None,
    noise: StepNoise | None = None,
    step: int = 0,
    backend: str = "auto",
    head: Head | None = None,
) -> Any:
    """x after the step from time t to t - dt under any schedule; see `ddpm_caching_update`."""
    sigma_t, sigma_s = (s.squeeze(-1) if s.ndim > 1 else s for s in _sigmas(model, t, dt))
    before, after = 1 - (-sigma_t).exp(), 1 - (-sigma_s).exp()
    options: dict[str, Any] = {"seeds": seeds, "generator": generator, "noise": noise, "step": step}
    options |= {"backend": backend, "head": head}
    return update(model, x, sigma_t, fall(before, after), **options)[0]


def check_diffusion(
    target: Any, caching_update: str, replaced: tuple[str, ...], known: Known, trusted: bool
) -> str:
    """The version of a `Diffusion` object with this `_ddpm_caching_update`; else AdapterError."""
    check_attributes(target, _NEEDED, "Diffusion")
    check_signature(target._ddpm_caching_update, caching_update, "_ddpm_caching_update")
    check_signature(target._ddpm_update, "x, t, dt", "_ddpm_update")
    check_signature(target._subs_parameterization, "logits, xt", "_subs_parameterization")
    check_signature(target.forward, "x, sigma", "Diffusion.forward")
    if target.parameterization != "subs":
        raise AdapterError(
            f"target: expected parameterization 'subs', got {target.parameterization!r}"
        )
    return check_version(
        target, replaced, known, relied=tuple(RELIED), what="Diffusion", trusted=trusted
    )


def parameters_of(target: Any) -> str:
    """What of the configuration matters here, in words."""
    return f"backbone {type(target.backbone).__name__}, mask token {target.mask_index}"


def head_of(model: Any, note: Callable[[str], None] = lambda sentence: None) -> Head:
    """The last linear layer of a DIT backbone, whose output is the logits; none of others."""
    is_dit = type(model.backbone).__name__ == "DIT"
    layer = getattr(getattr(model.backbone, "output_layer", None), "linear", None)
    return Head(layer, note, wanted=is_dit, why="the backbone is not a DIT")


def logit_rows(model: Any, x: Any, sigma: Any, wanted: Any, head: Head | None = None) -> Any:
    """(R, V): the logits of the wanted rows of (B, N), in row-major order, without SUBS."""
    head = head or head_of(model)
    with replaced(model, "_subs_parameterization", lambda logits, xt: logits):
        return head.rows(lambda: model.forward(x, sigma), wanted)


def choice_gumbel(seeds: Any, shape: Any, step: int, device: Any) -> Any:
    """(B, N) standard Gumbel variates of positions: those of `decode_step` with these seeds."""
    import torch

    from ..kernels.common.philox import STREAM_CHOICE
    from ..kernels.common.philox.torch_form import gumbel
    from ..kernels.decode_step.inputs import key_words

    place = torch.arange(shape[1], device=device).expand(shape)
    return gumbel(key_words(seeds), place, step, STREAM_CHOICE, 1)[..., 0]


def happens(chance: Any, gumbels: Any) -> Any:
    """Bool: events of these chances, float64, decided by standard Gumbel variates."""
    bound = -(-chance.clamp(0, 1).log()).log()
    return gumbels < bound.to(gumbels.device)


def draw_rows(
    rows: Any, wanted: Any, rule: StepRule, seeds: Any, noise: Any, step: int, backend: str
) -> tuple[Any, Any]:
    """(tokens, scores), each (R,), for rows (R, V) of logits at the wanted positions of (B, N)."""
    if noise is None:
        sequence, place = wanted.nonzero(as_tuple=True)
        given = {"seeds": seeds[sequence], "positions": place}
    else:
        given = {"noise": StepNoise(noise.token_gumbel[wanted].float())}
    out = sample_tokens(rows, rule=rule, step=step, backend=backend, **given)
    return out.candidate_tokens, out.confidence


def update(
    model: Any,
    x: Any,
    sigma: Any,
    commit: Any,
    p_x0: Any = None,
    *,
    remask: Any = None,
    rule: StepRule | None = None,
    seeds: Any = None,
    generator: Any = None,
    noise: StepNoise | None = None,
    step: int = 0,
    backend: str = "auto",
    head: Head | None = None,
) -> tuple[Any, Any, Any]:
    """One step by chances: what it makes of x, which positions it filled in, and their scores (R,).

    Args:
        commit: chances of masked positions to be filled in, float64, broadcast against (B, N).
        remask: chances of known ones to be masked again.
        rule: how tokens are drawn and scored; at temperature 1 by default.
        the rest: see `ddpm_caching_update`.
    """
    if noise is None:
        seeds = draw_seeds(len(x), generator, x.device) if seeds is None else seeds_like(seeds, x)
        gumbels = choice_gumbel(seeds, x.shape, step, x.device)
    else:
        gumbels = noise.choice_gumbel
    masked = x == model.mask_index
    filled = masked & happens(commit, gumbels)
    after = x.clone()
    if remask is not None:
        after[~masked & happens(remask, gumbels)] = model.mask_index
    if not bool(filled.any()):
        return after, filled, after.new_zeros(0, dtype=commit.dtype)
    rows = logit_rows(model, x, sigma, filled, head) if p_x0 is None else p_x0[filled].log()
    if rule is None:
        rule = StepRule(banned_ids=(int(model.mask_index),), score="logit")
    tokens, scores = draw_rows(rows, filled, rule, seeds, noise, step, backend)
    is_drawn = tokens >= 0  # not where no logit is finite: such a position stays masked
    filled = filled.masked_scatter(filled, is_drawn)
    after[filled] = tokens[is_drawn].to(x.dtype)
    return after, filled, scores[is_drawn]


def fall(before: Any, after: Any) -> Any:
    """(B, 1) chances to be filled in as those to be masked go down, float64."""
    step, after = (before - after).double(), after.double().clamp(min=0)
    return (step / (step + after))[:, None]


def _sigmas(model: Any, t: Any, dt: Any) -> tuple[Any, Any]:
    return model.noise(t)[0], model.noise(t - dt)[0]
