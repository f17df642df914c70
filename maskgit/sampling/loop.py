"""The loop: predict, decode a step, repeat.  It knows no kernel and no model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ..kernels.common.arrays import (
    as_index,
    as_scalar,
    check_integers,
    is_on_host,
    is_traced,
    kind_of,
    library_of,
    to_numpy,
)
from ..kernels.common.backends import check_name
from ..kernels.decode_step import StepNoise, StepRule, as_rule
from ..kernels.decode_step.door import check_beside
from ..report.progress import Progress
from .blocks import plan_blocks
from .result import GenerateResult
from .steps import Stepper
from .trajectory import Recorder


def generate(
    forward: Callable[[Any], Any],
    tokens: Any,
    *,
    rule: StepRule | str,
    mask_token_id: int,
    num_steps: int,
    seeds: Any = None,
    guidance_scale: float | None = None,
    progress: bool = False,
    backend: str = "auto",
    block_length: int | None = None,
    prompt_length: Any = 0,
    eligible: Any = None,
    positions: Any = None,
    scores: Any | Callable[[int, Any, Callable[[], Any]], Any] = None,
    num_commit: Sequence[Any] | None = None,
    head_weight: Any = None,
    head_bias: Any = None,
    record: bool = False,
    noise: Callable[[int], StepNoise] | None = None,
    cuda_graph: bool = False,
    finish: bool = False,
    temperature: Any = None,
) -> GenerateResult:
    """Fill in the masked positions of `tokens` in `num_steps` steps of parallel decoding.

    Args:
        forward: maps tokens (B, N) to logits (B, N, V); with `guidance_scale`, to the pair
            (conditional logits, unconditional logits).  A torch model is called without gradients; set
            eval() yourself.
        tokens: (B, N) integers, a torch, jax or NumPy array.  Positions that hold
            `mask_token_id` are generated; all others are known and stay (inpainting, prompts).
        rule: a `StepRule` or preset name.
        mask_token_id: id of the mask token.
        num_steps: T, in all; with blocks, a multiple of their number.
        seeds: (B,) 64-bit integers, one per sequence; may be None for rules that draw nothing.
        guidance_scale: scale s of u + s (c - u).
        progress: say on stderr how far it is: a bar on a terminal, else a line a minute.
        backend: as in `decode_step`.
        block_length: semi-autoregressive decoding: the positions from `prompt_length` on are
            decoded in blocks of this length, left to right, each in num_steps / blocks steps.
        prompt_length: where the first block begins, padding included: one number, or (B,) integers.
            With one for each row the rows' k-th blocks are decoded together, each row's up to its last
            eligible position; there are as many as the longest row has, and rows that have none left
            wait.
        eligible: (B, N) bool, which masked positions are generated at all (of a padded batch, those
            that are not padding); others stay masked.
        positions: (B, N) integers, where each token stands in its sequence, for the random numbers:
            left-padded rows then draw what they draw alone.
        scores: exactly for rules whose score is given.  (B, N) floating, the same at every step: a
            fixed order.  Or a callable that returns them, called once a step with the number of the
            step (0, 1, ... over all blocks), the tokens (B, N), and a function without arguments that
            draws and returns the candidates (B, N), known tokens in place: a critic.  Where that
            function is not called, positions may be chosen before anything is drawn.
        num_commit: for rules whose count is given: num_commit[step] is (B,) or one number.
        head_weight, head_bias: (V, D) and (V,): `forward` then returns hidden states (B, N, D), and
            the head's product is formed for the rows that take part alone, where
            `decode_step_from_hidden` says so.
        record: keep every step's tokens, confidences, log-probabilities and entropies; two more
            readings of the logits of the rows that were drawn, a step.
        noise: called with the number of the step (0, 1, ... over all blocks), returns the
            `StepNoise` to use instead of the seeds.
        cuda_graph: capture the whole loop, `forward` included, as one CUDA graph at the first call,
            and replay it with new tokens and seeds at every further call with the same `forward`,
            shapes and options.  `forward` must be capturable, and reads what else it needs (classes,
            conditions) from tensors that stay where they are: change them in place.
        finish: commit at the last step (of each block) what the rule would leave masked then, with that
            step's candidates.  Masks are left only where the candidate is none.
        temperature: at which tokens are drawn, instead of the rule's `sample_temperature`; 0 is argmax.
            All else is as the rule says, its own end or floor of the temperature too.

    Returns:
        `GenerateResult`.

    Raises:
        TypeError, ValueError: as `decode_step`; also for lengths and steps that do not divide.

    Semantics: a sequence's tokens depend on its own seed and logits only, not on the batch or its
    padding, except under rules whose counts are taken over the batch (titok, maskbit, dream-*,
    vampnet) or from N (count_base="positions").  On the host, steps are skipped once nothing of a
    block is masked, which changes no token; on an accelerator every step runs, so that the loop does
    not wait for the device (but once at its start where `eligible` meets several prompt lengths).
    """
    step_rule = _at_temperature(as_rule(rule), temperature)
    check_name(backend)
    mask_token_id = as_index("mask_token_id", mask_token_id)
    for name, flag in (
        ("record", record),
        ("progress", progress),
        ("cuda_graph", cuda_graph),
        ("finish", finish),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")
    _check_functions(forward, noise)
    _check_arrays(step_rule, tokens, eligible, scores)
    blocks = plan_blocks(tokens, block_length, prompt_length, eligible)
    steps = _steps_per_block(as_index("num_steps", num_steps, 1), len(blocks))
    _check_num_commit(step_rule, num_commit, steps)
    if cuda_graph:
        from .graphs import replayed

        return replayed(
            generate, forward, tokens, seeds, rule=step_rule, mask_token_id=mask_token_id,
            num_steps=num_steps, guidance_scale=guidance_scale, progress=progress, backend=backend,
            block_length=block_length, prompt_length=prompt_length, eligible=eligible,
            positions=positions, scores=scores, num_commit=num_commit, head_weight=head_weight,
            head_bias=head_bias, record=record, noise=noise, finish=finish,
        )  # fmt: skip
    head = Stepper(head_weight, head_bias, guidance_scale, backend)
    log = Recorder(tokens, step_rule, mask_token_id, head.decode) if record else None
    allowed = _both(tokens == mask_token_id if step_rule.touches_known else None, eligible)
    num_forwards = 0
    with (
        _without_gradients(tokens),
        Progress("decoding", steps * len(blocks), show=progress) as bar,
    ):
        for index, block in enumerate(blocks):
            own = reach = None  # (B, N): the block, and what competes for its quota
            if block is not None:
                own = block.window(tokens, prefix=False)
                reach = block.window(tokens, prefix=step_rule.block_scope == "prefix")
            at_start = _both(tokens == mask_token_id, _both(eligible, own)).sum(1)
            if step_rule.count_base == "block":  # what stands in the block already counts too
                at_start = at_start * 0 + (tokens.shape[1] if block is None else block_length)
            takes_part = _both(allowed, reach)
            for step in range(steps):
                if not step_rule.touches_known and _is_done(tokens == mask_token_id, takes_part):
                    bar.update(steps - step)
                    break
                number = index * steps + step
                bar.update()
                output = _predict(forward, tokens, guidance_scale)
                num_forwards += 1
                options = {
                    "mask_token_id": mask_token_id,
                    "step": step,
                    "num_steps": steps,
                    "num_masked_at_start": at_start,
                    "seeds": seeds,
                    "noise": noise(number) if noise is not None else None,
                    "eligible": takes_part,
                    "positions": positions,
                    "num_commit": None if num_commit is None else num_commit[step],
                }
                result = head.step(output, tokens, step_rule, scores, number, options)
                after = result.next_tokens
                if step == steps - 1 and step_rule.count == "masked":
                    after = result.candidate_tokens
                elif step == steps - 1 and finish:
                    drawn = head.candidates(output, tokens, step_rule, options, result)
                    left = _both(after == mask_token_id, takes_part)
                    after = library_of(after).where(left, drawn, after)
                if log is not None:
                    log.add(number, output, tokens, result, after)
                tokens = after
    return GenerateResult(tokens, num_forwards, log.trajectory if log is not None else None)


def _at_temperature(rule: StepRule, temperature: Any) -> StepRule:
    if temperature is None:
        return rule
    number = as_scalar("temperature", temperature)
    if is_traced(number):
        raise TypeError("temperature: expected a number, got one that the program computes")
    if number < 0:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature!r}")
    return dataclasses.replace(rule, sample_temperature=number)


def _check_functions(forward: Any, noise: Any) -> None:
    if not callable(forward):
        raise TypeError(f"forward: expected a callable, got {type(forward).__name__}")
    if noise is not None and not callable(noise):
        raise TypeError(f"noise: expected a callable or None, got {type(noise).__name__}")


def _check_arrays(rule: StepRule, tokens: Any, eligible: Any, scores: Any) -> None:
    if kind_of(tokens) is None:
        raise TypeError(
            f"tokens: expected a torch, jax or NumPy array, got {type(tokens).__name__}"
        )
    if len(tokens.shape) != 2:
        raise ValueError(f"tokens: expected shape (B, N), got {tuple(tokens.shape)}")
    check_integers("tokens", tokens)
    given = {} if rule.score == "given" and callable(scores) else {"scores": scores}
    check_beside(tokens, rule, eligible, **given)


def _steps_per_block(num_steps: int, blocks: int) -> int:
    if num_steps % blocks:
        raise ValueError(f"num_steps: expected a multiple of the {blocks} blocks, got {num_steps}")
    return num_steps // blocks


def _check_num_commit(rule: StepRule, num_commit: Any, steps: int) -> None:
    if (num_commit is not None) != (rule.count == "given"):
        got = "None" if num_commit is None else f"numbers with count={rule.count!r}"
        raise ValueError(
            f"num_commit: expected exactly where the rule has count='given', got {got}"
        )
    if num_commit is None:
        return
    is_list = isinstance(num_commit, (list, tuple)) or kind_of(num_commit) is not None
    size = len(num_commit) if is_list else None
    if size != steps:
        what = repr(num_commit) if size is None else size
        raise ValueError(f"num_commit: expected one entry for each of {steps} steps, got {what}")


def _without_gradients(tokens: Any) -> contextlib.AbstractContextManager[Any]:
    """Where torch records nothing: decoding has no gradient, and its results are ordinary tensors."""
    is_torch = kind_of(tokens) == "torch"
    no_grad: contextlib.AbstractContextManager[Any] = (
        library_of(tokens).no_grad() if is_torch else contextlib.nullcontext()
    )
    return no_grad


def _detached(output: Any) -> Any:
    """A model's output without what it may have recorded by itself, or is: a parameter."""
    return output.detach() if kind_of(output) == "torch" else output


