"""NVlabs/Fast-dLLM at 5332e2fc: `get_transfer_index` and `get_transfer_index_dynamic` of llada/generate.py.

    import generate                                   # their llada/generate.py
    from maskgit.adapters import fast_sampler

    with fast_sampler(generate) as handle:
        out, forwards = generate.generate_with_dual_cache(model, prompt, threshold=0.9)
    print(handle.report)

Replaced: the two functions, which draw the candidates and say which of them are kept, in the module
that is given.  What stays: all loops, caches and the model's head, so logits are still made for
every row that the loop asks for.  The functions here have their signatures and can be called without
patching.  Commits 24cc59e7 (no dynamic count), f6b35ec3 and the copy in MMaDA's
evaluation/lm/generate.py are known by their code too; what a caller leaves out has their defaults.

What differs: random numbers come from one 64-bit seed per sequence, drawn in every call from torch's
generator: the same law, other tokens.  Equal confidences keep the lower position, where torch.sort
and torch.topk promise no order.  A row of logits without a finite value keeps id 0 before all others, as
theirs does, whose loops end when nothing is masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

from ..kernels.decode_step import StepNoise, StepRule, commit_tokens, decode_step
from .fingerprint import check_signature, check_version
from .patching import Handle, Report, draw_seeds, without_logits

_CODEBASE = "NVlabs/Fast-dLLM@5332e2fc0edad553a5ac4fae6d6ec7b8cefc410a llada/generate.py"
_ARGUMENTS = "logits, temperature, remasking, mask_index, x, num_transfer_tokens"
_FIXED, _DYNAMIC = "get_transfer_index", "get_transfer_index_dynamic"
_ONE = {"get_transfer_index": "07cc70d1cf5d4425", "add_gumbel_noise": "16b0ccd4bf8ab75d"}
VERSIONS = {  # 5332e2fc as it stands in MMaDA at ce06b2a
    "5332e2fc": _ONE | {"get_transfer_index_dynamic": "7f3d1a473b1a84b7"},
    "24cc59e7 (without the dynamic count)": _ONE,
    "f6b35ec3": _ONE
    | {"get_transfer_index_dynamic": "4b1a0747f3525138", "add_gumbel_noise": "31c401d75c2107f1"},
}
_MASKED = -1  # stands for the mask token, whose id the functions are not told


def matches(target: Any) -> bool:
    """Whether the target is a module with their functions."""
    names = (_FIXED, "get_num_transfer_tokens", "generate_with_dual_cache")
    return isinstance(target, ModuleType) and all(hasattr(target, name) for name in names)


def install(
    target: Any,
    *,
    generator: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    backend: str = "auto",
    trust_version: bool = False,
) -> Handle:
    """Replace the functions of the module `target`.

    Args:
        target: the module.
        generator: the torch.Generator that seeds are drawn from; by default torch's own.
        noise: called with the number of the call (0, 1, ...), returns the noise to use instead.
        backend: as in `maskgit.decode_step`.
        trust_version: whether a target whose code is not known is taken for a known one.
    """
    check_signature(getattr(target, _FIXED, None), f"{_ARGUMENTS}, threshold", _FIXED)
    has_dynamic = hasattr(target, _DYNAMIC)
    if has_dynamic:
        check_signature(getattr(target, _DYNAMIC), f"{_ARGUMENTS}, factor", _DYNAMIC)
    replaced = (_FIXED, _DYNAMIC) if has_dynamic else (_FIXED,)
    version = check_version(
        target, replaced, VERSIONS, what="Fast-dLLM's generate.py", trusted=trust_version
    )
    report = Report("fast_dllm", _CODEBASE, version)
    report.note("works on logits: the loops, and the model's head in them, are theirs")
    report.note("random numbers: one seed per sequence and call, drawn from torch's generator")
    handle, numbers = Handle(target, report), itertools.count()

    def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(_: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            given = noise(next(numbers)) if noise is not None else None
            options = {"generator": generator, "noise": given, "backend": backend}
            result: tuple[Any, Any] = function(*args, **kwargs, **options)
            return result

        call.__doc__ = function.__doc__
        return call

    handle.replace_method(_FIXED, with_options(get_transfer_index))
    if has_dynamic:
        handle.replace_method(_DYNAMIC, with_options(get_transfer_index_dynamic))
    return handle


def get_transfer_index(
    logits: Any,
    temperature: float,
    remasking: str,
    mask_index: Any,
    x: Any,
    num_transfer_tokens: Any,
    threshold: float | None = None,
    *,
    seeds: Any = None,
    generator: Any = None,
    noise: StepNoise | None = None,
    backend: str = "auto",
) -> tuple[Any, Any]:
    """Candidates (B, L) and which of them to keep (B, L), by a threshold or by given numbers.

    Args:
        logits: (B, L, V).
        temperature: of the draw; 0 is argmax.
        remasking: "low_confidence" or "random".
        mask_index: (B, L) bool, the positions that are masked and may be filled in.
        x: (B, L) integers.
        num_transfer_tokens: (B,) or (B, 1), how many of each row to keep; unused with a threshold.
        threshold: keep all at or above it, and the surest one.
        seeds: (B,) 64-bit integers; by default drawn from `generator`, or torch's own.
        generator, noise, backend: see `install`; the noise is that of this call.

    Raises:
        ValueError: neither numbers nor a threshold, an unknown `remasking`; and as `decode_step`.
    """
    if threshold is not None:
        rule = _rule("threshold", float(temperature), threshold=float(threshold))
        return _step(rule, logits, remasking, mask_index, x, None, seeds, generator, noise, backend)
    if num_transfer_tokens is None:
        raise ValueError(
            "num_transfer_tokens: expected (B,) integers without a threshold, got None"
        )
    counts = num_transfer_tokens.reshape(-1).clamp(0, int(x.shape[1])).to(x.device)
    rule = _rule("given", float(temperature))
    return _step(rule, logits, remasking, mask_index, x, counts, seeds, generator, noise, backend)


def get_transfer_index_dynamic(
    logits: Any,
    temperature: float,
    remasking: str,
    mask_index: Any,
    x: Any,
    num_transfer_tokens: Any,
    factor: float = 1,
    *,
    seeds: Any = None,
    generator: Any = None,
    noise: StepNoise | None = None,
    backend: str = "auto",
) -> tuple[Any, Any]:
    """The same with a count that follows from the confidences and `factor`.

    `num_transfer_tokens` is not used, as theirs does not use it.
    """
    rule = _rule("factor", float(temperature), factor=float(factor))
    return _step(rule, logits, remasking, mask_index, x, None, seeds, generator, noise, backend)


@lru_cache(maxsize=256)
def _rule(count: Any, temperature: float, threshold: float = 0.9, factor: float = 1.0) -> StepRule:
    """Their step."""
    return StepRule(
        name=f"fast-dllm-{count}",
        source=_CODEBASE,
        count=count,
        threshold=threshold,
        factor=factor,
        sample_temperature=temperature,
        score="prob",
        score_dtype="float64",
    )


@lru_cache(maxsize=256)
def _with_score(rule: StepRule, score: Any, count: Any) -> StepRule:
    return replace(rule, score=score, count=count)


def _step(
    rule: StepRule, logits: Any, remasking: str, mask_index: Any, x: Any, counts: Any, seeds: Any,
    generator: Any, noise: StepNoise | None, backend: str,
) -> tuple[Any, Any]:  # fmt: skip
    """One step on tokens in which exactly the positions of `mask_index` are masked."""
    if remasking not in ("low_confidence", "random"):
        raise ValueError(f"remasking: expected low_confidence or random, got {remasking!r}")
    is_random = remasking == "random"
    if seeds is None and (rule.draws_tokens or is_random):
        seeds = draw_seeds(logits.shape[0], generator, logits.device)
    tokens = x.masked_fill(mask_index, _MASKED)
    common: dict[str, Any] = {"mask_token_id": _MASKED, "step": 0, "num_steps": 1}
    common["backend"] = backend
    if is_random and counts is None:
        drawn, scores = _at_random(rule, logits, tokens, seeds, noise, common)
        given = _with_score(rule, "given", rule.count)
        result = commit_tokens(drawn, scores, tokens, rule=given, **common)
    else:
        result = decode_step(
            logits,
            tokens,
            rule=_with_score(rule, "random", rule.count) if is_random else rule,
            num_commit=counts,
            seeds=seeds,
            noise=noise,
            **common,
        )
    dead = without_logits(logits, mask_index & (result.confidence == -float("inf")))
    if dead is not None:
        result = commit_tokens(
            result.candidate_tokens.masked_fill(dead, 0),
            result.confidence.masked_fill(dead, float("inf")),
            tokens,
            rule=_with_score(rule, "given", rule.count),
            num_commit=counts,
            **common,
        )
    kept = mask_index & (result.next_tokens != _MASKED)
    candidates = result.candidate_tokens
    return candidates.where(candidates != _MASKED, x), kept


def _at_random(
    rule: StepRule, logits: Any, tokens: Any, seeds: Any, noise: StepNoise | None, common: Any
) -> tuple[Any, Any]:
    """Candidates, and for each a uniform number: that of its Gumbel variate."""
    result = decode_step(
        logits,
        tokens,
        rule=_with_score(rule, "random", "given"),
        num_commit=0,
        seeds=seeds,
        noise=noise,
        **common,
    )
    return result.candidate_tokens, (-(-result.confidence.double()).exp()).exp()
