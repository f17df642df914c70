"""The public functions of the decode step: signatures, documentation, and the way into the op.

torch tensors go through one `torch.library` op (ops.py), so that `torch.compile` sees one node;
NumPy and jax arrays go to dispatch.py directly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import as_scalar, check_same_kind, kind_of, to_kind
from ..common.backends import check_name
from . import dispatch
from .inputs import StepNoise, StepResult, TokenStats
from .rule.rule import StepRule, as_rule
from .traced import at_step


def decode_step(
    logits: Any,
    tokens: Any,
    *,
    rule: StepRule | str,
    mask_token_id: int,
    step: int,
    num_steps: int,
    num_masked_at_start: Any = None,
    seeds: Any = None,
    noise: StepNoise | None = None,
    uncond_logits: Any = None,
    guidance_scale: Any = None,
    eligible: Any = None,
    scores: Any = None,
    num_commit: Any = None,
    positions: Any = None,
    temperature: Any = None,
    threshold: Any = None,
    backend: str = "auto",
    check: bool = False,
) -> StepResult:
    """One step of masked-token decoding: guide, filter, draw, score, count, select, re-mask.

    Args:
        logits: (B, N, V) float16, bfloat16 or float32, any strides, never copied to be contiguous;
            float64 is rounded to float32 first.
        tokens: (B, N) integers on the same device; `mask_token_id` marks what is still masked.
        rule: a `StepRule` or the name of a preset.
        mask_token_id: the id of the mask token; it may lie outside the V columns, or be -1.
        step, num_steps: this step, from 0, and how many there are.  In jax `step` may be traced: the
            program then holds the numbers of all steps, and one beyond them is the last.
        num_masked_at_start: (B,) masked positions before step 0 (or one number for all); by
            default those of `tokens`, which is right at step 0 only and refused later.  Of rules that
            revise the default is all positions that take part; of a block's rules, N.
        seeds: (B,) 64-bit integers, one per sequence (or (B, 2) uint32 words; in jax also keys).
            Needed where the rule draws at this step and `noise` does not replace it.
        noise: the caller's own Gumbel noise.
        uncond_logits, guidance_scale: given together: logits become u + scale * (c - u), rounded as the
            rule's `guidance_dtype` and `guidance_form` say.  The scale is a number or an array () of
            one, in jax also a traced one; one on a GPU is waited for.
        eligible: (B, N) bool, which masked positions take part (a block, real tokens of a padded
            batch); all by default.  With a rule that revises, which positions take part at all.
        scores: (B, N), exactly with rules whose score is "given": a critic's, or a fixed order.
        num_commit: (B,), or one number for all, exactly with rules whose count is "given".
        positions: (B, N) integers, where in its sequence each token stands, for the random numbers
            alone; by default 0..N-1.  Left-padded rows draw as unpadded ones do when the padding
            does not count.
        temperature, threshold: in place of the rule's `sample_temperature` and `threshold`: numbers or
            arrays () as `guidance_scale`, not traced.  Under `torch.compile` one program serves all.
        backend: "auto", or by name: cpp, triton, pallas, torch, jax, reference.
        check: raise on a row without a finite logit (also with MASKGIT_CHECK=1); reads the result
            on the host.

    Returns:
        `StepResult(next_tokens, candidate_tokens, confidence)`, each (B, N), of the library and
        on the device of `logits`; tokens in the dtype of `tokens`.

    Raises:
        TypeError, ValueError: a wrong kind, shape, dtype, device, count or name; the message
            names the argument, what was expected and what was got.

    Semantics: known tokens never change, save under rules that revise, edit or re-mask them
    (`rule.touches_known`), and then only where `eligible`.  Equal logits draw the lowest id.  NaN
    counts as -inf, +inf as the largest float32.  A row without a finite logit stays masked with
    confidence -inf.  A candidate depends on its own sequence's seed, position, step and logits only;
    what is committed too, except under rules whose count is taken over the batch (titok, maskbit,
    dream-*, vampnet).  See
    docs/semantics.md; the loop is that of MaskGIT (arXiv 2202.04200, section 3.2).
    """
    step_rule, token_gumbel, choice_gumbel = rule_and_noise(rule, noise, backend)
    seeds = seeds_like(seeds, logits)
    if kind_of(logits) == "torch":
        import maskgit.kernels.decode_step.ops as ops  # cheaper than a relative import

        num_masked_at_start = counts_tensor("num_masked_at_start", num_masked_at_start, logits)
        num_commit = counts_tensor("num_commit", num_commit, logits)
        out = ops.decode_step_op(
            logits, tokens, step_rule.encoded, mask_token_id, step, num_steps,
            num_masked_at_start, seeds, token_gumbel, choice_gumbel, uncond_logits,
            scale_tensor(guidance_scale), eligible, scores, num_commit, positions,
            scale_tensor(temperature, "temperature"), scale_tensor(threshold, "threshold"), backend, check,
        )  # fmt: skip
        return StepResult(*out)

    def at(step: int) -> Any:
        return dispatch.decode_step(
            logits, tokens, step_rule, mask_token_id, step, num_steps, num_masked_at_start, seeds,
            token_gumbel, choice_gumbel, uncond_logits, guidance_scale, eligible, scores, num_commit,
            positions, temperature, threshold, backend, check,
        )  # fmt: skip

    step_rule = dispatch.with_scalars(step_rule, temperature, threshold)
    return StepResult(*at_step(at, step_rule, step, num_steps, logits))


def commit_tokens(
    candidate_tokens: Any,
    scores: Any,
    tokens: Any,
    *,
    rule: StepRule | str,
    mask_token_id: int,
    step: int,
    num_steps: int,
    num_masked_at_start: Any = None,
    seeds: Any = None,
    choice_gumbel: Any = None,
    eligible: Any = None,
    num_commit: Any = None,
    positions: Any = None,
    threshold: Any = None,
    backend: str = "auto",
) -> StepResult:
    """Count, select and re-mask given candidates: the second half of `decode_step`.

    For candidates that come from elsewhere: drawn by `sample_tokens` and scored by a critic, one of
    several factors or levels, spans.

    Args:
        candidate_tokens: (B, N) integers; -1 where there is none, and the mask token stays.
        scores: (B, N) floating, what ranks them, without the annealed noise.
        tokens: (B, N), the sequence before the step.
        choice_gumbel: (B, N) standard Gumbel noise in place of the seeds'.
        rule, mask_token_id, step, num_steps, num_masked_at_start, seeds, eligible, num_commit,
            positions, threshold, backend: as in `decode_step`.  Of the rule only the choice noise, the count
            and the cut matter.

    Returns, raises and semantics: as `decode_step`; a NaN score is -inf.
    """
    step_rule, _, _ = rule_and_noise(rule, None, backend)
    seeds = seeds_like(seeds, scores)
    if kind_of(scores) != "torch":

        def at(step: int) -> Any:
            return dispatch.commit_tokens(
                candidate_tokens, scores, tokens, step_rule, mask_token_id, step, num_steps,
                num_masked_at_start, seeds, choice_gumbel, eligible, num_commit, positions, threshold,
                backend,
            )  # fmt: skip

        step_rule = dispatch.with_scalars(step_rule, None, threshold)
        return StepResult(*at_step(at, step_rule, step, num_steps, scores))
    import maskgit.kernels.decode_step.ops as ops

    num_masked_at_start = counts_tensor("num_masked_at_start", num_masked_at_start, scores)
    num_commit = counts_tensor("num_commit", num_commit, scores)
    out = ops.commit_tokens_op(
        candidate_tokens, scores, tokens, step_rule.encoded, mask_token_id, step, num_steps,
        num_masked_at_start, seeds, choice_gumbel, eligible, num_commit, positions,
        scale_tensor(threshold, "threshold"), backend,
    )  # fmt: skip
    return StepResult(*out)


def sample_tokens(
    logits: Any,
    *,
    rule: StepRule | str,
    seeds: Any = None,
    positions: Any = None,
    step: int = 0,
    noise: StepNoise | None = None,
    temperature: Any = None,
    backend: str = "auto",
    check: bool = False,
) -> TokenStats:
    """Draw a candidate for every row and score it: the first half of `decode_step`.

    Args:
        logits: (B, N, V), or (R, V) rows that were gathered from anywhere.
        rule: a `StepRule` or preset name; its temperatures are used without annealing.
        seeds: (B,) 64-bit integers for (B, N, V); (R,) for (R, V), the seed of each row's sequence.
        positions: (B, N) or (R,) integers, each row's position in its sequence; by default
            0..N-1, and 0 for gathered rows.
        step: the step whose random numbers are used.
        noise: `StepNoise(token_gumbel)` of the shape of `logits`.
        temperature, backend, check: as in `decode_step`.

    Returns:
        `TokenStats(candidate_tokens, confidence, log_z)` of the shape of `logits` without V.

    Raises and semantics: as `decode_step`.  With the same seed, position and step the candidates
    are those of `decode_step` wherever its temperature is the unannealed one.
    """
    step_rule, token_gumbel, choice_gumbel = rule_and_noise(rule, noise, backend)
    if choice_gumbel is not None:
        raise ValueError(
            "noise.choice_gumbel: expected None in sample_tokens, which adds no noise to scores"
        )
    seeds = seeds_like(seeds, logits)
    rows_only = kind_of(logits) is not None and len(logits.shape) == 2
    if rows_only:
        for name, array in (("positions", positions), ("noise.token_gumbel", token_gumbel)):
            if array is not None:
                check_same_kind(name, array, logits)
        logits = logits[:, None]
        token_gumbel = None if token_gumbel is None else token_gumbel[:, None]
        positions = None if positions is None else positions[:, None]
    if kind_of(logits) == "torch":
        import maskgit.kernels.decode_step.ops as ops

        out = ops.sample_tokens_op(
            logits, step_rule.encoded, seeds, positions, step, token_gumbel,
            scale_tensor(temperature, "temperature"), backend, check,
        )  # fmt: skip
    else:
        out = dispatch.sample_tokens(
            logits, step_rule, seeds, positions, step, token_gumbel, temperature, backend, check
        )
    return TokenStats(*(array[:, 0] for array in out)) if rows_only else TokenStats(*out)


def rule_and_noise(
    rule: StepRule | str, noise: StepNoise | None, backend: str
) -> tuple[StepRule, Any, Any]:
    """The rule, and the two parts of the caller's noise, once the backend's name is legal."""
    check_name(backend)
    step_rule = as_rule(rule)
    if noise is None:
        return step_rule, None, None
    if not isinstance(noise, StepNoise):
        raise TypeError(
            f"noise: expected a StepNoise(token_gumbel, choice_gumbel), got {type(noise).__name__}"
        )
    return step_rule, noise.token_gumbel, noise.choice_gumbel


def seeds_like(seeds: Any, logits: Any) -> Any:
    """Seeds given as a sequence, or as a NumPy array beside another library's logits, converted."""
    kind = kind_of(logits)
    if seeds is None or kind is None or kind_of(seeds) == kind:
        return seeds
    if kind == "torch" and isinstance(seeds, np.ndarray):
        return _as_tensor("seeds", seeds, logits)
    if kind_of(seeds) is None:
        values = _seed_values(seeds)
        if kind == "torch":
            import torch

            words = [value - 2**64 if value >= 2**63 else value for value in values]
            return torch.tensor(words, dtype=torch.int64, device=logits.device)
        seeds = np.array(values, np.uint64)
    if kind_of(seeds) != "numpy":
        return seeds  # another framework's array: dispatch.py names it in its error
    if kind == "jax" and seeds.ndim == 1:  # 64-bit seeds as words, since jax may have no int64
        from ..common.philox import seed_words

        seeds = np.stack(seed_words(seeds), axis=1).astype(np.uint32)
    return to_kind(seeds, kind)


