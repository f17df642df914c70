"""The loop: predict, decode a step, repeat.  It knows no kernel and no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .kernels.common.arrays import is_on_host, kind_of, to_kind, to_numpy
from .kernels.common.selection import check_name
from .kernels.decode_step import StepNoise, StepResult, StepRule, as_rule, decode_step
from .kernels.decode_step.checks import check_integer
from .kernels.decode_step.plan import check_num_steps
from .kernels.decode_step.spec import Score
from .kernels.head_sample import decode_step_from_hidden


class Trajectory(NamedTuple):
    """What every step did: lists with one (B, N) array per step that ran, and one array for all.

    next_tokens, candidate_tokens, confidence: as in `StepResult`.
    log_probs: of the candidates, under the model's own distribution (guided; temperature 1, no
        filters), 0 where nothing was drawn.
    entropies: of that distribution, in nats, 0 where nothing was drawn.
    commit_steps: (B, N), the step that committed each position, -1 where none did.
    """

    next_tokens: list[Any]
    candidate_tokens: list[Any]
    confidence: list[Any]
    log_probs: list[Any]
    entropies: list[Any]
    commit_steps: Any


class GenerateResult(NamedTuple):
    """What `generate` returns.

    tokens: (B, N), the last step's candidates under rules with a schedule (count="masked", MaskGIT's
        final image), else the state after it.  Masks may be left where a row had no finite logit,
        where the model predicted the mask token itself, and under rules that stop short of it by
        chance or by a mean over the batch (mdlm, remdm-*, dream-* with uneven rows).
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
    eligible: Any = None,
    positions: Any = None,
    num_commit: Sequence[Any] | None = None,
    head_weight: Any = None,
    head_bias: Any = None,
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
        eligible: (B, N) bool, which masked positions are generated at all; others stay masked.
        positions: (B, N) integers, where each token stands in its sequence, for the random numbers:
            left-padded rows then draw what they draw alone.
        num_commit: for rules whose count is given: num_commit[step] is (B,) or one number.
        head_weight, head_bias: (V, D) and (V,): `forward` then returns hidden states (B, N, D), and
            the head's product is formed for the rows that take part alone
            (`decode_step_from_hidden`).
        record: keep every step's tokens, confidences, log-probabilities and entropies; two more
            readings of the logits a step.
        noise: called with the number of the step (0, 1, ... over all blocks), returns the
            `StepNoise` to use instead of the seeds.

    Returns:
        `GenerateResult`.

    Raises:
        TypeError, ValueError: as `decode_step`; also for lengths and steps that do not divide.

    Semantics: a sequence's tokens depend on its own seed and logits only, not on the batch, except
    under rules whose counts are taken over the batch (titok, maskbit, dream-*, vampnet).  On
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
    steps = num_steps // len(blocks)
    _check_num_commit(step_rule, num_commit, steps)
    decode = _decoder(head_weight, head_bias, guidance_scale, mask_token_id, backend)
    log = _Log(tokens, mask_token_id) if record else None
    allowed = tokens == mask_token_id if step_rule.touches_known else None
    if eligible is not None:
        allowed = eligible if allowed is None else allowed & eligible
    num_forwards = 0
    with _bar(num_steps, progress) as bar:
        for index, (start, stop) in enumerate(blocks):
            at_start = _masked_in(tokens, mask_token_id, start, stop, eligible)
            first = 0 if step_rule.block_scope == "prefix" else start
            window = _window(tokens, first, stop) if block_length is not None else None
            takes_part = allowed if window is None or allowed is None else allowed & window
            for step in range(steps):
                number = index * steps + step
                bar(1)
                if not step_rule.touches_known and _is_done(tokens, mask_token_id, first, stop):
                    continue
                output = _predict(forward, tokens, guidance_scale)
                num_forwards += 1
                options = {
                    "step": step,
                    "num_steps": steps,
                    "num_masked_at_start": at_start,
                    "seeds": seeds,
                    "noise": noise(number) if noise is not None else None,
                    "eligible": window if takes_part is None else takes_part,
                    "positions": positions,
                }
                commit = {} if num_commit is None else {"num_commit": num_commit[step]}
                result = decode(output, tokens, step_rule, **options, **commit)
                if log is not None:
                    log.add(number, tokens, result, decode, output, step_rule, options)
                last = step == steps - 1 and step_rule.count == "masked"
                tokens = result.candidate_tokens if last else result.next_tokens
    return GenerateResult(tokens, num_forwards, log.trajectory if log is not None else None)


