"""Benchmark of the decode step and of its first half: gate, interleaved timing, report."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from maskgit.kernels.common.backends import BACKENDS, check_able, why_missing
from maskgit.kernels.common.names import unknown

from maskgit.report.environment import facts

from . import gate, memory
from .providers import MODES, RULES, Inputs, Provider, make_inputs, providers
from .shapes import ITEM_SIZES, Shape, parse_shape
from .timing import Timing, interleave

SCHEMA = 1
DEFAULT_SHAPES = ("maskgit-256", "64x126464")
_MOST_INPUT_BYTES = 2**30


def default_backends() -> list[str]:
    """The backends that people would choose among on this machine's CPU."""
    return [name for name in ("cpp", "torch") if why_missing(name) is None]


def check_backends(names: list[str]) -> list[str]:
    """`names`, each once, or ValueError for one that is unknown or cannot run here."""
    for name in names:
        if name not in BACKENDS:
            raise ValueError(unknown("backend", BACKENDS, name))
        check_able(name)
    return list(dict.fromkeys(names))


def check_choices(what: str, names: list[str], legal: tuple[str, ...]) -> list[str]:
    """`names`, each once, or ValueError for one that is not `legal`."""
    for name in names:
        if name not in legal:
            raise ValueError(unknown(what, legal, name))
    return list(dict.fromkeys(names))


def run(
    shapes: list[str],
    dtypes: list[str],
    backends: list[str],
    modes: list[str],
    *,
    samples: int = 30,
    seconds_each: float = 5.0,
    eager: bool = True,
    with_memory: bool = True,
    progress: Callable[[str], None] = lambda _: None,
    done: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure every combination; the report as plain data, `failed` naming what the gate refused.

    `progress` is told what is being done, `done` is given each entry of `runs` as soon as it is there.

    Raises:
        ValueError: a bad shape, dtype, backend or mode, or inputs that do not fit in memory.
    """
    wanted = [parse_shape(shape) for shape in shapes]
    check_choices("dtype", dtypes, tuple(ITEM_SIZES))
    check_choices("mode", modes, MODES)
    check_backends(backends)
    for shape, dtype in ((s, d) for s in wanted for d in dtypes):
        if shape.num_bytes(dtype) > _free_memory() // 3:
            raise ValueError(
                f"shape: {shape} in {dtype} takes {shape.num_bytes(dtype) / 1e9:.1f} GB of "
                f"{_free_memory() / 1e9:.1f} GB free memory; expected at most a third"
            )
    runs = []
    for shape, dtype in ((s, d) for s in wanted for d in dtypes):
        progress(f"{shape} {dtype}: inputs")
        copies = _num_copies(shape.num_bytes(dtype))
        inputs = make_inputs(shape, dtype, copies)
        for mode in modes:
            entry = _measure(mode, shape, dtype, inputs, backends, samples, seconds_each, eager,
                             with_memory, progress)  # fmt: skip
            runs.append(entry)
            done(entry)
        del inputs
    failed = [
        f"{e['shape']['name']} {e['dtype']} {e['mode']} {row['provider']}: {row['gate']}"
        for e in runs
        for row in e["results"]
        if row["kind"] == "maskgit" and not row["passed"]
    ]
    return {
        "schema": SCHEMA,
        "benchmark": "decode-step",
        "environment": environment(),
        "runs": runs,
        "failed": failed,
    }


def environment() -> dict[str, Any]:
    """Date, machine, versions and load: the stamp without which a figure means nothing."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **facts(),
        "logical_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "last_level_cache_bytes": _last_level_cache(),
    }


