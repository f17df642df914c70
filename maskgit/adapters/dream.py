"""Dream (Dream-org on the Hugging Face hub; NVlabs/Fast-dLLM at 5332e2fc): `_sample` of a model instance.

    model = AutoModel.from_pretrained("Dream-org/Dream-v0-Instruct-7B", trust_remote_code=True)
    with maskgit.adapters.fast_sampler(model) as handle:
        out = model.diffusion_generate(
            input_ids, attention_mask=attention_mask, max_new_tokens=256, steps=256,
            temperature=0.2, top_p=0.95, alg="entropy", alg_temp=0.0,
        )
    print(handle.report)

Replaced: `_sample`, the loop that `diffusion_generate` calls, on this instance (of a class that has
Dream's own; ZHZisZZ/dllm's copy is known too, forks are told by their code and refused).  What stays:
`diffusion_generate` with its configuration, the network, the hooks, the outputs.  All four algorithms
(origin, maskgit_plus, topk_margin, entropy), alg_temp, top_p and top_k.

The last linear layer is left out of the forward pass and applied to the masked rows alone, unless a
hook of the caller wants logits, the layer is not a plain one, the model does more after it, or autocast
is on: `report.notes` says which.  A step whose count is 0 does not call the model, where no hook could
tell.

What differs: random numbers come from one 64-bit seed per sequence, drawn in every call from torch's
generator: the same law, other tokens; they belong to a token's position in its text, not to where
padding has moved it.  Filters and softmax are in float32, where theirs round to the dtype of the
logits.  In rows of different lengths theirs can overwrite known tokens by masks, or leave masks, since
all rows have the mean's count; here known tokens stay, and with `fixed=True` each row has its own count.
Equal confidences commit the lower position.  A position without a finite logit stays masked, where theirs
takes id 0.  Fast-dLLM's own alg="confidence_threshold" is refused with a ValueError.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from ..kernels.decode_step import StepNoise, StepRule, commit_tokens
from .fingerprint import AdapterError, check_attributes, check_signature, check_version, original_of
from .lazy_head import Head, output_layer
from .patching import Handle, Report, draw_seeds, nucleus

_CODEBASE = (
    "NVlabs/Fast-dLLM@5332e2fc0edad553a5ac4fae6d6ec7b8cefc410a dream/model/generation_utils.py"
)
_ARGUMENTS = (
    "self, input_ids, attention_mask, generation_config, generation_tokens_hook_func, "
    "generation_logits_hook_func"
)
_DRAW = {
    "sample_tokens": "f953b981537899be",
    "top_p_logits": "8b77c16d28baf670",
    "top_k_logits": "cb098d7a5ba92e33",
}
VERSIONS = {  # Dream's own file as it stands in ZHZisZZ/dllm at 03270de7
    "Dream": {"_sample": "84f5179475b0822f"} | _DRAW,
    "Fast-dLLM's Dream": {"_sample": "b155f250deab69e1"} | _DRAW,
    "dllm's Dream": {"_sample": "0df0824dd060e799"} | _DRAW,
    "dllm's Dream at 81c80162": {"_sample": "0df0824dd060e799"}
    | _DRAW
    | {"sample_tokens": "c4b0866d99d36b5a"},
}
_SCORES = {
    "origin": "dream-origin",
    "maskgit_plus": "dream-maskgit-plus",
    "topk_margin": "dream-margin",
    "entropy": "dream-entropy",
}


def matches(target: Any) -> bool:
    """Whether the target is an object with Dream's methods."""
    methods = ("diffusion_generate", "_sample")
    return not isinstance(target, type) and all(
        callable(getattr(target, name, None)) for name in methods
    )


