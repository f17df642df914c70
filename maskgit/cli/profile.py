"""The `maskgit profile` command: what the compilers of GPUs and TPUs make of the kernels, on any machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Annotated, Any

import typer

from maskgit.cli import options as common
from maskgit.kernels.common.extras import pip_install
from maskgit.kernels.common.names import unknown
from maskgit.report import tables

OPS = ("decode-step", "head", "attention")
GPU_OPS = (*OPS, "residual-norm")
DTYPES = ("bfloat16", "float16", "float32")
TPUS = ("tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu7x")
LABEL = "from the compiler's schedule, not a run"
COLUMNS = {
    "kernel": "kernel", "for": "for", "target": "target", "registers": "regs", "spill_bytes": "spills",
    "shared_bytes": "shared", "instructions_per_logit": "instr/logit", "budget": "budget",
}  # fmt: skip


TPU_COLUMNS = {
    "version": "version", "for": "for", "target": "target", "cycles": "cycles",
    "cycles_per_step": "cycles/step", "compute_per_memory": "compute/memory", "busiest": "busiest",
    "busy": "busy", "bytes_per_logit_byte": "bytes/logit byte", "temporary_bytes": "temporaries",
    "block_bytes": "VMEM", "fewer_cycles_than_plain": "vs plain jnp",
}  # fmt: skip


@common.user_errors
def profile(
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="sm_80, sm_90, sm_100, gfx942, tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e, tpu7x. "
            "[default: sm_90]",
        ),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op", help="decode-step, head, attention, for GPUs residual-norm. [default: all]"
        ),
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option("--rule", help="Rules by preset name. [default: maskgit]")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            help="A name or BATCHxLENGTHxVOCAB. [default: amused-512, for TPUs maskgit-256]",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help=f"{', '.join(DTYPES)}. [default: bfloat16]")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            help="Of a step on GPUs: seeds, guided, injected, sample-tokens. [default: seeds]",
        ),
    ] = None,
    width: Annotated[
        int,
        typer.Option(
            "--width", parser=common.whole, metavar="N", help="Hidden size of heads and norms."
        ),
    ] = 4096,
    head_size: Annotated[
        list[int] | None, typer.Option("--head-size", help="Of attention. [default: 64]")
    ] = None,
    as_json: common.JsonOption = False,
) -> None:
    """Compile kernels for GPUs and TPUs that need not be here, and print what the compiler says.

    GPUs: registers, spills, instructions for a logit.  TPUs: cycles of the final schedule, memory,
    bytes, beside XLA's estimate for the same step in plain jax.numpy.
    """
    for name, sizes in (("width", [width]), ("head-size", head_size or [])):
        if min(sizes, default=1) < 1:
            raise ValueError(f"{name}: expected a size of at least 1, got {min(sizes)}")
    wanted = target or ["sm_90"]
    tpus = [name for name in wanted if name.startswith("tpu")]
    if tpus:
        if len(tpus) < len(wanted):
            raise ValueError(f"target: expected GPUs or TPUs in one call, got {', '.join(wanted)}")
        if variant and variant != ["seeds"]:
            raise ValueError(f"variant: expected seeds for TPUs, got {', '.join(variant)}")
        _profile_tpus(
            tpus, _legal("op", op or list(OPS), OPS), rule or ["maskgit"], shape or ["maskgit-256"],
            _legal("dtype", dtype or ["bfloat16"], ("bfloat16", "float32")), width, head_size or [64],
            as_json,
        )  # fmt: skip
        return
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None:
        raise ImportError(f"profile: needs torch and triton; {pip_install('profile')}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET: expected unset, since kernels are compiled, not run")
    from maskgit.benchmarks.compiler.triton_profile import TARGETS, VARIANTS, budget, compiled

    targets = _legal("target", wanted, (*TARGETS, *TPUS))
    ops = _legal("op", op or list(GPU_OPS), GPU_OPS)
    if variant and "decode-step" not in ops:
        raise ValueError(f"variant: expected with op decode-step, got {', '.join(ops)}")
    found = []
    for labels, launch in _launches(
        ops, rule or ["maskgit"], shape or ["amused-512"],
        _legal("dtype", dtype or ["bfloat16"], DTYPES), width, head_size or [64],
        _legal("variant", variant or ["seeds"], VARIANTS),
    ):  # fmt: skip
        for name in targets:
            facts = labels | compiled(launch, name)
            if "instructions_per_logit" in facts:
                facts["budget"] = budget(launch)
            found.append(facts)
    if not found:
        raise ValueError(
            "op: expected float16 or bfloat16 for attention, a rule that the head fuses, or with "
            "--variant sample-tokens a score that is computed from logits"
        )
    if as_json:
        about = {"from": "the compiler, not a run", "triton": version("triton")}
        common.print_json(about | {"kernels": found})
        return
    for facts in found:
        facts["for"] = " ".join(facts[name] for name in ("rule", "shape", "dtype"))
        if facts.get("variant", "seeds") != "seeds":
            facts["for"] += f" {facts['variant']}"
    _print_table("from the compiler, not a run", COLUMNS, found)


def _profile_tpus(
    targets: list[str], ops: list[str], rules: list[str], shapes: list[str], dtypes: list[str],
    width: int, head_sizes: list[int], as_json: bool,
) -> None:  # fmt: skip
    """The TPU compiler's view; the compiler is loaded once it knows where to write its schedules."""
    from maskgit import StepRule
    from maskgit.benchmarks.compiler import tpu_compiler
    from maskgit.benchmarks.shapes import parse_shape

    reason = tpu_compiler.why_missing()
    if reason is not None:
        raise ValueError(f"profile: {reason}")
    _legal("target", targets, TPUS)
    chosen = [StepRule.preset(name) for name in _names(rules)]
    sizes = [parse_shape(text) for text in shapes]
    found: list[dict[str, Any]] = []
    with tpu_compiler.schedules() as folder:
        from maskgit.benchmarks.compiler import tpu_profile

        for call in tpu_profile.calls(ops, chosen, sizes, dtypes, width, head_sizes):
            for name in targets:
                found += _accepted(call, name, folder)
    if not found:
        raise ValueError("op: expected another op, or a rule that the head fuses")
    if as_json:
        about = {"from": LABEL, "jax": version("jax"), "libtpu": version("libtpu")}
        common.print_json(about | {"kernels": found})
        return
    for facts in found:
        facts["for"] = " ".join(facts[n] for n in ("op", "rule", "shape", "dtype"))
    _print_table(LABEL, TPU_COLUMNS, found)


