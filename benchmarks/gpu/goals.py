"""What the GPU kernels are meant to reach, and what of it result files show: gpu.py's last table.

A figure is the worst of the rows that a goal speaks of; where there is none it is "not measured yet".
Goals are written down before the measurement, so a missed one stands in the table like a reached one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_LARGE = 64e6  # bytes of logits from which on a step is a matter of memory


@dataclass(frozen=True)
class Goal:
    """One figure: from which rows, and the bound that it should keep."""

    bench: str
    text: str
    bound: float
    at_least: bool
    unit: str
    pick: Callable[[Row], bool]
    value: Callable[[Row], Any]

    def figure(self, rows: Iterable[Row]) -> float | None:
        """The worst of the rows; None where there is none."""
        picked = (self.value(row) for row in rows if self.pick(row))
        found = [value for value in picked if isinstance(value, (int, float))]
        if not found:
            return None
        return min(found) if self.at_least else max(found)

    def cells(self, rows: Iterable[Row]) -> list[str]:
        """Of a Markdown row: the benchmark, the figure's name, the goal, what was measured."""
        sign = ">=" if self.at_least else "<="
        figure = self.figure(rows)
        if figure is None:
            measured = "not measured yet"
        else:
            reached = figure >= self.bound if self.at_least else figure <= self.bound
            measured = f"{figure:.3g} {self.unit}".strip() + ("" if reached else " (missed)")
        return [self.bench, self.text, f"{sign} {self.bound:g} {self.unit}".strip(), measured]


def ratio(row: Row, *peers: str) -> float | None:
    """The fastest of the peers over ours; None where none was timed."""
    times = [row[name] for name in peers if isinstance(row.get(name), float)]
    return min(times) / row["maskgit"] if times else None


