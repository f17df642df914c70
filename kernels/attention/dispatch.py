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
    """The backend's name; ValueError where it cannot run on these arrays, which it does not convert."""
    kind = kind_of(q) or "numpy"
    chosen = backends.choose(backend, kind, backends.device_of(q), "attention")
    own = backends.BACKENDS[chosen].arrays
    if backend != "auto":
        if chosen != "reference" and own != kind:
            raise ValueError(
                f"backend: {backend!r} cannot run: it works on {own} arrays, not on {kind}; "
                f"available: {kind if kind != 'numpy' else 'reference'}, reference"
            )
        return chosen
    loses = chosen in ("triton", "pallas") and not module_of("attention", chosen).suits(q, k)
    return kind if loses else chosen
