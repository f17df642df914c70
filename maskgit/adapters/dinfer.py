"""inclusionAI/dInfer at fce4e328: `decode` of a parallel decoder (decoding/parallel_strategy.py).

    decoder = ThresholdParallelDecoder(temperature=0, threshold=0.9, mask_id=156895)
    llm = BlockWiseDiffusionLLM(model, decoder, BlockIteratorFactory(True), ...)
    with maskgit.adapters.fast_sampler(decoder) as handle:
        out = llm.generate(prompt, gen_length=1024, block_length=32)
    print(handle.report)

Replaced: `decode`, on this instance of ThresholdParallelDecoder, CreditThresholdParallelDecoder or
HierarchyDecoder.  What stays: the loops over blocks and iterations, caches, and the model's head, so
logits are made for the whole block.  The decoder's attributes (temperature, threshold, ...) are read
in every call.  FixedParallelDecoder is not known: theirs uses names that do not exist.

What differs: random numbers come from one 64-bit seed per sequence, drawn in every call from torch's
generator: the same law, other tokens.  HierarchyDecoder takes batches; its probabilities are rounded
once to the dtype of the logits, where theirs rounds their logarithms first.  Positions without a finite
logit take id 0 before all others, as in theirs, but in the threshold decoders too, whose loops such a
position keeps from ending there.  The credits are kept as
the few (token, credit) pairs that a block has had, not as a tensor of the size of the logits, and here,
not on the decoder: each thread has its own, and they start anew with a patch and with its undo.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ..kernels.decode_step import (
    StepNoise,
    StepResult,
    StepRule,
    commit_tokens,
    decode_step,
    sample_tokens,
)
from .fingerprint import AdapterError, check_attributes, check_signature, check_version
from .patching import Handle, Report, draw_seeds, without_logits

_CODEBASE = (
    "inclusionAI/dInfer@fce4e32804103baa5d55230dff0352da0cdd6ceb "
    "python/dinfer/decoding/parallel_strategy.py"
)
_ARGUMENTS = "self, logits, block_start, block_end, x, iter_threshold"
# Per class: the methods that a decode is made of, the attributes they read.
_KINDS = {
    "CreditThresholdParallelDecoder": (
        ("decode", "_apply_credit_fusion"),
        ("use_float64", "credit_alpha", "boost_gamma", "decay_beta"),
    ),
    "ThresholdParallelDecoder": (("decode",), ("use_float64",)),
    "HierarchyDecoder": (("decode", "get_transfer_index"), ("low_threshold", "iter")),
}
_DRAW = {
    "get_transfer_index_threshold": "a671cbc3dbdc93f5",
    "add_gumbel_noise": "df02de165628429b",
}
_DECODES = {
    "CreditThresholdParallelDecoder": {
        "decode": "82e5f96e21155f68",
        "_apply_credit_fusion": "2720a808db37c9ec",
    }
    | _DRAW,
    "ThresholdParallelDecoder": {"decode": "054c50250a71d31a"} | _DRAW,
    "HierarchyDecoder": {
        "decode": "ffa0d9d084367550",
        "get_transfer_index": "96d1394c0733765d",
        "add_gumbel_noise": "df02de165628429b",
    },
}
_NEVER = 2.0  # above every probability
_SLACK = 1e-5
_TOP = StepRule(
    name="dInfer top",
    sample_temperature=0.0,
    greedy_on="probs",
    score="prob",
    score_dtype="float32",
)


def matches(target: Any) -> bool:
    """Whether the target is an instance of one of their decoders, subclasses included."""
    return _kind(target) is not None


def install(
    target: Any,
    *,
    generator: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    backend: str = "auto",
    trust_version: bool = False,
) -> Handle:
    """Replace `decode` of the decoder `target`.

    Args:
        target: the decoder.
        generator: the torch.Generator that seeds are drawn from; by default torch's own.
        noise: called with the number of the call (0, 1, ...), returns the noise to use instead.
        backend: as in `maskgit.decode_step`.
        trust_version: whether a target whose code is not known is taken for a known one.
    """
    kind = _kind(target)
    if kind is None:
        raise AdapterError(
            f"target: expected an instance of {', '.join(_KINDS)}, got {type(target).__name__}"
        )
    version = _version_of(target, kind, trust_version)
    report = Report("dinfer", _CODEBASE, f"{kind.__name__} of {version}")
    numbers, of_thread = itertools.count(), threading.local()

    def call(decoder: Any, *args: Any, **kwargs: Any) -> None:
        given = noise(next(numbers)) if noise is not None else None
        credits = vars(of_thread).setdefault("credits", {})
        options = {"generator": generator, "noise": given, "backend": backend}
        function: Callable[..., None] = decode
        function(decoder, *args, **kwargs, credits=credits, **options)

    call.__doc__ = decode.__doc__
    handle = Handle(target, report)
    handle.replace_method("decode", call)
    report.note("works on logits: the loops, and the model's head in them, are theirs")
    report.note("random numbers: one seed per sequence and call, drawn from torch's generator")
    return handle


def _kind(target: Any) -> Any:
    """The class of theirs that the target is an instance of, the nearest one, or None."""
    return next((c for c in type(target).__mro__ if c.__name__ in _KINDS), None)


def _version_of(target: Any, kind: Any, trusted: bool) -> str:
    """The version in which the target decodes as `kind` does; AdapterError for an unknown one."""
    methods, attributes = _KINDS[kind.__name__]
    known = ("temperature", "mask_id", "threshold", *attributes)
    check_attributes(target, (*known, *methods), kind.__name__)
    check_signature(kind.decode, _ARGUMENTS, f"{kind.__name__}.decode")
    for name in methods:
        if getattr(type(target), name) is not getattr(kind, name) or name in vars(target):
            raise AdapterError(
                f"target: expected {kind.__name__}'s own {name}, got one that was replaced"
            )
    versions, what = {"fce4e328": _DECODES[kind.__name__]}, kind.__name__  # since 6a3d3ca
    return check_version(
        kind, methods[:1], versions, relied=methods[1:], what=what, trusted=trusted
    )


def decode(
    decoder: Any,
    logits: Any,
    block_start: int,
    block_end: int,
    x: Any,
    iter_threshold: float | None = None,
    *,
    credits: dict[tuple[int, int], Any] | None = None,
    seeds: Any = None,
    generator: Any = None,
    noise: StepNoise | None = None,
    backend: str = "auto",
) -> None:
    """Decode what is sure enough in a block, and write it to `x`.

    Args:
        decoder: has the attributes of one of the three classes, and is one by name.
        logits: (B, L, V) of the block.
        block_start, block_end: where it lies, L positions.
        x: (B, N) tokens, or their token array around them; written to.
        iter_threshold: in place of the decoder's threshold.
        credits: what earlier calls have left, for the credit decoder; changed.
        seeds: (B,) 64-bit integers; by default drawn from `generator`, or torch's own.
        generator, noise, backend: see `install`; the noise is that of this call.

    Raises:
        AdapterError: a decoder that is not known.
        ValueError: as `decode_step`; the credit decoder without credits.
    """
    kind = _kind(decoder)
    if kind is None:
        raise AdapterError(f"decoder: expected one of {', '.join(_KINDS)}, got {decoder!r}")
    tokens, mask_id = x[:, block_start:block_end], int(decoder.mask_id)
    threshold = decoder.threshold if iter_threshold is None else iter_threshold
    rule = _rule_of(decoder, kind.__name__, threshold)
    if kind.__name__.startswith("Credit"):
        if credits is None:
            raise ValueError("credits: expected a dictionary for the credit decoder, got None")
        key = (int(block_start), int(block_end))
        logits = _credited(decoder, logits, tokens == mask_id, credits, key, backend)
    if seeds is None and rule.needs_seeds:
        seeds = draw_seeds(logits.shape[0], generator, logits.device)
    result = decode_step(
        logits,
        tokens,
        rule=rule,
        mask_token_id=mask_id,
        step=0,
        num_steps=1,
        seeds=seeds,
        noise=noise,
        backend=backend,
    )
    is_masked = tokens == mask_id
    dead = without_logits(logits, is_masked & (result.confidence == -float("inf")))
    after = result.next_tokens
    if dead is not None:
        after = _after_dead(rule, result, tokens, dead, mask_id, backend)
        if rule.count == "runs":
            sure = result.confidence.to(logits.dtype) > rule.threshold
            after = after.masked_fill(is_masked & _beside(dead, is_masked) & ~sure, mask_id)
    x[:, block_start:block_end] = after
    if kind.__name__ == "HierarchyDecoder":
        decoder.iter += 1
    if credits and not bool((getattr(x, "data", x) == mask_id).any()):
        credits.clear()


def _after_dead(
    rule: StepRule, result: StepResult, tokens: Any, dead: Any, mask_id: int, backend: str
) -> Any:
    """The tokens after a step in which positions without a finite logit take id 0 before all others."""
    return commit_tokens(
        result.candidate_tokens.masked_fill(dead, 0),
        result.confidence.masked_fill(dead, float("inf")),
        tokens,
        rule=replace(rule, score="given"),
        mask_token_id=mask_id,
        step=0,
        num_steps=1,
        backend=backend,
    ).next_tokens


def _beside(dead: Any, is_masked: Any) -> Any:
    """(B, L) bool: the runs of masked positions that hold a dead one, but for each row's first of these.

    A dead position's NaN is its run's highest score, which equals none; the first one is the row's best.
    """
    import torch

    starts = is_masked & ~torch.nn.functional.pad(is_masked, (1, -1))
    runs = starts.long().cumsum(1)
    has = runs.new_zeros(len(runs), runs.shape[1] + 1).scatter_reduce(1, runs, dead.long(), "amax")
    return has.gather(1, runs).bool() & ~(dead & (dead.cumsum(1) == 1))


def _rule_of(decoder: Any, kind: str, threshold: float | None) -> StepRule:
    """The rule that a decoder's attributes ask for."""
    bound = _NEVER if threshold is None else float(threshold)
    temperature = float(decoder.temperature)
    if kind == "HierarchyDecoder":
        low = decoder.low_threshold
        return _runs(temperature, bound, -1.0 if low is None else float(low))
    return _threshold(temperature, bound, bool(decoder.use_float64))


