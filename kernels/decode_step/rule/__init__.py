"""What one decode step does: its rule as data, the published ones, and a rule at one step of a loop."""

from . import presets
from .rule import StepRule, as_rule

__all__ = ["StepRule", "as_rule", "presets"]