def install(
    target: Any,
    *,
    generator: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    hidden_states: bool = True,
    fixed: bool = False,
    backend: str = "auto",
    trust_version: bool = False,
) -> Handle:
    """Replace `_sample` of the model `target`.

    Args:
        target: the model.
        generator: the torch.Generator that seeds are drawn from; by default torch's own.
        noise: called with the number of the step, returns the noise to use instead.
        hidden_states: whether the head may be left out of the forward pass.
        fixed: whether each row has its own count, not the batch's mean (`dream-*-fixed`).
        backend: as in `maskgit.decode_step`.
        trust_version: whether a target whose code is not known is taken for a known one.
    """
    check_attributes(target, ("diffusion_generate", "_sample", "config"), "Dream")
    original = original_of(target._sample)
    report = Report("dream", _CODEBASE, _version_of(target, original, trust_version))
    loop: Callable[..., Any] = partial(
        sample,
        generator=generator,
        noise=noise,
        hidden_states=hidden_states,
        fixed=fixed,
        backend=backend,
        output_class=original.__globals__["DreamModelOutput"],
        note=report.note,
    )

    def call(model: Any, **kwargs: Any) -> Any:
        return loop(model, **kwargs)

    call.__doc__ = sample.__doc__
    handle = Handle(target, report)
    handle.replace_method("_sample", call)
    report.note("random numbers: one seed per sequence and call, drawn from torch's generator")
    report.note("known tokens stay known in rows of different lengths")
    return handle


def _version_of(target: Any, function: Any, trusted: bool) -> str:
    """Which `_sample` this is; AdapterError if none that is known."""
    longer = f"{_ARGUMENTS}, threshold"
    expected = longer if "threshold" in inspect.signature(function).parameters else _ARGUMENTS
    check_signature(function, expected, "_sample")
    if "DreamModelOutput" not in getattr(function, "__globals__", {}):
        raise AdapterError(
            "target: an unknown version of _sample; expected DreamModelOutput beside it"
        )
    return check_version(target, ("_sample",), VERSIONS, what="_sample", trusted=trusted)


def sample(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    generation_config: Any,
    generation_tokens_hook_func: Callable[..., Any] | None = None,
    generation_logits_hook_func: Callable[..., Any] | None = None,
    threshold: float | None = None,
    *,
    seeds: Any = None,
    generator: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    hidden_states: bool = True,
    fixed: bool = False,
    backend: str = "auto",
    output_class: Any = None,
    note: Callable[[str], None] = lambda sentence: None,
) -> Any:
    """Dream's loop: (B, max_length) tokens, or their output class around them.

    Args:
        model: called as model(tokens, attention_mask, positions), gives `.logits` (B, N, V).
        input_ids: (B, L) integers, padded with masks to `generation_config.max_length`.
        attention_mask: (B, L), 0 at padding, or None.
        generation_config: has max_length, mask_token_id, steps, eps, alg, alg_temp, temperature,
            top_p, top_k, output_history and return_dict_in_generate.
        generation_tokens_hook_func, generation_logits_hook_func: called after each step with (step,
            tokens, logits) and before it with (step, tokens, shifted logits); None is no hook.
        threshold: of an algorithm that is not supported; unused.
        seeds: (B,) 64-bit integers; by default drawn from `generator`, or torch's own.
        generator, noise, hidden_states, fixed, backend: see `install`.
        output_class: called with sequences= and history= where the configuration wants more than
            the tokens.
        note: called with sentences on what was done.

    Raises:
        ValueError: an algorithm that is not known; and as `decode_step`.
    """
    import torch

    rule = _rule_of(generation_config, fixed)
    flags = ("return_dict_in_generate", "return_dict")  # the latter in ZHZisZZ/dllm's copy
    wants_class = any(getattr(generation_config, name, False) for name in flags)
    if wants_class and output_class is None:
        raise ValueError("output_class: expected a class with return_dict_in_generate, got None")
    hooks = _Hooks(generation_tokens_hook_func, generation_logits_hook_func)
    why = "a hook of the caller wants them" if hidden_states else ""
    head = Head(output_layer(model), note, wanted=hidden_states and not hooks.any, why=why)
    steps, mask_id = int(generation_config.steps), int(generation_config.mask_token_id)
    if seeds is None and rule.needs_seeds:
        seeds = draw_seeds(input_ids.shape[0], generator, input_ids.device)
    histories: list[Any] | None = [] if wants_class and generation_config.output_history else None
    with torch.no_grad():
        x, masks, places = _padded(input_ids, attention_mask, generation_config.max_length, mask_id)
        x = hooks.tokens(None, x, None)
        for i in range(steps):
            numbers = {"mask_token_id": mask_id, "step": i, "num_steps": steps, "backend": backend}
            if hooks.any or not _commits_nothing(rule, x, numbers):
                numbers |= {"seeds": seeds, "noise": noise(i) if noise is not None else None}
                numbers |= {"positions": places}
                x = _step(model, x, masks, places, head, hooks, rule, numbers)
            if histories is not None:
                histories.append(x.clone())
    if wants_class:
        return output_class(sequences=x, history=histories)
    return x