def together(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows, those that a goal sets against another row joined with it."""
    joined = {name: [dict(row) for row in some] for name, some in rows.items()}
    greedy = {
        (tuple(row["shape"]), row["dtype"]): row["maskgit"]
        for row in joined.get("step", [])
        if row["mode"] == "greedy"
    }
    for row in joined.get("step", []):
        row["greedy"] = greedy.get((tuple(row["shape"]), row["dtype"]))
    whole = {row["rows"]: row["maskgit"] for row in joined.get("head", []) if row["masked"] == 1.0}
    for row in joined.get("head", []):
        row["whole"] = whole.get(row["rows"])
    tokens = joined.get("tokens", [])
    differing, positions = (
        sum(row[n] for row in tokens) for n in ("candidate_tokens", "positions")
    )
    for row in tokens:
        row["of_all"] = differing / positions
    return joined


def _large(row: Row, mode: str) -> bool:
    return bool(row["mode"] == mode and row["bytes"] >= _LARGE)


def _drawn(row: Row) -> bool:
    return bool(row["mode"] == "draw" and row["dtype"] == "bfloat16" and row["shape"][1] >= 8192)


def _head(rows: int, share: float = 1.0) -> Callable[[Row], bool]:
    return lambda row: bool(row["rows"] == rows and row["masked"] == share)


def _run(batch: int, tokens: int) -> Callable[[Row], bool]:
    return lambda row: bool(row["batch"] == batch and row["tokens"] == tokens)


_STEP = [
    Goal("step", "greedy + score, 64 MB of logits and more, cold: share of a copy's rate", 0.88, True, "",
         lambda row: _large(row, "greedy"), lambda row: row["share_of_copy"]),
    Goal("step", "draw + score over greedy + score, V >= 8192, bfloat16", 1.10, False, "x",
         _drawn, lambda row: row["greedy"] and row["maskgit"] / row["greedy"]),
    Goal("step", "flashinfer's sampling_from_logits over draw + score, bfloat16", 4.0, True, "x",
         _drawn, lambda row: ratio(row, "flashinfer")),
    Goal("step", "torch.compile over draw + score, bfloat16", 3.0, True, "x",
         _drawn, lambda row: ratio(row, "compiled")),
    Goal("step", "LLaDA's float64 draw over draw + score, bfloat16", 40.0, True, "x",
         _drawn, lambda row: ratio(row, "float64 Gumbel")),
    Goal("step", "extra memory with what is returned, V >= 8192, share of the logits", 0.01, False, "",
         lambda row: row["bytes"] >= _LARGE and row["shape"][1] >= 8192, lambda row: row["extra_share"]),
]  # fmt: skip
_GRAPH = [
    Goal("graph", "a step of 1 x 256 x 1024 in a graph", 6.0, False, "us",
         lambda row: row["shape"] == [1, 256, 1024], lambda row: row["maskgit"] * 1e6),
    Goal("graph", "a step of 1 x 32 x 152064 in a graph", 8.0, False, "us",
         lambda row: row["shape"] == [1, 32, 152064], lambda row: row["maskgit"] * 1e6),
    Goal("graph", "kernels a step", 2, False, "", lambda row: True, lambda row: row["kernels"]),
]  # fmt: skip
_HEAD = [
    Goal("head", "32 rows: share of the time to read the weight", 0.90, True, "",
         _head(32), lambda row: row["share_of_weight_read"]),
    Goal("head", "32 rows: product and the best sampler over ours", 1.15, True, "x",
         _head(32), lambda row: ratio(row, "product and our step", "product and eager sampler")),
    Goal("head", "4096 rows, the draw included", 600.0, True, "TFLOP/s",
         _head(4096), lambda row: row["tflops"]),
    Goal("head", "any rows: product and our own step over ours", 1.0, True, "x",
         lambda row: row["masked"] == 1.0, lambda row: ratio(row, "product and our step")),
    Goal("head", "4096 rows: extra memory", 60.0, False, "MB",
         _head(4096), lambda row: row["extra_bytes"] / 1e6),
    Goal("head", "4096 rows, half of them masked, over all of them", 0.55, False, "x",
         _head(4096, 0.5), lambda row: row["whole"] and row["maskgit"] / row["whole"]),
]  # fmt: skip
_TORCH = ("flash", "cudnn", "efficient", "torch")
_ATTENTION = [
    Goal("attention", f"N {n}, head {size}: the best of torch's backends over auto", 0.97, True, "x",
         lambda row, n=n, size=size: row["length"] == n and row["size"] == size,  # type: ignore[misc]
         lambda row: ratio(row | {"maskgit": row["auto"]}, *_TORCH))
    for n in (257, 1025) for size in (48, 96)
]  # fmt: skip
_MASKGIT = [
    Goal("maskgit", "256 tokens, 8 steps, batch 1, one graph", 4.5, False, "ms",
         _run(1, 256), lambda row: row["maskgit"] * 1e3),
    Goal("maskgit", "the same: eager bfloat16 over ours", 4.0, True, "x",
         _run(1, 256), lambda row: ratio(row, "eager")),
    Goal("maskgit", "256 tokens, 8 steps, batch 64", 90.0, False, "ms",
         _run(64, 256), lambda row: row["maskgit"] * 1e3),
    Goal("maskgit", "1024 tokens, 12 steps, batch 1", 12.0, False, "ms",
         _run(1, 1024), lambda row: row["maskgit"] * 1e3),
]  # fmt: skip
_TOKENS = [
    Goal("tokens", "candidates that the CPU draws otherwise from the same seed, of 10,000", 5.0, False, "",
         lambda row: True, lambda row: 1e4 * row["of_all"]),
]  # fmt: skip
GOALS = [*_STEP, *_GRAPH, *_HEAD, *_ATTENTION, *_MASKGIT, *_TOKENS]


def read(folder: Path) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """(rows by benchmark, the machine) of a result folder; nothing where there is none."""
    names = sorted({goal.bench for goal in GOALS})
    reports = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in names
        if (folder / f"{name}.json").is_file()
    }
    machine: dict[str, Any] = next(iter(reports.values()), {})
    about = {key: value for key, value in machine.items() if key != "rows"}
    return {name: report["rows"] for name, report in reports.items()}, about


def table(folder: Path) -> str:
    """All goals and what the folder's files show, in Markdown."""
    rows, about = read(folder)
    rows = together(rows)
    lines = ["| benchmark | figure | goal | measured |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(goal.cells(rows.get(goal.bench, [])))} |" for goal in GOALS]
    if about:
        lines += ["", ", ".join(f"{key} {value}" for key, value in about.items()) + "."]
    return "\n".join(lines) + "\n"
