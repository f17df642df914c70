"""What `generate` returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from .trajectory import Trajectory


class GenerateResult(NamedTuple):
    """What `generate` returns.

    tokens: (B, N), the last step's candidates under rules with a schedule (count="masked", MaskGIT's
        final image), else the state after it.  Masks may be left where a row had no finite logit,
        where the model predicted the mask token itself, and under rules that stop short of it by
        chance or by a mean over the batch (mdlm, remdm-*, dream-* with uneven rows), unless `finish`.
    num_forwards: how often `forward` was called.
    trajectory: the steps, with record=True, else None.
    """

    tokens: Any
    num_forwards: int
    trajectory: Trajectory | None
