"""What this machine and installation can do, for `maskgit env` and for benchmark stamps."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from .._version import __version__
from ..kernels.common import ffi
from ..kernels.common.backends import available_backends, why_missing

_PACKAGES = ("numpy", "torch", "triton", "jax", "jaxlib", "libtpu", "safetensors", "scikit-learn")
_VARIABLES = ("MASKGIT_BACKEND", "MASKGIT_CPU_ISA", "MASKGIT_NUM_THREADS", "MASKGIT_CHECK")
_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "asimd", "sve")


def collect() -> dict[str, Any]:
    """`facts`, and the backends with the reason why each missing one is missing: starts torch and jax."""
    backends = {name: _yes_or(reason) for name, reason in available_backends().items()}
    report = facts() | {"backends": backends}
    report["cpp"]["in_jitted_jax"] = _yes_or(ffi.why_missing())
    return report


def _yes_or(reason: str | None) -> dict[str, Any]:
    return {"available": reason is None, "reason": reason}


def facts() -> dict[str, Any]:
    """Versions, CPU, GPU, threads, the C++ core: what the stamp of a figure needs."""
    from ..kernels.decode_step.cpu.threads import num_threads

    return {
        "maskgit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_features": _cpu_flags(),
        "threads": num_threads(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "gpu": _gpu(),
        "cpp": _cpp(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    present = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [flag for flag in _FLAGS if flag in present]


def _cpp() -> dict[str, Any]:
    """Whether the C++ core was built, its instruction sets that run here, and the one in use."""
    reason = why_missing("cpp")
    if reason is not None:
        return {"extension": _yes_or(reason), "supported": [], "active": None}
    from maskgit import _C

    built = {"extension": _yes_or(None), "supported": _C.supported_implementations()}
    try:
        return built | {"active": _C.active_implementation()}
    except ValueError as error:  # a wrong MASKGIT_CPU_ISA
        return built | {"active": None, "error": str(error)}


def _gpu() -> str | None:
    """Name of the first GPU, asked only of a torch that is already installed."""
    if _version("torch") is None:
        return None
    try:
        import torch
    except ImportError as error:
        return f"torch does not import: {error}"
    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
