"""What a tie is: of a row, of a cut, and the report of them all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True)
class RowTie:
    """A row whose candidate hangs on a tie.

    what: "logits" (guided and filtered), "probs" (after rounding to the score's dtype) or "keys"
        (logits with the caller's noise).
    kind: "equal", or "near": a rounding error apart.
    tokens: the first few ids that tie, rising; `count` of them in all.
    lowest, highest: the candidate by the lowest and by the highest index.
    gap: between the largest and the second largest value.
    """

    sequence: int
    position: int
    what: Literal["logits", "probs", "keys"]
    kind: Literal["equal", "near"]
    tokens: tuple[int, ...]
    count: int
    lowest: int
    highest: int
    gap: float


@dataclass(frozen=True)
class CutTie:
    """Confidences of one sequence that tie where the rule cuts, or at its threshold.

    kind: "equal", or "near" (a rounding error apart), at the cut; "threshold": a rounding error
        from the bound that confidences are compared with.
    confidence: at the cut, or the bound.
    positions: those that tie, rising.
    commits: which of them each convention commits: "lowest" and "highest" index to the exact
        number, and for rules with a count "strict" (all ties at the cut) and "inclusive" (none).
    """

    sequence: int
    kind: Literal["equal", "near", "threshold"]
    confidence: float
    positions: tuple[int, ...]
    commits: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TieReport:
    """What `audit_ties` found.

    rule, dtype, step, num_steps: what was audited; rows, how many rows took part.
    logits: ties between the largest logits (with injected noise, keys) of a row.
    probs: ties between the largest rounded probabilities, for rules that take their argmax.
    cuts: ties between confidences at the cut.
    """

    rule: str
    dtype: str
    step: int
    num_steps: int
    rows: int
    logits: tuple[RowTie, ...]
    probs: tuple[RowTie, ...]
    cuts: tuple[CutTie, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing ties."""
        return not (self.logits or self.probs or self.cuts)

    def as_dict(self, limit: int | None = None) -> dict[str, Any]:
        """Plain numbers for JSON: of each list how many there are, and the first `limit`."""
        head = {k: getattr(self, k) for k in ("rule", "dtype", "step", "num_steps", "rows")}
        out: dict[str, Any] = head | {"clean": self.is_clean}
        for name in ("logits", "probs", "cuts"):
            ties = getattr(self, name)
            out[name] = {
                "count": len(ties),
                "equal": sum(tie.kind == "equal" for tie in ties),
                "first": [dataclasses.asdict(tie) for tie in ties[:limit]],
            }
        return out
