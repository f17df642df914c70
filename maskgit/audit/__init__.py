"""Where two right implementations of a decode step may differ for no other reason than a tie.

Argmax among equal logits, and which of several equal confidences a cut commits, are decided by
conventions (lowest index, highest index, all, none) and, where numbers are only nearly equal, by
rounding.  `audit_ties` computes a step with the float64 reference and names those places.
"""

from .report import audit_ties
from .ties import CutTie, RowTie, TieReport

__all__ = ["CutTie", "RowTie", "TieReport", "audit_ties"]
