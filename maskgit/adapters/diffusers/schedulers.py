"""huggingface/diffusers: its four schedulers of discrete tokens with a fused step.

Follows huggingface/diffusers@58eb52c0803ea9af3abec60841c2a093bdf1f951: `AmusedScheduler`,
`BlockRefinementScheduler`, `EntropyBoundScheduler` and `DiscreteDDIMScheduler`.  What is replaced and
relied on has the same code in the releases 0.39 to 0.42.1 (in 0.36 to 0.38, AmusedScheduler's alone);
another is refused unless it is trusted.  What a caller leaves out has diffusers' own defaults.

    from maskgit.adapters.diffusers.schedulers import AmusedScheduler
    scheduler = AmusedScheduler.from_pretrained("amused/amused-512", subfolder="scheduler")
    pipe = AmusedPipeline.from_pretrained("amused/amused-512", scheduler=scheduler)

    handle = maskgit.adapters.patch(pipe)        # or: swap the scheduler of a pipeline that exists
    pipe("a photo of an astronaut", generator=torch.manual_seed(0))
    handle.undo()

What is replaced: `step` (guided logits in, tokens out), and in block refinement also
`check_eos_finished`, which asked the host once per sequence.  The classes derive from the stock
ones, so that configs, `set_timesteps`, `add_noise` and the pipelines stay as they are; the swapped-in
scheduler takes over the state of the old one.

What differs:
    * Random numbers come from per-sequence seeds, drawn once per step from `generator` (or torch's
      global one), or given by `seeds=`; the law is the same.  With seeds a sequence's tokens do not
      depend on the batch it is in.
    * Known tokens stay known.  aMUSEd's own step masks one again where nothing of a row is masked,
      and in float16, where their score is only 11, now and then.
    * In half precision aMUSEd's own step draws from probabilities rounded to that precision; this
      one draws from the logits.  The score is rounded in both.  Block refinement divides by the
      temperature in that precision; here that is float32 too.
    * In half precision `EntropyBoundScheduler` accepts by entropies and sums that are rounded as diffusers'
      own are, which reads the logits again; the draw is the fused one.
    * A row of logits without a finite number commits nothing (without a mask token, it is replaced, or
      stays).  In block refinement, whose loops end when nothing is masked, it commits id 0 before all
      others, as diffusers' own does where it takes an argmax.
    * `DiscreteDDIMScheduler.step_correct` is diffusers' own.
    * A pipeline that is saved with one of these schedulers names diffusers' own.
"""

from __future__ import annotations

import functools
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from ...kernels.common.extras import pip_install
from ...kernels.decode_step import StepNoise, StepRule, decode_step, sample_tokens
from ..fingerprint import (
    TRUSTED,
    AdapterError,
    check_attributes,
    check_signature,
    check_version,
    with_their_defaults,
)
from ..lazy_head import obstacle, output_layer
from ..patching import Handle, Report, as_number
from .common import (
    DEFAULTS,
    backend_of,
    check_code,
    giving,
    next_call,
    options_of,
    output_class,
    seeds_of,
    starting_again,
    stock_class,
)
from .uniform import discrete_ddim_step, entropy_bound_step

if TYPE_CHECKING:
    AmusedScheduler: Any
    BlockRefinementScheduler: Any
    DiscreteDDIMScheduler: Any
    EntropyBoundScheduler: Any

_COMMIT = "huggingface/diffusers@58eb52c0803ea9af3abec60841c2a093bdf1f951"
_STEP = {
    "AmusedScheduler": "self, model_output, timestep, sample, starting_mask_ratio, generator, "
    "return_dict",
    "BlockRefinementScheduler": "self, model_output, timestep, sample, mask_token_id, temperature, "
    "top_p, top_k, sampling_method, threshold, editing_threshold, minimal_topk, prompt_mask, "
    "generator, return_dict",
    "EntropyBoundScheduler": "self, model_output, timestep, sample, entropy_bound, generator, return_dict",
    "DiscreteDDIMScheduler": "self, model_output, timestep, sample, temperature, generator, return_dict",
}
_SET_TIMESTEPS = {
    "AmusedScheduler": "self, num_inference_steps, temperature, device",
    "BlockRefinementScheduler": "self, num_inference_steps, device, block_length",
    "EntropyBoundScheduler": "self, num_inference_steps, device",
    "DiscreteDDIMScheduler": "self, num_inference_steps, device",
}
_OUTPUT = {
    "AmusedScheduler": "prev_sample, pred_original_sample",
    "BlockRefinementScheduler": "prev_sample, transfer_index, editing_transfer_index, "
    "sampled_tokens, sampled_probs, pred_logits",
    "EntropyBoundScheduler": "prev_sample, accepted_index, sampled_tokens, sampled_probs, pred_logits",
    "DiscreteDDIMScheduler": "prev_sample, sampled_tokens, sampled_probs, pred_logits",
}
_DRAW = "self, logits, temperature, top_k, top_p, generator, use_multinomial"
_EOS = "cur_x, sampled_tokens, final_transfer, finished, eos_token_id, mask_token_id, prompt_length"


