"""One step of masked-token decoding: draw, score, count, select, re-mask."""

from .api import commit_tokens, decode_step, sample_tokens
from .counts import SCHEDULES, gamma, plan_masked_counts
from .spec import StepNoise, StepResult, StepRule, TokenStats, as_rule

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
