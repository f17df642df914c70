"""Masked-token generation, fast and exact.

`decode_step` is one step of the loop that MaskGIT, Muse, LLaDA, Dream and their family share;
`generate` is the loop.  Importing this package needs NumPy alone; torch, jax and the C++ extension
are used where the arrays or the machine bring them.
"""

from . import layouts
from ._version import __version__
from .audit import TieReport, audit_ties
from .kernels.attention import attention
from .kernels.common.backends import available_backends
from .kernels.common.mesh import sharded
from .kernels.decode_step import (
    StepNoise,
    StepResult,
    StepRule,
    TokenStats,
    commit_tokens,
    decode_step,
    gamma,
    plan_masked_counts,
    sample_tokens,
)
from .kernels.head_sample import decode_step_from_hidden
from .sampling.loop import generate
from .sampling.result import GenerateResult
from .sampling.trajectory import Trajectory

__all__ = [
    "GenerateResult",
    "StepNoise",
    "StepResult",
    "StepRule",
    "TieReport",
    "TokenStats",
    "Trajectory",
    "__version__",
    "attention",
    "audit_ties",
    "available_backends",
    "commit_tokens",
    "decode_step",
    "decode_step_from_hidden",
    "gamma",
    "generate",
    "layouts",
    "plan_masked_counts",
    "sample_tokens",
    "sharded",
]