def __getattr__(name: str) -> Any:
    """The classes, made when they are asked for: diffusers is imported only then."""
    if name in _STEP:
        return scheduler_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def matches(target: Any) -> bool:
    """Whether `target` is a pipeline with one of the stock schedulers."""
    return _stock_name(getattr(target, "scheduler", None)) is not None


def install(
    target: Any,
    *,
    seeds: Any = None,
    backend: str = "auto",
    trim_head: bool = False,
    trust_version: bool = False,
) -> Handle:
    """Swap the scheduler of a pipeline instance for the class of the same name in this module.

    Args:
        target: a diffusers pipeline with one of the four schedulers.
        seeds: (B,) 64-bit integers for every call of the pipeline; by default drawn from its
            `generator`.
        backend: as in `maskgit.decode_step`.
        trim_head: with an LLaDA2Pipeline, the model's last linear layer is applied to the active
            block alone, of whose logits the pipeline takes no other; whatever the model does to its
            logits after that layer, it must do to each position's by themselves.  Until `undo`, that
            is so for whoever calls `pipe.model`.
        trust_version: whether a target whose code is not known is taken for a known one.

    Raises:
        AdapterError: another scheduler, or an unknown version of it; with `trim_head` also another
            pipeline, or a model without a plain linear head.
    """
    check_attributes(target, ("scheduler",), "a diffusers pipeline")
    old = target.scheduler
    name = _stock_name(old)
    if name is None:
        kind = f"{type(old).__module__}.{type(old).__name__}"
        raise AdapterError(
            f"target: expected a pipeline with diffusers' {' or '.join(_STEP)}, got {kind}"
        )
    kind = scheduler_class(name, trust_version)
    head = _trimmable(target, trust_version) if trim_head else None
    new = kind.from_config(old.config)
    vars(new).update(vars(old))
    version = f"{name} of diffusers {_version()}"
    if check_code(type(old), trust_version) == TRUSTED:
        version += f", {TRUSTED}"
    report = Report("diffusers_schedulers", _COMMIT, version)
    if head is None:
        report.note("the scheduler gets logits, so the model computes its whole head")
    else:
        report.note("the model's head sees the active block alone")
    if seeds is None:
        report.note("random numbers: seeds per sequence, drawn from the generator once per step")
    new.maskgit_options = {"seeds": seeds, "backend": backend, "report": report}
    handle = Handle(target, report)
    handle.replace("scheduler", new)
    if head is not None:
        linear = head.forward

        def block_alone(_: Any, hidden: Any) -> Any:
            return linear(hidden[:, -_block_length(new) :])

        handle.replace_method("forward", block_alone, head, count=False)
    return handle


def scheduler_class(name: str, trusted: bool = False) -> Any:
    """The class of that name: diffusers' own with our methods.

    AdapterError on unknown versions, unless trusted.
    """
    try:
        import diffusers
    except ImportError as error:
        raise AdapterError(f"{name}: needs diffusers; {pip_install('diffusers')}") from error
    base = getattr(diffusers, name, None)
    if base is None:
        raise AdapterError(f"{name}: diffusers {diffusers.__version__} has no such scheduler")
    check_signature(base.step, _STEP[name], f"{name}.step")
    check_signature(base.set_timesteps, _SET_TIMESTEPS[name], f"{name}.set_timesteps")
    check_signature(output_class(base), _OUTPUT[name], f"{name}Output")
    if name == "BlockRefinementScheduler":
        check_signature(
            base._sample_from_logits, _DRAW.removeprefix("self, "), "_sample_from_logits"
        )
        check_signature(base.check_eos_finished, _EOS, "check_eos_finished")
    check_code(base, trusted)
    return _derived(base)