def _accepted(call: Any, target: str, folder: Any) -> list[dict[str, Any]]:
    """What a call finds; ValueError with the compiler's first line where it refuses."""
    import jax

    try:
        found: list[dict[str, Any]] = call(target, folder)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"shape: the compiler for {target} refuses: {str(error).splitlines()[0]}"
        ) from error
    return found


def _names(rules: list[str]) -> list[str]:
    from maskgit import StepRule

    return list(StepRule.presets()) if rules == ["all"] else rules


def _print_table(title: str, columns: dict[str, str], found: list[dict[str, Any]]) -> None:
    cells = [[facts.get(key) for key in columns] for facts in found]
    rows = [["-" if cell is None else str(cell) for cell in row] for row in cells]
    tables.show(list(columns.values()), rows, title=title)


def _legal(name: str, given: list[str], legal: tuple[str, ...]) -> list[str]:
    for one in given:
        if one not in legal:
            raise ValueError(unknown(name, legal, one))
    return given


def _launches(
    ops: list[str], rules: list[str], shapes: list[str], dtypes: list[str], width: int,
    head_sizes: list[int], variants: list[str],
) -> Iterator[tuple[dict[str, Any], Any]]:  # fmt: skip
    """(what it is, a recorded launch), each kernel once for what it is compiled for."""
    from maskgit import StepRule
    from maskgit.benchmarks.compiler import triton_profile as triton
    from maskgit.benchmarks.shapes import parse_shape

    names = _names(rules)
    sizes = [parse_shape(text) for text in shapes]
    seen = set()
    for dtype in dtypes:
        calls: list[tuple[dict[str, Any], list[Any]]] = []
        for name in names:
            rule = StepRule.preset(name)
            for shape in sizes:
                labels = {"rule": name, "shape": shape.name, "dtype": dtype}
                for variant in variants if "decode-step" in ops else []:
                    made = triton.step_launches(rule, shape, dtype, variant)
                    calls.append(({"op": "decode-step", "variant": variant} | labels, made))
                if "head" in ops:
                    made = triton.head_launches(rule, shape.rows, width, shape.vocab, dtype)
                    calls.append(({"op": "head"} | labels, made))
        for size in head_sizes if "attention" in ops and dtype != "float32" else []:
            for padded in (False, True):
                labels = {"op": "attention", "rule": "-", "dtype": dtype}
                labels["shape"] = f"257x{size}" + (", padding" if padded else "")
                calls.append((labels, triton.attention_launches(257, size, dtype, padded=padded)))
        if "residual-norm" in ops:
            labels = {"op": "residual-norm", "rule": "-", "dtype": dtype, "shape": str(width)}
            calls.append((labels, triton.norm_launches(width, dtype)))
        for labels, made in calls:
            for launch in made:
                if launch.key not in seen:
                    seen.add(launch.key)
                    yield labels, launch
