"""The loop: predict, decode a step, repeat.  It knows no kernel and no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .kernels.common.arrays import is_on_host, kind_of, to_kind, to_numpy
from .kernels.common.selection import check_name
from .kernels.decode_step import StepNoise, StepRule, as_rule, decode_step
from .kernels.decode_step.checks import check_integer
from .kernels.decode_step.plan import check_num_steps


class Trajectory(NamedTuple):
    """What every step did: three lists with one (B, N) array per step that ran."""

    next_tokens: list[Any]
    candidate_tokens: list[Any]
    confidence: list[Any]


class GenerateResult(NamedTuple):
    """What `generate` returns.

    tokens: (B, N), the last step's candidates: with the default rules nothing is masked in it,
        save where a row had no finite logit or the model predicted the mask token itself.
    num_forwards: how often `forward` was called.
    trajectory: the steps, with record=True, else None.
    """

    tokens: Any
    num_forwards: int
    trajectory: Trajectory | None


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
    prompt_length: int = 0,
    record: bool = False,
    noise: Callable[[int], StepNoise] | None = None,
) -> GenerateResult:
    """Fill in the masked positions of `tokens` in `num_steps` steps of parallel decoding.

    Args:
        forward: maps tokens (B, N) to logits (B, N, V); with `guidance_scale`, to the pair
            (conditional logits, unconditional logits).
        tokens: (B, N) integers, a torch, jax or NumPy array.  Positions that hold
            `mask_token_id` are generated; all others are known and stay (inpainting, prompts).
        rule: a `StepRule` or preset name.
        mask_token_id: id of the mask token.
        num_steps: T, in all; with blocks, a multiple of their number.
        seeds: (B,) 64-bit integers, one per sequence; may be None for rules that draw nothing.
        guidance_scale: scale s of u + s (c - u).
        progress: show a tqdm bar on stderr.
        backend: as in `decode_step`.
        block_length: semi-autoregressive decoding: the positions from `prompt_length` on are
            decoded in blocks of this length, left to right, each in num_steps / blocks steps.
        prompt_length: where the first block begins.
        record: keep every step's tokens and confidences.
        noise: called with the number of the step (0, 1, ... over all blocks), returns the
            `StepNoise` to use instead of the seeds.

    Returns:
        `GenerateResult`.

    Raises:
        TypeError, ValueError: as `decode_step`; also for lengths and steps that do not divide.

    Semantics: a sequence's tokens depend on its own seed and logits only, not on the batch, except
    under the rules whose counts are taken over the batch (titok: the first row's; dream-*: the mean).  On
    the host, steps are skipped once nothing of a block is masked, which changes no token; on an
    accelerator every step runs, so that the loop never waits for the device.
    """
    step_rule = as_rule(rule)
    check_name(backend)
    check_integer("mask_token_id", mask_token_id)
    if not callable(forward):
        raise TypeError(f"forward: expected a callable, got {type(forward).__name__}")
    if noise is not None and not callable(noise):
        raise TypeError(f"noise: expected a callable or None, got {type(noise).__name__}")
    blocks = _blocks(tokens, num_steps, block_length, prompt_length)
    steps_per_block = num_steps // len(blocks)
    trajectory = Trajectory([], [], [])
    num_forwards = 0
    with _bar(num_steps, progress) as bar:
        for index, (start, stop) in enumerate(blocks):
            at_start = _masked_in(tokens, mask_token_id, start, stop)
            first = 0 if step_rule.block_scope == "prefix" else start
            window = _window(tokens, first, stop) if block_length is not None else None
            for step in range(steps_per_block):
                number = index * steps_per_block + step
                bar(1)
                if _is_done(tokens, mask_token_id, first, stop):
                    continue
                cond, uncond = _predict(forward, tokens, guidance_scale)
                num_forwards += 1
                result = decode_step(
                    cond,
                    tokens,
                    rule=step_rule,
                    mask_token_id=mask_token_id,
                    step=step,
                    num_steps=steps_per_block,
                    num_masked_at_start=at_start,
                    seeds=seeds,
                    noise=noise(number) if noise is not None else None,
                    uncond_logits=uncond,
                    guidance_scale=guidance_scale if uncond is not None else None,
                    eligible=window,
                    backend=backend,
                )
                if record:
                    for name, item in result._asdict().items():
                        getattr(trajectory, name).append(item)
                last = step == steps_per_block - 1
                tokens = result.candidate_tokens if last else result.next_tokens
    return GenerateResult(tokens, num_forwards, trajectory if record else None)


def _blocks(
    tokens: Any, num_steps: int, block_length: int | None, prompt_length: int
) -> list[tuple[int, int]]:
    """(start, stop) of each block; the whole sequence is one block by default."""
    if kind_of(tokens) is None:
        raise TypeError(
            f"tokens: expected a torch, jax or NumPy array, got {type(tokens).__name__}"
        )
    if len(tokens.shape) != 2:
        raise ValueError(f"tokens: expected shape (B, N), got {tuple(tokens.shape)}")
    check_num_steps(num_steps)
    length = int(tokens.shape[1])
    if not isinstance(prompt_length, int) or not 0 <= prompt_length <= length:
        raise ValueError(
            f"prompt_length: expected an integer in [0, {length}], got {prompt_length!r}"
        )
    if block_length is None:
        if prompt_length:
            raise ValueError("prompt_length: expected 0 without block_length, got a prompt")
        return [(0, length)]
    span = length - prompt_length
    if not isinstance(block_length, int) or block_length < 1 or span % block_length or span == 0:
        raise ValueError(
            f"block_length: expected a divisor of the {span} positions to generate, "
            f"got {block_length!r}"
        )
    count = span // block_length
    if num_steps % count:
        raise ValueError(f"num_steps: expected a multiple of the {count} blocks, got {num_steps}")
    starts = range(prompt_length, length, block_length)
    return [(start, start + block_length) for start in starts]


def _predict(
    forward: Callable[[Any], Any], tokens: Any, guidance_scale: float | None
) -> tuple[Any, Any]:
    out = forward(tokens)
    if guidance_scale is None:
        if isinstance(out, tuple):
            raise TypeError(
                "forward: expected one logits array (B, N, V) without guidance_scale, got a tuple"
            )
        return out, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            "forward: expected a pair (logits, uncond_logits) with guidance_scale, "
            f"got {type(out).__name__}"
        )
    return out[0], out[1]


def _masked_in(tokens: Any, mask_token_id: int, start: int, stop: int) -> Any:
    return (tokens[:, start:stop] == mask_token_id).sum(1)


def _is_done(tokens: Any, mask_token_id: int, start: int, stop: int) -> bool:
    """Whether nothing is masked any more, where asking costs no synchronisation."""
    if not is_on_host(tokens):
        return False
    return not bool((to_numpy(tokens)[:, start:stop] == mask_token_id).any())


def _window(tokens: Any, start: int, stop: int) -> Any:
    """(B, N) bool: the positions of a block."""
    import numpy as np

    row = np.zeros(tuple(tokens.shape), bool)
    row[:, start:stop] = True
    kind = kind_of(tokens)
    assert kind is not None
    return to_kind(row, kind, tokens.device if kind == "torch" else None)


class _bar:
    """A tqdm bar on stderr, or nothing."""

    def __init__(self, total: int, show: bool) -> None:
        self._bar: Any = None
        if show:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc="decoding", unit="step")

    def __enter__(self) -> Callable[[int], Any]:
        return self._bar.update if self._bar is not None else lambda n: None

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


__all__ = ["GenerateResult", "Trajectory", "generate"]
