"""From the checked arguments of `attention` to a backend and back."""

from __future__ import annotations

from typing import Any

from ..common import backends
from ..common.arrays import dtype_name, kind_of, like, to_numpy, widen
from ..common.backends import module_of


def attend(q: Any, k: Any, v: Any, padding: Any, scale: float, backend: str) -> Any:
    """The checked call on arrays of one kind; what the op runs."""
    chosen = choose(backend, q, k)
    module = module_of("attention", chosen)
    if chosen == "reference":
        arrays = [widen(to_numpy(x), dtype_name(x)) for x in (q, k, v)]
        out = like(module.attention(*arrays, to_numpy(padding), scale, dtype_name(q)), q)
        return out.to(q.dtype) if kind_of(q) == "torch" else out.astype(q.dtype)
    return module.attention(q, k, v, padding, scale)


def choose(backend: str, q: Any, k: Any) -> str:
    """The backend's name; ValueError where it cannot run on these arrays, which are not converted."""
    kind = kind_of(q) or "numpy"
    chosen = backends.choose(backend, kind, backends.device_of(q), "attention", converts=False)
    if backend != "auto" or chosen not in ("triton", "pallas"):
        return chosen
    return chosen if module_of("attention", chosen).suits(q, k) else kind
