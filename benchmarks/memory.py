"""Peak extra memory of each provider, from the kernel's high-water mark in a process of its own.

Run as `python -m maskgit.benchmarks.memory`: reads one JSON request from stdin, writes one JSON
object {provider: bytes} to stdout.  Linux only: it resets VmHWM through /proc/self/clear_refs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

METHOD = "VmHWM - VmRSS of a second call in a fresh process"
# Blocks from 64 KiB on are mapped and unmapped singly, so that freed memory leaves the process.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_bytes(
    shape: str, dtype: str, mode: str, backends: list[str], threads: int, timeout: float = 600
) -> dict[str, int] | None:
    """Extra bytes at the peak of one call, by provider; None where it cannot be measured."""
    request = {"shape": shape, "dtype": dtype, "mode": mode, "backends": backends}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "maskgit.benchmarks.memory"],
            input=json.dumps(request | {"threads": threads}),
            env=os.environ | _MALLOC,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=True,
        )
        result: dict[str, int] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        return None
    return result


def _status(key: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def main() -> None:
    """Answer the request on stdin."""
    import torch

    from .providers import make_inputs, providers
    from .shapes import parse_shape

    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    inputs = make_inputs(parse_shape(request["shape"]), request["dtype"])[0]
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    peaks = {}
    for provider in providers(request["mode"], request["backends"]):
        try:
            call = provider.prepare(inputs)
            call()  # loads and compiles what the first call needs
            gc.collect()
            trim(0)
            before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            call()
            peaks[provider.name] = max(_status("VmHWM") - before, 0)
        except Exception as error:  # the gate has reported it
            print(f"{provider.name}: {error}", file=sys.stderr)
    json.dump(peaks, sys.stdout)


if __name__ == "__main__":
    main()
