"""How gpu.py times: the device's own seconds, cold caches, and the ceilings of the same minute."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

_FASTEST_CLOCK = 2.1e9  # cycles a second, more than any of today's: rather too long a sleep


class Bench:
    """What the benchmarks share: the device, sizes, inputs, timing.

    `smoke` is toy sizes, wherever it runs; `until` is the time.monotonic() at which to stop.
    """

    def __init__(self, device: str, smoke: bool, until: float) -> None:
        self.device, self.smoke, self.until = device, smoke, until

    def size(self, real: int, toy: int) -> int:
        """The real size, or a toy for --smoke."""
        return toy if self.smoke else real

    def some(self, cases: Sequence[Any]) -> Sequence[Any]:
        """All cases, or the first for --smoke."""
        return cases[:1] if self.smoke else cases

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.until

    def rand(self, *shape: int, dtype: str = "bfloat16", scale: float = 1.0) -> Any:
        """Normal numbers."""
        import torch

        return (torch.randn(shape, device=self.device) * scale).to(getattr(torch, dtype))

    def inputs(self, *shape: int, dtype: str) -> list[Any]:
        """Logits that are read in turn, so many that each has left the L2 cache when it comes again."""
        first = self.rand(*shape, dtype=dtype, scale=2.0)
        size = first.numel() * first.element_size()
        copies = 1 if self.smoke else max(2, min(256, int(3 * self.cache_bytes() // size) + 1))
        return [first, *(first.roll(i + 1, -1) for i in range(copies - 1))]

    def cache_bytes(self) -> int:
        """The size of the L2 cache; 60 MB where torch does not know it."""
        import torch

        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 60_000_000))

    def seconds(self, call: Callable[[int], Any], budget: float = 0.25) -> float:
        """Median device seconds of one of call(0), call(1), ... run back to back."""
        return statistics.median(self.samples(call, budget))

    def samples(self, call: Callable[[int], Any], budget: float = 0.25) -> list[float]:
        """Device seconds of one call, each a mean over a round of them.

        The device sleeps until the host has queued the round: launches and Python take no part.
        """
        import torch

        if self.device == "cpu":
            return [self.latency(call, 1)]
        call(0), call(1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(0)
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        done = time.perf_counter() - start
        count = int(max(2, min(20, 0.03 / done)))
        cycles = int(_FASTEST_CLOCK * (1.5 * count * queued + 5e-4))
        times: list[float] = []
        until, turn = time.monotonic() + budget, 0
        while len(times) < 5 or (time.monotonic() < until and len(times) < 100):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            begin.record()
            for i in range(turn, turn + count):
                call(i)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / count)
            turn += count
        return times

    def latency(self, call: Callable[[int], Any], samples: int = 7) -> float:
        """Median seconds from a call to its result, the host's share included; one sample is a cold one."""
        import torch

        def wait() -> None:
            if self.device == "cuda":
                torch.cuda.synchronize()

        if samples > 1:
            call(0)
        times = []
        for i in range(samples):
            wait()
            start = time.perf_counter()
            call(i)
            wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def graphed(self, call: Callable[[], Any]) -> Callable[[int], Any]:
        """The call as a CUDA graph's replay."""
        import torch

        if self.device == "cpu":
            return lambda i: call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(), call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return lambda i: graph.replay()

    def num_kernels(self, call: Callable[[int], Any]) -> int | None:
        """Kernels and copies that one call puts on the device; None on a CPU."""
        import torch

        if self.device == "cpu":
            return None
        call(0)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(1)
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        # none: the profiler does not see this device
        return len([event for event in profile.events() if event.device_type == cuda]) or None

    def copy_rate(self) -> float:
        """Bytes a second of a large copy, read and written."""
        import torch

        x = torch.empty(self.size(1 << 29, 1 << 20), dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        return 2.0 * int(x.numel()) / self.seconds(lambda i: y.copy_(x))

    def product_rate(self) -> float:
        """Floating-point operations a second of a large bfloat16 product."""
        n = self.size(8192, 64)
        x, y = self.rand(n, n), self.rand(n, n)
        return 2.0 * n**3 / self.seconds(lambda i: x @ y)

    def peak_bytes(self, call: Callable[[int], Any]) -> int:
        """Extra memory at the worst moment of a call."""
        import torch

        if self.device == "cpu":
            return 0
        call(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(1)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)


def machine(device: str) -> dict[str, Any]:
    """What a figure needs beside it: device, clocks, driver, versions."""
    import torch

    if device == "cpu":
        return {"device": "cpu", "torch": torch.__version__}
    query = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"],
            capture_output=True, text=True, check=False, timeout=20,
        ).stdout.strip().split(", ")  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        told = []
    found = dict(zip(query.split(",")[1:], told[1:], strict=False))
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cuda": torch.version.cuda, **found,
    }  # fmt: skip