@cache
def _derived(base: Any) -> Any:
    """The class of a stock one with our methods."""
    name = base.__name__
    members: dict[str, Any] = {
        "step": _ours(base.step, _STEPS[name]),
        "set_timesteps": starting_again(base.set_timesteps),
    }
    if name == "BlockRefinementScheduler":
        members["_sample_from_logits"] = _sample_from_logits
        members["check_eos_finished"] = staticmethod(_ours(base.check_eos_finished, eos_finished))
    members |= {"__module__": __name__, "maskgit_options": DEFAULTS}
    members["__new__"] = _new
    members["__doc__"] = f"diffusers' {name} with a fused step; see {__name__}."
    return type(name, (base,), members)


def _ours(theirs: Any, function: Any) -> Any:
    """Our function in the place of theirs, with their defaults."""
    return functools.wraps(function)(with_their_defaults(theirs, function))


def amused_step(
    self: Any,
    model_output: Any,
    timestep: Any,
    sample: Any,
    starting_mask_ratio: Any = 1.0,
    generator: Any = None,
    return_dict: bool = True,
    *,
    seeds: Any = None,
    noise: StepNoise | None = None,
    backend: str | None = None,
) -> Any:
    """One step: (B, V, H, W) or (B, N, V) logits and the tokens before it, as diffusers' own.

    Args beyond diffusers':
        seeds: (B,) 64-bit integers in place of the generator's.
        noise: the caller's own Gumbel noise, (B, N, V) and (B, N).
        backend: as in `maskgit.decode_step`.

    Raises:
        ValueError: `set_timesteps` was not called, or the timestep is none of its.
    """
    logits, tokens = _as_rows(model_output, sample)
    step, num_steps = _step_of(self, timestep)
    rule = _amused_rule(
        self.config.masking_schedule,
        float(self.temperatures[step]),
        model_output.element_size() < 4,
    )
    options: dict[str, Any] = {}
    if not (isinstance(starting_mask_ratio, (int, float)) and starting_mask_ratio == 1):
        rule = _given_count(rule)
        options["num_commit"] = _num_commit(self, tokens, step, num_steps, starting_mask_ratio)
    if noise is None:
        seeds = seeds_of(self, seeds, tokens.shape[0], generator, tokens.device)
    out = decode_step(
        logits, tokens, rule=rule, mask_token_id=self.config.mask_token_id, step=step,
        num_steps=num_steps, seeds=seeds, noise=noise, backend=backend_of(self, backend), **options,
    )  # fmt: skip
    after, filled = out.next_tokens.view(sample.shape), out.candidate_tokens.view(sample.shape)
    return output_class(type(self))(after, filled) if return_dict else (after, filled)


def block_refinement_step(
    self: Any,
    model_output: Any,
    timestep: Any,
    sample: Any,
    *,
    mask_token_id: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    sampling_method: str = "auto",
    threshold: float | None = None,
    editing_threshold: float | None = None,
    minimal_topk: int | None = None,
    prompt_mask: Any = None,
    generator: Any = None,
    return_dict: bool = True,
    seeds: Any = None,
    noise: StepNoise | None = None,
    backend: str | None = None,
) -> Any:
    """One refinement step of a block, as diffusers' own; no part of it waits for the device.

    `seeds`, `noise` (its token_gumbel) and `backend` are as in `amused_step`.  Without a mask token
    (uniform corruption, DiffusionGemma) the draw is ours and the selection diffusers'.
    """
    options = {"noise": noise, "backend": backend_of(self, backend), "number": next_call(self)}
    options |= {} if seeds is None else {"seeds": seeds}
    draw = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "generator": generator}
    with giving(**options):
        if mask_token_id is None:
            return stock_class(type(self)).step(
                self, model_output, timestep, sample, sampling_method=sampling_method,
                threshold=threshold, editing_threshold=editing_threshold,
                minimal_topk=minimal_topk, return_dict=return_dict, **draw,
            )  # fmt: skip
        drawn, score = self._sample_from_logits(
            model_output,
            use_multinomial=sampling_method == "multinomial"
            or (sampling_method == "auto" and temperature != 0.0),
            **draw,
        )
    threshold = float(self.config.threshold) if threshold is None else threshold
    if editing_threshold is None:
        editing_threshold = self.config.editing_threshold
    active = sample == mask_token_id
    taken = _taken(self, active, score, timestep, threshold)
    edited = _edited(~active & (drawn != sample), score, prompt_mask, editing_threshold)
    after = drawn.where(taken | edited, sample)
    values = (after, taken, edited, drawn, score, model_output)
    names = _OUTPUT["BlockRefinementScheduler"].split(", ")
    if not return_dict:
        return values
    return output_class(type(self))(**dict(zip(names, values, strict=True)))


