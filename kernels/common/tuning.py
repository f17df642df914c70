"""Tuned numbers as data: kernels/<op>/tuned/<device>.json, nearest entry, nothing for unknown devices.

A file is a list of entries {"when": {"dtype": ..., "leaves": ...}, "use": {...}}.  Strings in "when" must
be equal; of the entries left the one whose numbers are nearest in ratio is used.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from typing import Any

_FORCED: dict[str, dict[str, int]] = {}


@contextlib.contextmanager
def forced(op: str, use: dict[str, int]) -> Iterator[None]:
    """Every case of an op has these numbers in here: to time them, or to test odd ones."""
    before = _FORCED.get(op)
    _FORCED[op] = use
    try:
        yield
    finally:
        del _FORCED[op]
        if before is not None:
            _FORCED[op] = before


def tuned(op: str, device: Any, when: dict[str, str | int]) -> dict[str, int]:
    """The tuned numbers for a case on a torch device, {} where there are none."""
    if op in _FORCED:
        return dict(_FORCED[op])
    if getattr(device, "type", "cpu") != "cuda":
        return {}
    return dict(_nearest(op, device_name(device), tuple(sorted(when.items()))))


@lru_cache(maxsize=16)
def device_name(device: Any) -> str:
    """A torch CUDA device's name as it names a file: nvidia-h100-80gb-hbm3."""
    import torch

    return str(torch.cuda.get_device_name(device)).lower().replace(" ", "-")


@lru_cache(maxsize=64)
def _entries(op: str, name: str) -> Any:
    file = resources.files("maskgit.kernels").joinpath(op, "tuned", f"{name}.json")
    return json.loads(file.read_text()) if file.is_file() else []


@lru_cache(maxsize=4096)
def _nearest(op: str, name: str, when: tuple[tuple[str, str | int], ...]) -> dict[str, int]:
    def distance(entry: dict[str, Any]) -> float:
        total = 0.0
        for key, value in when:
            other = entry["when"].get(key, value)
            if isinstance(value, str):
                total += 0.0 if other == value else math.inf
            else:
                total += abs(math.log(max(other, 1) / max(value, 1)))
        return total

    entries = [e for e in _entries(op, name) if math.isfinite(distance(e))]
    return dict(min(entries, key=distance)["use"]) if entries else {}
