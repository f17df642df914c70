"""The TPU compiler on a machine without TPUs: ahead-of-time compiles, and what they say.

The `libtpu` wheel holds the real compiler; it compiles for a described topology and can write down the
final VLIW schedule of every kernel.  A bundle is one cycle.  Cycles of a kernel here are the bundles of
its schedule, each as often as the loops around it run; waiting for memory is not in them.  XLA's own
operations have an estimate by the compiler in the compiled module.  Nothing is run and nothing is timed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from maskgit.kernels.common.extras import pip_install

TOPOLOGIES = {
    "tpu-v4": "v4:2x2x1", "tpu-v5e": "v5e:2x2", "tpu-v5p": "v5p:2x2x1", "tpu-v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}  # fmt: skip
# 128 x 128 matrix units of what one program runs on: a core of a v5e, the two of a v4 or v5p together.
MATRIX_UNITS = {"tpu-v4": 8, "tpu-v5e": 4, "tpu-v5p": 8}
# Bytes a cycle from memory, the clock being that of the bfloat16 peak.  Google's figures: v4 1228 GB/s and
# 275 TFLOP/s, v5e 819 and 197, v5p 2765 and 459.
BYTES_PER_CYCLE = {
    chip: bandwidth * MATRIX_UNITS[chip] * 128 * 128 * 2 / peak
    for chip, bandwidth, peak in (
        ("tpu-v4", 1228e9, 275e12), ("tpu-v5e", 819e9, 197e12), ("tpu-v5p", 2765e9, 459e12),
    )
}  # fmt: skip
UNITS = (
    "matrix multiply", "matrix push", "cross-lane", "vector ALU", "pop", "transcendental", "load",
    "fill", "store", "spill", "scalar",
)  # fmt: skip


def why_missing() -> str | None:
    """None where the compiler is there, else what to install."""
    if importlib.util.find_spec("jax") is None or importlib.util.find_spec("libtpu") is None:
        return f"needs jax and libtpu, which holds the TPU compiler; {pip_install('tpu-compiler')}"
    return None


def prepare(dump: Path | None = None) -> None:
    """Environment of the compiler; with `dump`, it writes its schedules there.  Before its first use."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_PLATFORMS": "cpu",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    if dump is not None:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


@cache
def topology(name: str) -> Any:
    """The devices of a topology such as "v5e:4x4"."""
    prepare()
    from jax.experimental import topologies

    return topologies.get_topology_desc(name, platform="tpu")


def compiled(function: Any, arguments: Any, target: str) -> Any:
    """`function` of arrays (or shapes) compiled for one device of a target.

    Arguments and results lie row-major, as the products around would have them: alone, XLA would rather
    turn logits whose vocabulary is no multiple of 128, and copy them before the kernel.
    """
    import jax
    from jax.experimental.layout import Format, Layout
    from jax.sharding import SingleDeviceSharding
    from maskgit.kernels.common.simulation import compiling

    here = SingleDeviceSharding(topology(TOPOLOGIES[target]).devices[0])

    def formats(tree: Any) -> Any:
        return jax.tree.map(lambda a: Format(Layout(tuple(range(len(a.shape)))), here), tree)

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    with compiling():
        results = formats(jax.eval_shape(function, *shapes))
        jitted = jax.jit(function, in_shardings=formats(shapes), out_shardings=results)
        return jitted.lower(*shapes).compile()


@contextlib.contextmanager
def schedules() -> Iterator[Path]:
    """A folder into which the compiler, if not yet loaded, writes its schedules."""
    folder = Path(tempfile.mkdtemp())
    prepare(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def xla_cycles(program: Any) -> int | None:
    """XLA's estimate for its own operations in a compiled program, kernels not included.

    None where the program has no text: jax 0.10.2 cannot print some with asynchronous operations (v5p).
    """
    import jax

    try:
        text = program.as_text()
    except jax.errors.JaxRuntimeError:
        return None
    return sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text))


def memory(program: Any) -> dict[str, int]:
    """Bytes of a compiled program's arguments, results and temporaries."""
    facts = program.memory_analysis()
    return {
        "argument_bytes": facts.argument_size_in_bytes,
        "result_bytes": facts.output_size_in_bytes,
        "temporary_bytes": facts.temp_size_in_bytes,
    }


@dataclass
class Schedule:
    """The final schedule of one kernel.

    bundles: all of them; cycles: as often as they run, where nothing odd turns up in the logits;
    cycles_per_step: all of them over the grid's steps; busiest, busy: the busiest unit, and its share.
    """

    bundles: int
    cycles: int
    cycles_per_step: int
    busiest: str
    busy: float


