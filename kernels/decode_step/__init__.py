"""One step of masked-token decoding: draw, score, count, select, re-mask."""

from .api import commit_tokens, decode_step, sample_tokens
from .inputs import StepNoise, StepResult, TokenStats
from .rule.counts import plan_masked_counts
from .rule.rule import StepRule, as_rule
from .rule.schedules import SCHEDULES, gamma

__all__ = [
    "SCHEDULES",
    "StepNoise",
    "StepResult",
    "StepRule",
    "TokenStats",
    "as_rule",
    "commit_tokens",
    "decode_step",
    "gamma",
    "plan_masked_counts",
    "sample_tokens",
]
