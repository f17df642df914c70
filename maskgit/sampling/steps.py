"""One step of the loop from what the model returns: logits, or what goes into its head."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..kernels.common.arrays import dtype_name, library_of, signed
from ..kernels.decode_step import StepResult, StepRule, commit_tokens, decode_step
from ..kernels.decode_step.door import check_beside
from ..kernels.decode_step.rule.derive import candidates_of, committing
from ..kernels.head_sample import decode_step_from_hidden


class Stepper:
    """Decode steps from the model's output and, with guidance, its unconditional output.

    `weight` and `bias` may be functions that give them for the output at hand, None where it is logits.
    """

    def __init__(self, weight: Any, bias: Any, scale: float | None, backend: str) -> None:
        if weight is None and bias is not None:
            raise ValueError("head_weight: expected together with head_bias, got None")
        self._weight, self._bias, self._scale, self._backend = weight, bias, scale, backend

    def decode(
        self, output: tuple[Any, Any], tokens: Any, rule: StepRule, **options: Any
    ) -> StepResult:
        """A step by the rule; the options are those of `decode_step`."""
        cond, uncond = output
        options |= {"rule": rule, "backend": self._backend}
        options["guidance_scale"] = None if uncond is None else self._scale
        weight, bias = _now(self._weight), _now(self._bias)
        if weight is None:
            return decode_step(cond, tokens, uncond_logits=uncond, **options)
        return decode_step_from_hidden(
            cond, weight, tokens, head_bias=bias, uncond_hidden=uncond, **options
        )

    def candidates(
        self, output: tuple[Any, Any], tokens: Any, rule: StepRule, options: dict[str, Any],
        result: StepResult,
    ) -> Any:  # fmt: skip
        """The candidates (B, N) of a step that gave `result`, also where it chose positions first."""
        if _now(self._weight) is None:
            return result.candidate_tokens
        options = options | {"num_commit": None}
        return self.decode(output, tokens, candidates_of(rule), **options).candidate_tokens

    def step(
        self, output: tuple[Any, Any], tokens: Any, rule: StepRule, scores: Any, number: int,
        options: dict[str, Any],
    ) -> StepResult:  # fmt: skip
        """Step `number` of a loop, with `scores` as `generate` takes them.

        A callable that asks for the candidates has them drawn once, and these are committed; one that
        does not leaves it to the rule whether positions are chosen before anything is drawn.
        """
        if not callable(scores):
            return self.decode(output, tokens, rule, scores=scores, **options)
        drawn: list[StepResult] = []

        @cache
        def candidates() -> Any:
            out = self.decode(
                output, tokens, candidates_of(rule), **(options | {"num_commit": None})
            )
            drawn.append(out)
            return out.candidate_tokens

        given = scores(number, tokens, candidates)
        check_beside(tokens, rule, scores=given)
        if not drawn:
            return self.decode(output, tokens, rule, scores=given, **options)
        noise = options["noise"]
        rest = {name: value for name, value in options.items() if name != "noise"}
        none = drawn[0].confidence == -float("inf")
        return commit_tokens(
            library_of(tokens).where(none, -1, signed(drawn[0].candidate_tokens)),
            given,
            tokens,
            rule=committing(rule, dtype_name(output[0]), ranked=False),
            choice_gumbel=None if noise is None else noise.choice_gumbel,
            backend=self._backend,
            **rest,
        )


def _now(value: Any) -> Any:
    return value() if callable(value) else value