@dataclass
class _Bundle:
    address: int
    text: str


_LINE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s[> ]*\{")
_EXIT = re.compile(
    r"%(\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?%(\w+), (\d+) /\* loop exit test"
)
_NEXT = re.compile(r"%(\w+) = sadd\.s32 (\d+), ")
_BRANCH = re.compile(r"sbr\.rel \(!?%(\w+)\) target = \$region(\d+)")


def kernel_schedules(folder: Path, name: str, steps: int, walks_again: bool) -> list[Schedule]:
    """The schedules of the kernels of that name, oldest first.

    steps: of the grid.  walks_again: whether the kernel ends with a branch that is taken for odd logits
    only, which is then not counted.
    """
    found = sorted(folder.glob(f"*{name}*-final_bundles.txt"))
    found = [path for path in found if "schedule-analysis" not in path.name]
    return [_schedule(path, steps, walks_again) for path in found]


def _schedule(path: Path, steps: int, walks_again: bool) -> Schedule:
    bundles = []
    for line in path.read_text().splitlines():
        match = _LINE.match(line)
        if match:
            bundles.append(_Bundle(int(match[1], 16), line))
    use, capacity = _utilisation(path)
    size = max(len(use), bundles[-1].address + 1)
    times = _times(bundles, size, steps, walks_again)
    cycles = sum(times)
    rows = list(zip(times, use, strict=False))
    busy = [
        sum(n * row[i] for n, row in rows) / capacity[i] / max(cycles, 1) for i in range(len(UNITS))
    ]
    best = max(range(len(UNITS)), key=lambda i: busy[i])
    return Schedule(size, cycles, round(cycles / steps), UNITS[best], round(busy[best], 3))


def _utilisation(path: Path) -> tuple[list[list[int]], list[int]]:
    """(slots that each bundle uses, slots that there are), by UNITS."""
    stem = re.sub(r"-\d+-final_bundles\.txt$", "", path.name)
    texts = sorted(path.parent.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt"))
    rows = re.findall(r"^ *\d+(?: +\d+){10} *$", texts[-1].read_text(), re.M)
    numbers = [[int(n) for n in row.split()] for row in rows]
    return numbers[1:], numbers[0]


def _loops_and_skips(bundles: list[_Bundle], size: int) -> tuple[list[Any], list[Any]]:
    """([(first bundle, last, turns)] of loops, [(first, end)] of what a branch passes over)."""
    starts = {
        region: b.address
        for b in bundles
        for region in re.findall(r"(?<!/End empty )Start region (\d+)", b.text)
    }
    ends = {
        region: b.address for b in bundles for region in re.findall(r"empty region (\d+)", b.text)
    }
    each = {name: int(n) for b in bundles for name, n in _NEXT.findall(b.text)}  # what a turn adds
    turns = {
        test: -(-int(n) // each.get(name, 1))
        for b in bundles
        for test, name, n in _EXIT.findall(b.text)
    }
    loops, skips = [], []
    for b in bundles:
        for test, region in _BRANCH.findall(b.text):
            target = starts.get(region, ends.get(region, size))
            if target > b.address:
                skips.append((b.address + 1, ends.get(region, size)))
            elif test in turns:
                loops.append((target, b.address, turns[test]))
            else:
                raise ValueError(
                    f"a loop of bundles {target} to {b.address} with no fixed number of turns"
                )
    return loops, skips


def _times(bundles: list[_Bundle], size: int, steps: int, walks_again: bool) -> list[int]:
    """How often each bundle runs; of two cores that share a grid, on the one with more of its steps.

    The grid is the outermost loop.  It is pipelined: two more turns than steps, whose bodies are passed
    over; the bundles around the body are counted as often as the body is.
    """
    times = [1] * size
    loops, skips = _loops_and_skips(bundles, size)
    if steps > 1:
        first, last, turns = max(loops, key=lambda loop: loop[1] - loop[0])
        if turns - 2 not in (steps, -(-steps // 2)):
            raise ValueError(f"a grid of {steps} steps expected, got a loop of {turns} turns")
        loops = [(a, b, turns - 2 if (a, b) == (first, last) else n) for a, b, n in loops]
    for first, last, turns in loops:
        for i in range(first, last + 1):
            times[i] *= turns
    if walks_again:
        first, end = [s for s in skips if s[1] - s[0] > size // 5][-1]
        times[first:end] = [0] * (end - first)
    return times
