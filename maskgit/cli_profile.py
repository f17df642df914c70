"""The `maskgit profile` command: what a GPU's compiler makes of the kernels, on any machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from maskgit import cli_common as common

OPS = ("decode-step", "head", "attention")
DTYPES = ("bfloat16", "float16", "float32")
COLUMNS = {
    "kernel": "kernel", "for": "for", "target": "target", "registers": "regs", "spill_bytes": "spills",
    "shared_bytes": "shared", "instructions_per_logit": "instr/logit", "budget": "budget",
}  # fmt: skip


@common.user_errors
def profile(
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="sm_80, sm_90, sm_100, gfx942. [default: sm_90]"),
    ] = None,
    op: Annotated[
        list[str] | None, typer.Option("--op", help="decode-step, head, attention. [default: all]")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option("--rule", help="Rules by preset name. [default: maskgit]")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", help="A name or BATCHxLENGTHxVOCAB. [default: amused-512]"),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help=f"{', '.join(DTYPES)}. [default: bfloat16]")
    ] = None,
    width: Annotated[
        int, typer.Option("--width", parser=common.whole, metavar="N", help="Hidden size of heads.")
    ] = 4096,
    head_size: Annotated[
        list[int] | None, typer.Option("--head-size", help="Of attention. [default: 64]")
    ] = None,
    as_json: common.JsonOption = False,
) -> None:
    """Compile kernels for GPUs that need not be here: registers, spills, instructions for a logit."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None:
        raise ValueError("profile: needs torch and triton; pip install torch triton")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET: expected unset, since kernels are compiled, not run")
    from maskgit.benchmarks.profile_triton import BUDGET, TARGETS, compiled

    targets = _legal("target", target or ["sm_90"], TARGETS)
    found = []
    for labels, launch in _launches(
        _legal("op", op or list(OPS), OPS), rule or ["maskgit"], shape or ["amused-512"],
        _legal("dtype", dtype or ["bfloat16"], DTYPES), width, head_size or [64],
    ):  # fmt: skip
        for name in targets:
            facts = labels | compiled(launch, name)
            if "instructions_per_logit" in facts:
                facts["budget"] = BUDGET[4 if labels["dtype"] == "float32" else 2]
            found.append(facts)
    if not found:
        raise ValueError(
            "op: expected float16 or bfloat16 for attention, or a rule that the head fuses"
        )
    if as_json:
        about = {"from": "the compiler, not a run", "triton": version("triton")}
        common.print_json(about | {"kernels": found})
        return
    table = Table(box=None, title="from the compiler, not a run", title_justify="left")
    for column in COLUMNS.values():
        table.add_column(column, overflow="fold")
    for facts in found:
        facts["for"] = " ".join(facts[name] for name in ("rule", "shape", "dtype"))
        table.add_row(*(str(facts.get(key, "-")) for key in COLUMNS))
    Console(highlight=False).print(table)


def _legal(name: str, given: list[str], legal: tuple[str, ...]) -> list[str]:
    for one in given:
        if one not in legal:
            raise ValueError(f"{name}: expected {', '.join(legal)}, got {one!r}")
    return given


def _launches(
    ops: list[str], rules: list[str], shapes: list[str], dtypes: list[str], width: int,
    head_sizes: list[int],
) -> Iterator[tuple[dict[str, Any], Any]]:  # fmt: skip
    """(what it is, a recorded launch), each kernel once for what it is compiled for."""
    from maskgit import StepRule
    from maskgit.benchmarks import profile_triton as triton
    from maskgit.benchmarks.shapes import parse_shape

    names = list(StepRule.presets()) if rules == ["all"] else rules
    sizes = [parse_shape(text) for text in shapes]
    seen = set()
    for dtype in dtypes:
        calls: list[tuple[dict[str, Any], list[Any]]] = []
        for name in names:
            rule = StepRule.preset(name)
            for shape in sizes:
                labels = {"rule": name, "shape": shape.name, "dtype": dtype}
                if "decode-step" in ops:
                    made = triton.step_launches(rule, shape, dtype)
                    calls.append(({"op": "decode-step"} | labels, made))
                if "head" in ops:
                    made = triton.head_launches(rule, shape.rows, width, shape.vocab, dtype)
                    calls.append(({"op": "head"} | labels, made))
        for size in head_sizes if "attention" in ops and dtype != "float32" else []:
            for padded in (False, True):
                labels = {"op": "attention", "rule": "-", "dtype": dtype}
                labels["shape"] = f"257x{size}" + (", padding" if padded else "")
                calls.append((labels, triton.attention_launches(257, size, dtype, padded=padded)))
        for labels, made in calls:
            for launch in made:
                if launch.key not in seen:
                    seen.add(launch.key)
                    yield labels, launch
