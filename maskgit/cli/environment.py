"""The `maskgit env` command, which needs NumPy alone."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from maskgit.report import tables
from maskgit.report.environment import collect


def show(as_json: bool) -> None:
    """Print the report on stdout: as JSON, or a line for each fact, wrapped on a terminal."""
    with _quiet():
        report = collect()
    if as_json:
        print(json.dumps(report, indent=2, default=str))
        return
    print("\n".join(tables.pairs(_flatten(report), tables.width())))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What frameworks log while they start (libtpu's C++ too) goes nowhere; jax takes no GPU's memory."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        saved = os.dup(2)
    except OSError:  # closed
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dicts as (dotted key, text); {available, reason} becomes one line."""
    if isinstance(value, list):
        return [(prefix, ", ".join(map(str, value)) or "none")]
    if not isinstance(value, dict) or not value:
        return [(prefix, str("none" if value in (None, {}) else value))]
    if set(value) == {"available", "reason"}:
        return [(prefix, "yes" if value["available"] else f"no: {value['reason']}")]
    rows: list[tuple[str, str]] = []
    for key, inner in value.items():
        rows += _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return rows
