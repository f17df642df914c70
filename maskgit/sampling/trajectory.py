"""What every step of `generate` did, for evaluation and for reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..kernels.common.arrays import library_of, place_of, signed
from ..kernels.decode_step import StepResult, StepRule
from ..kernels.decode_step.dispatch import usual_jax
from ..kernels.decode_step.rule.derive import scoring


class Trajectory(NamedTuple):
    """What every step did: lists with one (B, N) array per step that ran, and one array for all.

    next_tokens, candidate_tokens, confidence: as in `StepResult`.
    log_probs: of the tokens drawn (known ones that were edited included), under the model's own
        distribution: guided, over the ids that the rule may draw, at temperature 1, unfiltered, not
        rounded; 0 where nothing was drawn.
    entropies: of that distribution, in nats, 0 where nothing was drawn.  Both are float32, or float64
        under rules that score in it.
    commit_steps: (B, N), the step (over all blocks) that put each token of `GenerateResult.tokens`
        there; -1 at given tokens and at masks that are left.
    """

    next_tokens: list[Any]
    candidate_tokens: list[Any]
    confidence: list[Any]
    log_probs: list[Any]
    entropies: list[Any]
    commit_steps: Any


class Recorder:
    """Fills in a `Trajectory`; `decode` is (output, tokens, rule, **options) -> StepResult."""

    def __init__(
        self, tokens: Any, rule: StepRule, mask_token_id: int, decode: Callable[..., StepResult]
    ):
        self._mask, self._decode = mask_token_id, decode
        self._log_prob = scoring(rule, "log_prob", mask_token_id)
        self._entropy = scoring(rule, "neg_entropy", mask_token_id)
        never = library_of(tokens).full(tuple(tokens.shape), -1, **place_of(tokens))
        self.trajectory = Trajectory([], [], [], [], [], never)

    def add(self, number: int, output: Any, before: Any, result: StepResult, after: Any) -> None:
        """Step `number`, from the tokens `before` to those `after` that the loop goes on with."""
        with usual_jax(before):
            self._add(number, output, before, result, after)

    def _add(self, number: int, output: Any, before: Any, result: StepResult, after: Any) -> None:
        log, library = self.trajectory, library_of(before)
        log.next_tokens.append(result.next_tokens)
        log.candidate_tokens.append(result.candidate_tokens)
        log.confidence.append(result.confidence)
        found = result.confidence > -float("inf")
        drawn = (result.candidate_tokens != before) | ((before == self._mask) & found)
        held = library.where(drawn, signed(result.candidate_tokens), 0)
        nowhere = {"mask_token_id": -1, "step": 0, "num_steps": 1, "eligible": drawn}
        own, spread = (
            self._decode(output, held, rule, **nowhere).confidence
            for rule in (self._log_prob, self._entropy)
        )
        log.log_probs.append(library.where(drawn, own, 0.0))
        log.entropies.append(library.where(drawn, -spread, 0.0))
        steps = library.where(after != before, number, log.commit_steps)
        self.trajectory = log._replace(commit_steps=library.where(after == self._mask, -1, steps))