def eos_finished(
    cur_x: Any,
    sampled_tokens: Any,
    final_transfer: Any,
    finished: Any,
    eos_token_id: int,
    mask_token_id: int,
    prompt_length: int,
) -> Any:
    """`check_eos_finished` for all sequences at once; changes and returns `finished`."""
    import torch

    committed = ((sampled_tokens == eos_token_id) & final_transfer).any(1)
    is_eos = cur_x == eos_token_id
    first = is_eos.int().argmax(1)
    place = torch.arange(cur_x.shape[1], device=cur_x.device)
    open_before = (cur_x == mask_token_id) & (place >= prompt_length) & (place < first[:, None])
    ends = is_eos.any(1) & (first >= prompt_length) & ~open_before.any(1)
    return finished.logical_or_(committed & ends)


_STEPS = {
    "AmusedScheduler": amused_step,
    "BlockRefinementScheduler": block_refinement_step,
    "EntropyBoundScheduler": entropy_bound_step,
    "DiscreteDDIMScheduler": discrete_ddim_step,
}


def _stock_name(scheduler: Any) -> str | None:
    """Which of diffusers' schedulers this is, without importing diffusers."""
    kind = type(scheduler)
    stock = kind.__module__.startswith("diffusers.") and kind.__name__ in _STEP
    return kind.__name__ if stock else None


def _version() -> str:
    import diffusers

    return str(diffusers.__version__)


def _trimmable(pipe: Any, trusted: bool) -> Any:
    """The head of an LLaDA2 pipeline's model; AdapterError where it cannot be applied to a block."""
    kind = type(pipe).__name__
    if kind != "LLaDA2Pipeline":
        raise AdapterError(f"trim_head: expected an LLaDA2Pipeline, got {kind}")
    known = {"0.39": {"__call__": "712692b01f29d239"}}
    check_version(type(pipe), (), known, relied=("__call__",), what=kind, trusted=trusted)
    head = output_layer(pipe.model)
    why = obstacle(head)
    if not why and "forward" in vars(head):
        why = "another thread is in a pass of it"
    if why:
        raise AdapterError(f"trim_head: expected a plain linear head, but {why}")
    return head


def _block_length(scheduler: Any) -> int:
    """The length that the last `set_timesteps` was called with."""
    schedule = scheduler._transfer_schedule
    return int(scheduler.config.block_length if schedule is None else schedule.sum())


def _new(kind: Any, *_: Any, **__: Any) -> Any:
    """An object that says it is diffusers' own where a saved pipeline names its parts."""
    scheduler = object.__new__(kind)
    vars(scheduler)["__module__"] = stock_class(kind).__module__
    return scheduler


def _as_rows(model_output: Any, sample: Any) -> tuple[Any, Any]:
    """Logits as (B, N, V), a view even of (B, V, H, W), and tokens as (B, N)."""
    if sample.ndim == 3 and model_output.ndim == 4:
        return model_output.flatten(2).transpose(1, 2), sample.reshape(len(sample), -1)
    return model_output, sample


def _step_of(self: Any, timestep: Any) -> tuple[int, int]:
    """(step, num_steps) of a timestep, which counts down to 0."""
    if self.timesteps is None:
        raise ValueError("timestep: call set_timesteps before step")
    step = len(self.timesteps) - 1 - int(timestep)
    if not 0 <= step < len(self.timesteps):
        raise ValueError(
            f"timestep: expected one of the {len(self.timesteps)} of set_timesteps, got {timestep}"
        )
    return step, len(self.timesteps)


