"""What a checkpoint file says of itself, for torch (checkpoint.py) and jax (model_jax.py) alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

FORMAT = "maskgit-checkpoint"
FORMAT_VERSION = "1"
WEIGHTS = "weights"


def digest(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]], *texts: str) -> str:
    """SHA-256 (hex) over texts, then (name, dtype as torch names it, shape, bytes) in the order of names."""
    found = hashlib.sha256("\0".join(texts).encode())
    for name, dtype, shape, data in tensors:
        found.update(f"{name}|{dtype}|{shape}|".encode())
        found.update(data)
    return found.hexdigest()
