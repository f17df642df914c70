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
    try:
        for name, handler in _C.ffi_handlers().items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except jax.errors.JaxRuntimeError as error:  # of another version of the interface, one day
        return f"jax {jax.__version__} refuses the handlers ({error})"
    return None