@lru_cache(maxsize=256)
def _threshold(temperature: float, threshold: float, use_float64: bool) -> StepRule:
    return StepRule(
        name="dInfer threshold",
        source=_CODEBASE,
        count="threshold",
        threshold=threshold,
        threshold_slack=_SLACK,
        skip_mask_token=True,
        sample_temperature=temperature,
        score="prob",
        score_dtype="float64" if use_float64 else "float32",
    )


@lru_cache(maxsize=256)
def _runs(temperature: float, threshold: float, low_threshold: float) -> StepRule:
    return StepRule(
        name="dInfer hierarchy",
        source=_CODEBASE,
        count="runs",
        threshold=threshold,
        low_threshold=low_threshold,
        sample_temperature=temperature,
        score="prob",
        score_dtype="logits",
    )


def _credited(
    decoder: Any, logits: Any, is_masked: Any, credits: dict[Any, Any], key: Any, backend: str
) -> Any:
    """Float32 logits plus alpha log(1 + credit), after the credits' update.

    A block's credits are (ids, values), both (B, L, K): the tokens that were ever a position's most
    probable one, each once; unused places hold id 0 and value 0.
    """
    import torch

    top, probability, _ = sample_tokens(logits, rule=_TOP, backend=backend)
    top = top.clamp(min=0)[..., None]  # a row without a finite logit has no credit
    gained = probability.clamp(min=0) ** decoder.boost_gamma * is_masked
    ids, values = credits.get(key, (None, None))
    if ids is None or ids.shape[:2] != logits.shape[:2] or ids.device != logits.device:
        ids, values = top[..., :0], gained[..., None][..., :0]
    values = values * decoder.decay_beta
    same = (ids == top) & (values > 0)
    is_new = ~same.any(-1, keepdim=True)
    values = values + same * gained[..., None]
    ids = torch.cat([ids, top * is_new], -1)
    values = torch.cat([values, gained[..., None] * is_new], -1)
    credits[key] = ids, values
    return logits.float().scatter_add(-1, ids, decoder.credit_alpha * torch.log(values + 1))