@lru_cache(maxsize=1024)
def _amused_rule(schedule: str, temperature: float, is_half: bool) -> StepRule:
    """The preset with this step's temperature."""
    import dataclasses

    if schedule not in ("cosine", "linear"):
        raise ValueError(f"masking_schedule: expected cosine or linear, got {schedule!r}")
    return dataclasses.replace(
        StepRule.preset("amused"),
        schedule=schedule,
        choice_temperature=temperature,
        choice_anneal="constant",
        score_dtype="logits" if is_half else "float32",
    )


@lru_cache(maxsize=1024)
def _given_count(rule: StepRule) -> StepRule:
    import dataclasses

    return dataclasses.replace(rule, count="given")


def _num_commit(self: Any, tokens: Any, step: int, num_steps: int, start: Any) -> Any:
    """(B,) how many are committed where floor(N * start * gamma) stay masked, start not 1."""
    import math

    import torch

    ratio = torch.tensor(step + 1, device=tokens.device) / num_steps
    is_cosine = self.config.masking_schedule == "cosine"
    share = start * (torch.cos(ratio * math.pi / 2) if is_cosine else 1 - ratio)
    masked = (tokens == self.config.mask_token_id).sum(1)
    stay = torch.minimum(masked - 1, (tokens.shape[1] * share).floor().long()).clamp(min=1)
    return (masked - stay).clamp(min=0)


def _sample_from_logits(
    self: Any,
    logits: Any,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: Any,
    use_multinomial: bool,
) -> tuple[Any, Any]:
    """(token, probability) of every row, as diffusers' own method of that name.

    A row without a finite logit gives 0 and NaN, which ranks before all numbers: a block's loop ends.
    """
    temperature = as_number("temperature", temperature)
    if temperature < 0:
        raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
    options, seeds = options_of(self), None
    is_drawn = temperature > 0 and use_multinomial
    top_k = None if top_k is None else int(top_k)
    top_p = None if top_p is None else float(top_p)
    rule = _draw_rule(temperature, top_k, top_p, logits.shape[-1]) if is_drawn else _GREEDY
    noise = options.get("noise")
    if is_drawn and noise is None:
        seeds = seeds_of(self, None, logits.shape[0], generator, logits.device)
    out = sample_tokens(
        logits, rule=rule, seeds=seeds, step=options.get("number", 0), noise=noise,
        backend=options["backend"],
    )  # fmt: skip
    none = out.candidate_tokens < 0
    return out.candidate_tokens.clamp(min=0), out.confidence.masked_fill(none, float("nan"))


_GREEDY = StepRule(sample_temperature=0.0, score="prob")


@lru_cache(maxsize=64)
def _draw_rule(temperature: float, top_k: int | None, top_p: float | None, vocab: int) -> StepRule:
    """Temperature, then top-k, then top-p; the probability is that of the filtered distribution."""
    given: dict[str, Any] = {}
    if top_k is not None and 0 < top_k < vocab:
        given["top_k"] = top_k
    if top_p is not None and top_p < 1:
        given["top_p"] = top_p
    filters: Any = ("temperature", *given)
    return StepRule(
        sample_temperature=temperature, filters=filters, score="prob",
        score_temperature=None, score_filtered=True, **given,
    )  # fmt: skip


def _taken(self: Any, active: Any, score: Any, timestep: Any, threshold: float) -> Any:
    """(B, N) bool: masked positions above the threshold, or the quota's surest if those are fewer."""
    if self._transfer_schedule is None:
        return active & False
    last = len(self._transfer_schedule) - 1
    quota = self._transfer_schedule[min(int(timestep), last)].to(score.device)
    score = score.masked_fill(~active, float("-inf"))
    ranks = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    high = score > threshold
    enough = high.sum(1, keepdim=True) >= quota
    return active & high.where(enough, ranks < quota)


def _edited(changed: Any, score: Any, prompt_mask: Any, threshold: float | None) -> Any:
    """(B, N) bool: known positions outside the prompt that take a surer token."""
    if threshold is None or threshold <= 0:
        return changed & False
    return changed & (score > threshold) & (True if prompt_mask is None else ~prompt_mask)
