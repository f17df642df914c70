"""How many threads the C++ core uses, and that they are torch's where torch is loaded."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path


def num_threads() -> int:
    """Threads to use: torch's number where torch is loaded, MASKGIT_NUM_THREADS, all CPUs."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        _share_threads_with_torch()
        return int(torch.get_num_threads())
    setting = os.environ.get("MASKGIT_NUM_THREADS", "")
    if setting:
        if not setting.isdigit() or not 1 <= int(setting) <= 1024:
            raise ValueError(f"MASKGIT_NUM_THREADS: expected 1 to 1024, got {setting!r}")
        return int(setting)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _share_threads_with_torch() -> None:
    """Let the core run on the threads of the OpenMP runtime that torch brought, where it is found."""
    if is_forked():
        return
    try:
        from maskgit import _C
    except ImportError:
        return
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    names = ("libgomp", "libiomp5", "libomp")
    paths = {line.split(maxsplit=5)[-1] for line in maps if any(name in line for name in names)}
    for path in sorted(paths, key=lambda p: "torch" not in p)[:1]:
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            return
        _C.use_openmp(ctypes.cast(function, ctypes.c_void_p).value or 0)


def is_forked() -> bool:
    """Whether this process was forked and has not called exec since, whatever was imported when.

    OpenMP's threads stay with the parent, and a call in the child would wait for them for ever.  Linux
    keeps it among the flags of a process (PF_FORKNOEXEC); elsewhere the threads are not shared.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return bool(int(fields[6]) & 0x40)
