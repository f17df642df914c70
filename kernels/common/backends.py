"""Which backend runs a call: the one table, the one resolver.

A backend asked for by name runs or raises with the reason and the legal names; only "auto" chooses,
and the environment variable MASKGIT_BACKEND speaks to "auto" alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from . import ffi
from .arrays import is_on_host, is_traced
from .extras import DISTRIBUTION
from .names import unknown
from .simulation import is_compiling, is_simulating


def _needs(package: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        try:
            found = importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):
            found = False
        return None if found else f"the package {package} is not installed"

    return probe


def _cpp() -> str | None:
    try:
        from maskgit import _C  # noqa: F401
    except ImportError as error:
        return (
            f"the C++ extension was not built ({error}); install a C++17 compiler and pybind11, "
            f"then reinstall {DISTRIBUTION}"
        )
    return None


def is_interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _triton() -> str | None:
    missing = _needs("torch")() or _needs("triton")()
    if missing is not None or is_interpreting():
        return missing
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _wide() -> str | None:
    import jax

    if jax.config.read("jax_enable_x64"):
        return "it has no 64-bit types, which are enabled (jax_enable_x64)"
    return None


def _has_tpu() -> bool:
    import jax

    return bool(jax.default_backend() == "tpu")


def _pallas() -> str | None:
    missing = _needs("jax")() or _wide()
    if missing is not None or is_simulating() or is_compiling():
        return missing
    if _has_tpu():
        return None
    return (
        "jax finds no TPU (MASKGIT_PALLAS_INTERPRET=1 runs the kernels in a simulator, for tests)"
    )


class Backend(NamedTuple):
    """Why it cannot run here (None where it can), whose arrays it computes in, its module for each op.

    derives: its kernels find out by themselves what follows from the inputs of a step (inputs.complete).
    """

    why_missing: Callable[[], str | None]
    arrays: str
    modules: dict[str, str]  # below kernels/
    derives: bool = False


def _in_folder(folder: str) -> dict[str, str]:
    return {op: f"{op}.{folder}" for op in ("decode_step", "head_sample", "attention")}


BACKENDS = {
    "triton": Backend(_triton, "torch", _in_folder("triton_cuda.launch"), derives=True),
    "pallas": Backend(
        _pallas,
        "jax",
        _in_folder("pallas_tpu.launch") | {"attention": "attention.pallas_tpu"},
        derives=True,
    ),
    "cpp": Backend(_cpp, "numpy", {"decode_step": "decode_step.cpu.launch"}),
    "torch": Backend(
        _needs("torch"),
        "torch",
        {"decode_step": "decode_step.plain.torch_ref", "attention": "attention.torch_ref"},
    ),
    "jax": Backend(
        _needs("jax"),
        "jax",
        {"decode_step": "decode_step.plain.jax_ref", "attention": "attention.jax_ref"},
    ),
    "reference": Backend(
        lambda: None,
        "numpy",
        {"decode_step": "decode_step.reference", "attention": "attention.reference"},
    ),
}


@cache
def module_of(op: str, backend: str) -> ModuleType:
    """The module of a backend for an op, where `choose` has found it able to run."""
    return importlib.import_module(f"..{BACKENDS[backend].modules[op]}", __package__)


TRACED = "a traced array"  # stands for its device


def device_of(x: Any) -> str:
    """The device of an array by name, "cpu" for all on the host."""
    if is_on_host(x):
        return "cpu"
    return TRACED if is_traced(x) else str(getattr(x, "device", TRACED))


# What "auto" tries, in order, by (array kind, device type).
_AUTO = {
    ("torch", "cpu"): ("cpp", "torch"),
    ("torch", "cuda"): ("triton", "torch"),
    ("torch", "other"): ("torch",),
    ("jax", "cpu"): ("cpp", "jax"),
    ("jax", "tpu"): ("pallas", "jax"),
    ("jax", "other"): ("jax",),
    ("numpy", "cpu"): ("cpp", "reference"),
}


@cache
def _probed(name: str) -> str | None:
    return BACKENDS[name].why_missing()


def why_missing(name: str) -> str | None:
    """None where the backend can run in this process, else the reason."""
    return _pallas() if name == "pallas" else _probed(name)


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None where it can run, else the reason why it cannot.

    This imports and starts torch and jax where they are installed, since only they know their devices.
    Nothing else here does: a call asks for the backend it names, or those that "auto" tries for its arrays.
    """
    return {name: why_missing(name) for name in BACKENDS}


