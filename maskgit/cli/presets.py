"""The `maskgit presets` command, which needs NumPy alone."""

from __future__ import annotations

import json

from maskgit import StepRule
from maskgit.report import tables


def show(as_json: bool) -> None:
    """Print every preset on stdout: its codebase, and what it scores and counts by."""
    rules = [StepRule.preset(name) for name in StepRule.presets()]
    if as_json:
        print(json.dumps({rule.name: {"source": rule.source, "score": rule.score, "count": rule.count}
                          for rule in rules}, indent=2))  # fmt: skip
        return
    rows = [(rule.name, rule.score, rule.count, rule.source) for rule in rules]
    tables.show(("preset", "score", "count", "after"), rows)
