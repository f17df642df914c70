"""Result files to Markdown: the tables in README.md and docs/ come from here and nowhere else.

    python -m maskgit.benchmarks.report           # writes the tables between their markers
    python -m maskgit.benchmarks.report --check   # exit code 1 where a document is out of date

A table stands between `<!-- table: KIND FOLDER -->` and `<!-- end -->`; its figures are those of
benchmarks/results/FOLDER/KIND.json; kind "gpu" is made of all files of a folder (gpu/goals.py).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .gpu import goals
from .shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/benchmarking.md", "docs/tpu.md")
_MARKED = re.compile(r"(<!-- table: (\w+) ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def decode_step_table(report: dict[str, Any], backend: str = "cpp") -> str:
    """One row per shape, dtype and mode: ours, the usual and the best eager spelling, the ceiling."""
    lines = [
        f"| shape | dtype | mode | {backend} | usual eager | ratio | best eager | ratio | share of a read |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in report["runs"]:
        rows = {row["provider"]: row for row in run["results"] if row["passed"]}
        ours = rows.get(f"maskgit {backend}")
        eager = [row for row in rows.values() if row["kind"] == "eager"]
        if ours is None or not eager:
            continue
        best = min(eager, key=lambda row: row["median_us"])
        usual = next((row for row in eager if row["usual"]), best)
        cells = [f"{run['shape']['batch'] * run['shape']['length']} x {run['shape']['vocab']}"]
        cells += [run["dtype"], run["mode"], _time(ours), f"{usual['provider']} {_time(usual)}"]
        cells += [_ratio(usual, ours), f"{best['provider']} {_time(best)}", _ratio(best, ours)]
        cells += [f"{100 * ours['share_of_read']:.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    env = report["environment"]
    versions = ", ".join(
        f"{n} {v}" for n, v in env["packages"].items() if v and n in ("torch", "numpy")
    )
    lines += [
        "",
        f"{env['cpu']}, {env['torch_threads']} threads, {versions}, {env['cpp']['active']}; "
        f"median of interleaved rounds, {env['date'][:10]}.",
    ]
    return "\n".join(lines) + "\n"


def digits_table(report: dict[str, Any]) -> str:
    """One row per number of steps, as `maskgit evaluate --json` gave it."""
    lines = [
        "| images | read as the asked class | CAS | Frechet distance | precision | recall |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        shares = [f"{100 * row[key]:.1f} %" for key in ("accuracy", "cas", "precision", "recall")]
        cells = [row["name"], *shares[:2], f"{row['frechet']:.2f}", *shares[2:]]
        lines.append(f"| {' | '.join(cells)} |")
    count = 10 * report["per_class"]
    lines += [
        "",
        f"{count} images a row, seed {report['seed']}, `{report['command']}`. The classifier reads "
        f"{100 * report['classifier_test_accuracy']:.1f} % of held-out real digits right. CAS: a classifier "
        "trained on the images, tested on real digits.",
    ]
    return "\n".join(lines) + "\n"


def llada_loop_table(report: dict[str, Any]) -> str:
    """One row per loop, as `python -m maskgit.benchmarks.loops.llada` gave it; MDLM's where measured."""
    lines = ["| loop | seconds | times faster | extra MB |", "|---|---|---|---|"]
    slow = report["seconds"]["published loop"]
    for name, seconds in report["seconds"].items():
        cells = [name, f"{seconds:.2f}", f"{slow / seconds:.1f}x"]
        lines.append(f"| {' | '.join(cells)} | {report['extra_bytes'][name] / 1e6:.0f} |")
    chance = report.get("positions_first")
    if chance is not None:
        slow = chance["seconds_all_logits"]
        for name, seconds in (("all logits", slow), ("positions first", chance["seconds"])):
            cells = [f"rule {chance['rule']}, {name}", f"{seconds:.2f}", f"{slow / seconds:.1f}x"]
            lines.append(f"| {' | '.join(cells)} | - |")
    given = ", ".join(f"{key} {value:g}" for key, value in report["settings"].items())
    lines += [
        "",
        f"Batch {report['batch']}, width {report['width']}, {report['dtype']}, {given}; "
        f"{report['threads']} threads, torch {report['torch']}; at temperature 0 "
        f"{100 * report['same_tokens_greedy']:.0f} % of the tokens are the same.",
    ]
    return "\n".join(lines) + "\n"


def tpu_table(report: dict[str, Any]) -> str:
    """Cycles of the fused step, the head and attention, and of the plain step beside it."""
    lines = [
        "| chip | rule | shape (B x N x V) | dtype | cycles | plain jnp | times fewer | compute / memory "
        "| busiest unit | bytes / logits | temporaries |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    same = ("target", "rule", "shape", "dtype")
    plain = {tuple(k[n] for n in same): k for k in report["kernels"] if k["version"] == "plain jnp"}
    fused = [k for k in report["kernels"] if k["version"] == "fused"]
    for kernel in fused:
        if kernel["op"] != "decode-step":
            continue
        other, shape = plain[tuple(kernel[n] for n in same)], SHAPES[kernel["shape"]]
        lines.append(
            f"| {kernel['target']} | {kernel['rule']} | {shape.batch} x {shape.length} x {shape.vocab} "
            f"| {kernel['dtype']} | {kernel['cycles']:,} | {_count(other['cycles'])} "
            f"| {kernel.get('fewer_cycles_than_plain', '-')} | {kernel.get('compute_per_memory', '-')} "
            f"| {kernel['busiest']} {100 * kernel['busy']:.0f} % "
            f"| {kernel['bytes_per_logit_byte']:.3f} (plain {other['bytes_per_logit_byte']:.1f}) "
            f"| {kernel['temporary_bytes'] / 1e6:.1f} MB (plain {other['temporary_bytes'] / 1e6:.1f}) |"
        )
    lines += [
        "",
        "| op | shape | dtype | cycles | share of the matrix units' peak | compute / memory |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in fused:
        if kernel["op"] == "decode-step":
            continue
        share = kernel.get("peak_share") or kernel["product_cycles"] / kernel["cycles"]
        lines.append(
            f"| {kernel['op']} | {kernel['shape']} | {kernel['dtype']} | {kernel['cycles']:,} "
            f"| {100 * share:.0f} % | {kernel['compute_per_memory']:.2f} |"
        )
    about = f"jax {report['jax']}, libtpu {report['libtpu']}; step 3 of 8, from the compiler's schedule."
    return "\n".join([*lines, "", f"{about} Head and attention: tpu-v5e."]) + "\n"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "tpu": tpu_table,
    "decode_step": decode_step_table,
    "plain_torch": partial(decode_step_table, backend="torch"),
    "digits": digits_table,
    "llada_loop": llada_loop_table,
}


def _time(row: dict[str, Any]) -> str:
    return f"{row['median_us'] / 1e3:.2f} ms"


def _ratio(other: dict[str, Any], ours: dict[str, Any]) -> str:
    ratio = other["median_us"] / ours["median_us"]
    return f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def render(text: str) -> str:
    """`text` with each marked table made anew from its result file."""

    def table(match: re.Match[str]) -> str:
        if match[2] == "gpu":
            return match[1] + goals.table(RESULTS / match[3]) + match[4]
        path = RESULTS / match[3] / f"{match[2]}.json"
        return match[1] + TABLES[match[2]](json.loads(path.read_text())) + match[4]

    return _MARKED.sub(table, text)


def main(arguments: list[str]) -> int:
    """Write or check all documents; the exit code."""
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text()
        after = render(before)
        if before == after:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(after)
    if stale:
        verb = "out of date" if "--check" in arguments else "written"
        print(f"{verb}: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
