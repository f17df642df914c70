"""From the checked arguments of `attention` to a backend and back."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..common.arrays import dtype_name, is_on_host, kind_of, like, to_numpy, widen
from ..common.backends import BACKENDS, on_tpu, why_missing

MODULES = {
    "triton": "triton_cuda.launch",
    "pallas": "pallas_tpu",
    "torch": "torch_ref",
    "jax": "jax_ref",
    "reference": "reference",
}


def attend(q: Any, k: Any, v: Any, padding: Any, scale: float, backend: str) -> Any:
    """The checked call on arrays of one kind; what the op runs."""
    chosen = choose(backend, q, k)
    module = import_module(f".{MODULES[chosen]}", __package__)
    if chosen == "reference":
        arrays = [widen(to_numpy(x), dtype_name(x)) for x in (q, k, v)]
        out = like(module.attention(*arrays, to_numpy(padding), scale, dtype_name(q)), q)
        return out.to(q.dtype) if kind_of(q) == "torch" else out.astype(q.dtype)
    return module.attention(q, k, v, padding, scale)


def choose(backend: str, q: Any, k: Any) -> str:
    """The backend's name; ValueError where it cannot run on these arrays."""
    kind = kind_of(q) or "numpy"
    if backend == "auto":
        if kind == "torch" and not is_on_host(q):
            from .triton_cuda.launch import wins

            return "triton" if why_missing("triton") is None and wins(q, k) else "torch"
        if kind == "jax" and on_tpu(q):
            from .pallas_tpu import fits

            return "pallas" if fits(q, k) else "jax"
        return {"torch": "torch", "jax": "jax"}.get(kind, "reference")
    reason = None if backend in MODULES else "it has no attention"
    reason = reason or why_missing(backend)
    if reason is None and backend != "reference" and BACKENDS[backend][1] != kind:
        reason = f"it works on {BACKENDS[backend][1]} arrays, not on {kind}"
    if reason is not None:
        own = [name for name in MODULES if BACKENDS[name][1] in (kind, "numpy")]
        legal = ", ".join(name for name in own if why_missing(name) is None)
        raise ValueError(f"backend: {backend!r} cannot run: {reason}; available: {legal}")
    return backend