def _predict(
    forward: Callable[[Any], Any], tokens: Any, guidance_scale: float | None
) -> tuple[Any, Any]:
    out = forward(tokens)
    if guidance_scale is None:
        if isinstance(out, tuple):
            raise TypeError(
                "forward: expected one logits array (B, N, V) without guidance_scale, got a tuple"
            )
        _check_output(out, tokens)
        return _detached(out), None
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            "forward: expected a pair (logits, uncond_logits) with guidance_scale, "
            f"got {type(out).__name__}"
        )
    _check_output(out[0], tokens)
    return _detached(out[0]), _detached(out[1])


def _check_output(out: Any, tokens: Any) -> None:
    """The model's output fits the tokens it was given; its own checks are the step's."""
    if kind_of(out) != kind_of(tokens):
        raise TypeError(
            f"forward: expected a {kind_of(tokens)} array like tokens, got {type(out).__name__}"
        )
    if len(out.shape) != 3 or tuple(out.shape[:2]) != tuple(tokens.shape):
        raise ValueError(
            f"forward: expected shape ({tokens.shape[0]}, {tokens.shape[1]}, ...) for tokens "
            f"{tuple(tokens.shape)}, got {tuple(out.shape)}"
        )


def _both(a: Any, b: Any) -> Any:
    """a & b, where None is true everywhere."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def _is_done(masked: Any, takes_part: Any) -> bool:
    """Whether nothing that takes part is masked any more, where asking costs no synchronisation."""
    if not is_on_host(masked):
        return False
    return not bool(to_numpy(_both(masked, takes_part)).any())