def _decoder(
    weight: Any, bias: Any, scale: float | None, mask_token_id: int, backend: str
) -> Callable[..., StepResult]:
    """(output of forward, tokens, rule, options) -> StepResult, from logits or hidden states."""
    if weight is None and bias is not None:
        raise ValueError("head_weight: expected together with head_bias, got None")

    def decode(output: tuple[Any, Any], tokens: Any, rule: StepRule, **options: Any) -> StepResult:
        cond, uncond = output
        options |= {"rule": rule, "mask_token_id": mask_token_id, "backend": backend}
        options["guidance_scale"] = scale if uncond is not None else None
        if weight is None:
            return decode_step(cond, tokens, uncond_logits=uncond, **options)
        return decode_step_from_hidden(
            cond, weight, tokens, head_bias=bias, uncond_hidden=uncond, **options
        )

    return decode


class _Log:
    """Fills in a `Trajectory`."""

    def __init__(self, tokens: Any, mask_token_id: int):
        self._mask = mask_token_id
        self.trajectory = Trajectory([], [], [], [], [], tokens * 0 - 1)

    def add(
        self, number: int, tokens: Any, result: StepResult, decode: Callable[..., StepResult],
        output: Any, rule: StepRule, options: dict[str, Any],
    ) -> None:  # fmt: skip
        """One step; the two more scores come from the same draw under rules with other scores."""
        trajectory = self.trajectory
        trajectory.next_tokens.append(result.next_tokens)
        trajectory.candidate_tokens.append(result.candidate_tokens)
        trajectory.confidence.append(result.confidence)
        noise = options["noise"]
        bare = options | {"noise": None if noise is None else StepNoise(noise.token_gumbel)}
        columns: dict[Score, str] = {"log_prob": "log_probs", "neg_entropy": "entropies"}
        for score, column in columns.items():
            found = decode(output, tokens, rule.scoring(score), **bare).confidence
            drawn = (found - found) == 0  # neither known (+inf) nor without a candidate (-inf)
            sign = -1 if score == "neg_entropy" else 1
            getattr(trajectory, column).append(_where(drawn, sign * found, found * 0))
        is_masked = result.next_tokens == self._mask
        steps = _where(
            tokens == self._mask, trajectory.commit_steps * 0 + number, trajectory.commit_steps
        )
        steps = _where(is_masked, trajectory.commit_steps * 0 - 1, steps)
        self.trajectory = trajectory._replace(commit_steps=steps)


def _where(condition: Any, a: Any, b: Any) -> Any:
    """np.where in the library of the arrays; infinities in the branch not taken do no harm."""
    kind = kind_of(condition)
    if kind == "torch":
        import torch

        return torch.where(condition, a, torch.zeros_like(b) if b.dtype.is_floating_point else b)
    if kind == "jax":
        import jax.numpy as jnp

        return jnp.where(condition, a, jnp.nan_to_num(b) if b.dtype.kind == "f" else b)
    return np.where(condition, a, np.nan_to_num(b) if b.dtype.kind == "f" else b)


def _check_num_commit(rule: StepRule, num_commit: Any, steps: int) -> None:
    if (num_commit is not None) != (rule.count == "given"):
        got = "None" if num_commit is None else f"numbers with count={rule.count!r}"
        raise ValueError(
            f"num_commit: expected exactly where the rule has count='given', got {got}"
        )
    if num_commit is not None and len(num_commit) != steps:
        raise ValueError(
            f"num_commit: expected one entry for each of {steps} steps, got {len(num_commit)}"
        )


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


def _masked_in(tokens: Any, mask_token_id: int, start: int, stop: int, eligible: Any) -> Any:
    masked = tokens[:, start:stop] == mask_token_id
    return (masked if eligible is None else masked & eligible[:, start:stop]).sum(1)


def _is_done(tokens: Any, mask_token_id: int, start: int, stop: int) -> bool:
    """Whether nothing is masked any more, where asking costs no synchronisation."""
    if not is_on_host(tokens):
        return False
    return not bool((to_numpy(tokens)[:, start:stop] == mask_token_id).any())


def _window(tokens: Any, start: int, stop: int) -> Any:
    """(B, N) bool: the positions of a block."""
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
