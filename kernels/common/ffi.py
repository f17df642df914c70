"""The C++ core's XLA FFI handlers (csrc/ffi.cpp), made known to XLA once."""

from __future__ import annotations

from functools import cache


@cache
def why_missing() -> str | None:
    """None where jitted JAX programs can call the core, else the reason."""
    try:
        import jax

        from maskgit import _C
    except ImportError as error:
        return str(error)
    handlers = _C.ffi_handlers()
    if not handlers:
        return "the C++ extension was built without jaxlib's headers; install jaxlib, then this package"
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return None