def _seed_values(seeds: Any) -> list[int]:
    """A sequence of 64-bit integers, signed or not, as numbers without a sign."""
    try:
        values = [int(seed) for seed in seeds if not isinstance(seed, (float, str, bool))]
        is_whole = len(values) == len(seeds)
    except (TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise TypeError(f"seeds: expected (B,) integers, got {seeds!r}")
    for value in values:
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"seeds: expected 64-bit integers, got {value}")
    return [value % 2**64 for value in values]


def _as_tensor(name: str, array: Any, model: Any) -> Any:
    """A NumPy array of integers as a tensor beside `model`, in compiled code too."""
    import torch

    if torch.compiler.is_compiling():
        return torch.as_tensor(array, device=model.device)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    return to_kind(array, "torch", model.device)


def counts_tensor(name: str, counts: Any, logits: Any) -> Any:
    """Numbers of masked positions, or one for all sequences, as the tensor that the op takes."""
    if not isinstance(counts, (int, np.integer, np.ndarray, list, tuple)):
        return counts
    import torch

    if isinstance(counts, np.ndarray):  # in compiled code NumPy's scalars too
        counts = _as_tensor(name, counts, logits)
        return counts.expand(logits.shape[0]) if counts.ndim == 0 else counts
    if not isinstance(counts, (bool, list, tuple)):  # no copy from the host, which breaks a capture
        return torch.full((logits.shape[0],), int(counts), device=logits.device)
    if isinstance(counts, (list, tuple)) and all(type(count) is int for count in counts):
        return torch.tensor(counts, dtype=torch.int64, device=logits.device)
    if torch.compiler.is_compiling() and isinstance(counts, (list, tuple)):
        return torch.stack([torch.as_tensor(count) for count in counts]).to(logits.device)
    values = torch.as_tensor(counts, device=logits.device)
    return values.expand(logits.shape[0]) if values.ndim == 0 else values


def scale_tensor(number: Any, name: str = "guidance_scale") -> Any:
    """A number as the tensor () that the op takes: one that changes does not compile it anew."""
    import torch

    if number is None or isinstance(number, torch.Tensor):
        return number
    is_plain = isinstance(number, (float, int)) and not isinstance(number, bool)
    if is_plain and (torch.compiler.is_compiling() or abs(number) < 2**63):
        return torch.full((), number, dtype=torch.float64)
    if torch.compiler.is_compiling() and isinstance(number, np.ndarray):  # or a scalar of NumPy's
        return torch.as_tensor(number)
    return torch.full((), as_scalar(name, number), dtype=torch.float64)