def serves_jax() -> bool:
    """Whether the C++ core can be called from jitted JAX programs."""
    return _can("cpp", "jax")


def _can(name: str, kind: str) -> bool:
    return _why_not(name, kind) is None


def _why_not(name: str, kind: str) -> str | None:
    """None where the backend can run on arrays of that kind, else the reason."""
    reason = why_missing(name)
    return ffi.why_missing() if reason is None and name == "cpp" and kind == "jax" else reason


def _in_jax_on_cpu(kind: str, device: str) -> bool:
    """Whether a traced jax array is going to be on the CPU, where the C++ core serves it."""
    if kind != "jax" or device != TRACED or not serves_jax():
        return False
    import jax

    return bool(jax.default_backend() == "cpu") and not is_compiling()


@cache
def _say_slower(first: str, chosen: str, kind: str) -> None:
    """Warn, once for each case, that auto has to do without its first choice."""
    warnings.warn(
        f"backend: 'auto' takes {chosen!r} for {kind} arrays, which is much slower, since {first!r} cannot "
        f"run: {_why_not(first, kind)}; ask for {chosen!r} by name, or set MASKGIT_BACKEND, to hear no more",
        RuntimeWarning,
        stacklevel=2,
    )


def _able(names: tuple[str, ...], kind: str, device: str) -> str:
    """Those of the names that can run, and the reference where there are values, for a message."""
    able = [name for name in names if _can(name, kind)]
    return ", ".join(dict.fromkeys(able if device == TRACED else [*able, "reference"]))


def check_name(backend: str) -> str:
    """`backend` if it is a legal name, else ValueError."""
    if isinstance(backend, str) and (backend == "auto" or backend in BACKENDS):
        return backend
    raise ValueError(unknown("backend", ("auto", *BACKENDS), backend))


def check_able(backend: str) -> str:
    """`backend` if it can run in this process ("auto" can), else ValueError; asks for that one alone."""
    reason = why_missing(backend) if check_name(backend) != "auto" else None
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot run: {reason}")
    return backend


def choose(
    backend: str, kind: str, device: str, op: str = "decode_step", converts: bool = True
) -> str:
    """The name of the backend of an op for arrays of `kind` on a `device` type.

    converts: whether the op takes arrays of one library to a backend of another; the reference gets
    NumPy's in any case.  The environment speaks to the decode step.

    Raises:
        ValueError: unknown name, or a backend that cannot run here or on these arrays, or has no such op.
    """
    check_name(backend)
    place = "cpu" if device == "cpu" else "other"
    if kind == "torch" and device.startswith("cuda"):
        place = "cuda"
    if kind == "jax" and place == "other" and _has_tpu():
        place = "tpu"
    if _in_jax_on_cpu(kind, device):
        place = "cpu"
    names = tuple(name for name in _AUTO[kind, place] if op in BACKENDS[name].modules)
    if backend == "auto":
        forced = os.environ.get("MASKGIT_BACKEND", "auto") if op == "decode_step" else "auto"
        if forced not in ("", "auto"):
            if forced not in BACKENDS:
                raise ValueError(unknown("MASKGIT_BACKEND", ("auto", *BACKENDS), forced))
            return choose(forced, kind, device)
        chosen = next(name for name in names if _can(name, kind))
        if chosen != names[0]:
            _say_slower(names[0], chosen, kind)
        return chosen
    reason = f"it has no {op}" if op not in BACKENDS[backend].modules else why_missing(backend)
    arrays = BACKENDS[backend].arrays
    if reason is None and not converts and backend != "reference" and arrays != kind:
        reason = f"it works on {arrays} arrays, not on {kind}"
    if reason is None and backend == "cpp" and place != "cpu":
        reason = f"it works on CPU arrays, not on {device}"
    if reason is None and kind == "jax" and device == TRACED and backend in ("torch", "reference"):
        reason = f"it works on arrays with values, not on {device}"
    if reason is not None:
        raise ValueError(
            f"backend: {backend!r} cannot run: {reason}; available: {_able(names, kind, device)}"
        )
    return backend