@dataclass(frozen=True)
class _Hooks:
    """The caller's functions, `diffusion_generate`'s defaults told apart from them."""

    on_tokens: Callable[..., Any] | None
    on_logits: Callable[..., Any] | None

    @property
    def any(self) -> bool:
        """Whether the caller gave one."""
        return not all(_is_default(hook) for hook in (self.on_tokens, self.on_logits))

    def tokens(self, step: int | None, x: Any, logits: Any) -> Any:
        """What the hook on tokens makes of them."""
        return x if self.on_tokens is None else self.on_tokens(step, x, logits)

    def logits(self, step: int, x: Any, logits: Any) -> Any:
        """What the hook on logits makes of them."""
        return logits if self.on_logits is None else self.on_logits(step, x, logits)


def _is_default(hook: Any) -> bool:
    name = getattr(hook, "__qualname__", "")
    return hook is None or name.endswith("diffusion_generate.<locals>.<lambda>")


def _rule_of(config: Any, fixed: bool) -> StepRule:
    """The rule that a generation configuration asks for."""
    if config.alg not in _SCORES:
        raise ValueError(f"alg: expected one of {', '.join(_SCORES)}, got {config.alg!r}")
    top_p = nucleus(config.top_p)
    top_k = None if config.top_k is None else int(config.top_k)
    return _rule(
        config.alg,
        float(config.temperature),
        top_p,
        top_k,
        float(config.alg_temp or 0.0),
        float(config.eps),
        fixed,
    )


@lru_cache(maxsize=256)
def _rule(
    alg: str, temperature: float, top_p: float | None, top_k: int | None, alg_temp: float,
    eps: float, fixed: bool,
) -> StepRule:  # fmt: skip
    is_origin = alg == "origin"  # which commits by chance, each position for itself
    names = {"temperature": 1, "top_p": top_p, "top_k": top_k}
    return replace(
        StepRule.preset(_SCORES[alg] + ("-fixed" if fixed and not is_origin else "")),
        sample_temperature=temperature,
        filters=tuple(name for name, value in names.items() if value is not None),  # type: ignore[misc]
        top_p=top_p,
        top_k=top_k,
        choice_temperature=0.0 if is_origin else alg_temp,
        time_eps=eps,
        last_step="all" if is_origin else "schedule",
    )


def _padded(ids: Any, attention_mask: Any, max_length: int, mask_id: int) -> tuple[Any, Any, Any]:
    """Tokens, attention mask and positions of the whole sequence, as the model takes them."""
    import torch

    extra = (0, int(max_length) - int(ids.shape[1]))
    x = torch.nn.functional.pad(ids, extra, value=mask_id)
    if attention_mask is None or bool((attention_mask != 0).all()):
        return x, "full", None
    real = torch.nn.functional.pad(attention_mask != 0, extra, value=True)
    places = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)
    return x, real[:, None, None, :] & real[:, None, :, None], places


def _commits_nothing(rule: StepRule, x: Any, numbers: dict[str, Any]) -> bool:
    """Whether the count of this step is 0, so that the model need not be asked."""
    if rule.count != "fraction":
        return False
    by_count = replace(rule, score="given", choice_temperature=0.0)
    other = x.new_full(x.shape, int(numbers["mask_token_id"] == 0))
    result = commit_tokens(other, other.float(), x, rule=by_count, **numbers)
    return bool((result.next_tokens == x).all())


def _step(
    model: Any, x: Any, masks: Any, places: Any, head: Head, hooks: _Hooks, rule: StepRule,
    numbers: dict[str, Any],
) -> Any:  # fmt: skip
    """The tokens after one step: row i is decoded from what the model says at i - 1."""
    (out,) = head.run(lambda: model(x, masks, places).logits)
    out = hooks.logits(numbers["step"], x, _shifted(out))
    after = head.decode_step(out, x, rule=rule, **numbers).next_tokens
    return hooks.tokens(numbers["step"], after, out)


def _shifted(out: Any) -> Any:
    """Each row moved to the next position, the first one kept too."""
    import torch

    return torch.cat([out[:, :1], out[:, :-1]], dim=1)
