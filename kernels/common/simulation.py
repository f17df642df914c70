"""Whether Pallas's TPU kernels run in jax's simulator of TPU memories, and how strictly."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_compiles = ContextVar("_compiles", default=False)


def is_simulating() -> bool:
    """Whether MASKGIT_PALLAS_INTERPRET=1: kernels run on the CPU, slowly, for tests."""
    wanted = os.environ.get("MASKGIT_PALLAS_INTERPRET", "0") not in ("", "0")
    return wanted and not _compiles.get()


def is_compiling() -> bool:
    """Whether kernels are traced to be compiled for a TPU that need not be here."""
    return _compiles.get()


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Kernels traced in this block are compiled, for a TPU that need not be here."""
    token = _compiles.set(True)
    try:
        yield
    finally:
        _compiles.reset(token)


def interpret_params() -> Any:
    """What `pallas_call` gets: races are looked for, memory is NaN at first, bad reads raise."""
    if not is_simulating():
        return False
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