def _measure(
    mode: str,
    shape: Shape,
    dtype: str,
    inputs: list[Inputs],
    backends: list[str],
    samples: int,
    seconds_each: float,
    eager: bool,
    with_memory: bool,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """One shape, dtype and mode: the gate, then the providers that passed it against the clock."""
    label = f"{shape} {dtype} {mode}"
    candidates = providers(mode, backends, eager)
    verdicts = {}
    for provider in candidates:
        progress(f"{label}: checking {provider.name}")
        verdicts[provider.name] = gate.check(provider, mode, inputs[0])
    passed = [p for p in candidates if verdicts[p.name].passed]
    calls = _readers(inputs) | {p.name: _rotating(p, inputs) for p in passed}
    timings = interleave(
        calls,
        samples=samples,
        seconds_each=seconds_each,
        progress=lambda what: progress(f"{label}: {what}"),
    )
    size = shape.num_bytes(dtype)
    read = min((n for n in timings if n.startswith("read: ")), key=lambda n: timings[n].median)
    peaks = None
    if with_memory:
        progress(f"{label}: memory")
        peaks = memory.peak_bytes(
            f"{shape.batch}x{shape.length}x{shape.vocab}", dtype, mode, backends,
            torch.get_num_threads(),
        )  # fmt: skip
    best = min((timings[p.name].median for p in passed), default=None)
    usual = next((timings[p.name].median for p in passed if p.usual), None)
    results = []
    for provider in candidates:
        verdict = verdicts[provider.name]
        row = {
            "provider": provider.name,
            "kind": "eager" if provider.backend is None else "maskgit",
            "usual": provider.usual,
            "passed": verdict.passed,
            "gate": verdict.detail,
            "rows_checked": verdict.rows,
            "near_ties": verdict.near_ties,
        }
        if verdict.passed:
            timing = timings[provider.name]
            row |= _figures(timing, size) | {
                "share_of_read": timings[read].median / timing.median,
                "times_best": timing.median / best if best else None,
                "speedup_over_usual": usual / timing.median if usual else None,
                "peak_extra_bytes": (peaks or {}).get(provider.name),
            }
        results.append(row)
    total = size * len(inputs)
    return {
        "mode": mode,
        "shape": {"name": shape.name, "batch": shape.batch, "length": shape.length,
                  "vocab": shape.vocab, "source": shape.source},
        "dtype": dtype,
        "rule": RULES[mode].name,
        "logits_bytes": size,
        "input_copies": len(inputs),
        "cache": "cold" if total >= 2 * _last_level_cache() else "warm",
        "read": {"method": read.removeprefix("read: ")} | _figures(timings[read], size),
        "memory_method": memory.METHOD if peaks else None,
        "results": results,
    }  # fmt: skip


def _figures(timing: Timing, size: int) -> dict[str, Any]:
    return {
        "median_us": timing.median * 1e6,
        "p20_us": timing.quantile(0.2) * 1e6,
        "p80_us": timing.quantile(0.8) * 1e6,
        "gb_per_s": size / timing.median / 1e9,
        "samples": len(timing.samples),
        "calls_per_sample": timing.calls_per_sample,
    }


def _rotating(provider: Provider, inputs: list[Inputs]) -> Callable[[int], Any]:
    calls = [provider.prepare(x) for x in inputs]
    return lambda i: calls[i % len(calls)]()


def _readers(inputs: list[Inputs]) -> dict[str, Callable[[int], Any]]:
    """Plain reductions of the same bytes, seen as float32: the fastest is the ceiling.

    Two 16-bit floats seen as one float32 are an ordinary number (the second one its exponent), so
    that no slow subnormals occur.
    """
    flat = [x.logits.view(-1) for x in inputs]
    if flat[0].element_size() == 2:
        flat = [f[: f.numel() // 2 * 2].view(torch.float32) for f in flat]
    arrays = [f.numpy() for f in flat]
    count = len(flat)
    return {
        "read: torch.sum": lambda i: flat[i % count].sum(),
        "read: torch.amax": lambda i: flat[i % count].amax(),
        "read: numpy.sum": lambda i: arrays[i % count].sum(),
    }


def _num_copies(size: int) -> int:
    """How many inputs to rotate so that none is in the cache when its turn comes again."""
    wanted = -(-2 * _last_level_cache() // size) + 1
    most = max(1, min(_MOST_INPUT_BYTES, _free_memory() // 4) // size)
    return max(1, min(wanted, most, 256))


def _last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    found = [path.read_text().strip() for path in caches.glob("*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    known = [int(text[:-1]) * units[text[-1]] for text in found if text[-1:] in units]
    return max(known or sizes)


def _free_memory() -> int:
    """Bytes that can be allocated without swapping; 4 GiB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30
