"""Which tile sizes, warps and stages are the fastest on this GPU: writes kernels/<op>/tuned/<device>.json.

    make gpu-tune                 or: python benchmarks/gpu/main.py --only tune-step tune-head tune-attention

Each case is timed with every choice of a short list, our defaults among them; what wins is an entry of the
device's file (kernels/common/tuning.py reads them).  Attention's entries also say whether ours beats torch's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .benches import Row, attempt
from .timing import Bench

Choice = dict[str, int]
STEP_CHOICES: list[Choice] = [  # at most as many logits a thread as by default: other rules keep more of each
    {"leaves": leaves, "warps": warps, "registers": registers}
    for leaves, warps, registers in (
        (64, 4, 168), (64, 4, 255), (32, 4, 168), (32, 2, 168), (64, 8, 168), (128, 8, 168), (16, 2, 168),
        (16, 1, 168), (128, 16, 128), (32, 8, 128),
    )
]  # fmt: skip
_LOGITS_A_THREAD = {"bfloat16": 64, "float32": 32}
STEP_PROGRAMS: list[Choice] = [{"programs": n} for n in (2, 3, 4, 6, 8)]
HEAD_CHOICES: dict[str, list[Choice]] = {  # with 128 registers two programs run at once
    regime: [{}, *(
        {"rows": rows, "depth": depth, "warps": warps, "stages": stages, "registers": most, "pair": pair}
        for rows, depth, warps, stages, most, pair in choices
    )]
    for regime, choices in (
        ("few", (
            (32, 64, 4, 4, 255, 0), (32, 128, 4, 3, 255, 0), (32, 128, 8, 3, 255, 0), (32, 64, 8, 5, 255, 0),
            (16, 128, 4, 4, 255, 0), (64, 64, 8, 4, 255, 0), (32, 64, 8, 3, 128, 0),
        )),
        ("many", (
            (128, 64, 8, 4, 255, 1), (128, 32, 8, 4, 255, 1), (128, 64, 8, 3, 255, 0),
            (128, 64, 8, 3, 128, 0), (128, 64, 4, 3, 255, 0), (64, 64, 4, 4, 255, 1), (256, 64, 8, 3, 255, 0),
        )),
    )
}  # fmt: skip
HEAD_PROGRAMS = (1, 2, 3)  # for a multiprocessor
ATTENTION_CHOICES: list[Choice] = [
    {"queries": q, "keys": k, "warps": w, "stages": s}
    for q, k, w, s in (
        (64, 64, 4, 2), (64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2), (128, 64, 8, 3),
        (128, 128, 8, 2),
    )
]  # fmt: skip


def best_of(
    bench: Bench, op: str, choices: list[Choice], call: Callable[[int], Any]
) -> tuple[float, Choice, Row]:
    """(seconds, choice, seconds or message of each) of the fastest choice; RuntimeError without one."""
    from maskgit.kernels.common.tuning import forced

    found: Row = {}
    for choice in bench.some(choices):
        with forced(op, choice):
            found[json.dumps(choice)] = attempt(lambda: bench.seconds(call, 0.08))
    timed = {name: taken for name, taken in found.items() if isinstance(taken, float)}
    if not timed:
        raise RuntimeError(f"{op}: no choice runs: {found}")
    name = min(timed, key=lambda n: timed[n])
    if timed.get("{}", 1e9) < 1.02 * timed[name]:  # noise is no reason to leave the defaults
        name = "{}"
    return timed[name], json.loads(name), found


def tune_step(bench: Bench) -> Iterator[Row]:
    """Tiles of the decode step for each dtype and width, then how far few rows are split."""
    import torch

    import maskgit

    seeds = torch.tensor([1], device=bench.device)
    rule = maskgit.StepRule(score="prob")
    for dtype in ("bfloat16", "float32"):
        for rows, vocab in bench.some(((65536, 1024), (8192, 8192), (1024, 50304), (512, 126464))):
            if bench.is_over():
                return
            vocab = bench.size(vocab, 300)
            inputs = bench.inputs(1, bench.size(rows, 4), vocab, dtype=dtype)
            few = bench.inputs(1, bench.size(32, 2), vocab, dtype=dtype)

            def many_rows(i: int) -> Any:
                return maskgit.sample_tokens(inputs[i % len(inputs)], rule=rule, seeds=seeds)

            def few_rows(i: int) -> Any:
                return maskgit.sample_tokens(few[i % len(few)], rule=rule, seeds=seeds)

            most = _LOGITS_A_THREAD[dtype]
            fit = [c for c in STEP_CHOICES if 4 * c["leaves"] <= most * c["warps"]]
            best, use, times = best_of(bench, "decode_step", [{}, *fit], many_rows)
            splits = [use | programs for programs in STEP_PROGRAMS]
            _, use, more = best_of(bench, "decode_step", splits, few_rows)
            yield {
                "when": {"dtype": dtype, "leaves": -(-vocab // 128)}, "use": use, "seconds": best,
                "times": times, "times of 32 rows": more,
            }  # fmt: skip


def tune_head(bench: Bench) -> Iterator[Row]:
    """Tiles of the fused head for each number of rows."""
    import torch
    from maskgit.kernels.common.triton_tools import multiprocessors

    import maskgit

    width, vocab = bench.size(4096, 32), bench.size(126464, 300)
    weight = bench.rand(vocab, width, scale=0.02)
    options = {"rule": maskgit.StepRule(score="prob"), "mask_token_id": vocab, "step": 0,
               "num_steps": 2, "seeds": torch.tensor([1], device=bench.device)}  # fmt: skip
    each = multiprocessors(torch.device(bench.device))
    for rows in bench.some((16, 32, 64, 256, 1024, 4096)):
        if bench.is_over():
            return
        rows = bench.size(rows, 4)
        hidden = bench.rand(1, rows, width)
        tokens = torch.full((1, rows), vocab, device=bench.device)

        def call(i: int) -> Any:
            return maskgit.decode_step_from_hidden(hidden, weight, tokens, **options)

        regime = "few" if rows <= 64 else "many"
        _, use, times = best_of(bench, "head_sample", HEAD_CHOICES[regime], call)
        programs = [use | {"programs": n * each} for n in HEAD_PROGRAMS]
        best, use, more = best_of(bench, "head_sample", programs, call)
        yield {
            "when": {"dtype": "bfloat16", "regime": regime, "rows": rows, "width": width}, "use": use,
            "seconds": best, "times": times | more,
        }  # fmt: skip


def tune_attention(bench: Bench) -> Iterator[Row]:
    """Blocks of attention for each length and size, and whether ours wins over torch's."""
    from maskgit.kernels.attention.triton_cuda import launch as triton_cuda

    import maskgit

    dtype = "float32" if bench.device == "cpu" else "bfloat16"
    for length in bench.some((257, 1025, 577, 64, 4096)):
        for size in (48, 96, 64, 72, 128)[: bench.size(5, 1)]:
            if bench.is_over():
                return
            n, heads = bench.size(length, 17), 768 // size
            batch = 1 if bench.smoke else max(1, 16384 // n)
            q, k, v = bench.rand(batch, n, 3, heads, size, dtype=dtype).unbind(2)

            def call(i: int) -> Any:
                return triton_cuda.attention(q, k, v, None, size**-0.5)

            best, use, times = best_of(bench, "attention", ATTENTION_CHOICES, call)
            peer = bench.seconds(lambda i: maskgit.attention(q, k, v, backend="torch"), 0.08)
            for kind in ("bfloat16", "float16"):
                yield {
                    "when": {"dtype": kind, "size": str(size), "keys": n},
                    "use": use | {"wins": int(best < 0.97 * peer)}, "seconds": best, "torch": peer,
                    "times": times,
                }  # fmt: skip


def write(op: str, device_name: str, rows: list[Row], into: Path) -> Path:
    """The device's file of an op under `into`, from the rows, an entry a line."""
    path = into / op / "tuned" / f"{device_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"when": row["when"], "use": row["use"]}) for row in rows]
    part = path.with_suffix(".part")
    part.write_text("[\n " + ",\n ".join(lines) + "\n]\n")
    part.replace(path)
    return path


TUNERS: dict[str, tuple[str, Callable[[Bench], Iterator[Row]]]] = {
    "tune-attention": ("attention", tune_attention),
    "tune-step": ("decode_step", tune_step),
    "tune-head": ("head_sample", tune_head),
}


class Sharded(Bench):
    """Compiles its share of the choices and times nothing: so the processes of a machine share the work."""

    def __init__(self, device: str, number: int, processes: int) -> None:
        super().__init__(device, False, time.monotonic() + 60)
        self._number, self._processes, self._turn = number, processes, 0

    def inputs(self, *shape: int, dtype: str) -> list[Any]:
        """One of them, which all are compiled for alike."""
        return [self.rand(*shape, dtype=dtype)]

    def samples(self, call: Callable[[int], Any], budget: float = 0.0) -> list[float]:
        """One call, if it is this process's turn."""
        self._turn += 1
        if self._turn % self._processes == self._number:
            call(0)
        return [float(self._turn)]
