"""`maskgit bench`: the benchmarks from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from maskgit.cli.options import check_out, user_errors
from maskgit.files import atomic_write
from maskgit.report import tables
from maskgit.report.progress import Progress

from .shapes import SHAPES

app = typer.Typer(
    help="Measure kernels, correctness first.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COLUMNS = (
    "provider", "median", "p20", "p80", "GB/s", "of read", "x best", "vs usual", "memory",
)  # fmt: skip
_MANY = ("--shape", "--dtype", "--backend", "--mode")


class SpacedCommand(TyperCommand):
    """Lets an option that may be repeated take several values: `--backend cpp torch`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write `--backend cpp torch` as `--backend cpp --backend torch`."""
        spread: list[str] = []
        option, given = None, 0
        for arg in args:
            if arg.startswith("-"):
                option, given = (arg if arg in _MANY else None), 0
            elif option is not None:
                given += 1
                if given > 1:
                    spread.append(option)
            spread.append(arg)
        return list(super().parse_args(ctx, spread))


@app.callback()
def bench() -> None:
    """Measure kernels, correctness first."""


@app.command("decode-step", cls=SpacedCommand)
@user_errors
def decode_step(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="ROWSxVOCAB, BATCHxLENGTHxVOCAB or a name; several may follow."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16. [default: float32]")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Backends by name. [default: cpp torch]")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="greedy, draw, step. [default: all three]")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each provider.")] = 30,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Time budget for the samples of each provider.")
    ] = 5.0,
    eager: Annotated[bool, typer.Option(help="Measure eager torch code too.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the JSON report to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    list_shapes: Annotated[
        bool, typer.Option("--list-shapes", help="Print the named shapes and stop.")
    ] = False,
) -> None:
    """Draw, score and re-mask: this library's backends and eager torch code, side by side."""
    if list_shapes:
        _print_shapes(as_json)
        return
    from . import decode_step as benchmark
    from .providers import MODES

    check_out("--out", out)
    with Progress("bench") as bar:
        report = benchmark.run(
            shape or list(benchmark.DEFAULT_SHAPES),
            dtype or ["float32"],
            backend or benchmark.default_backends(),
            mode or list(MODES),
            samples=samples,
            seconds_each=seconds,
            eager=eager,
            with_memory=memory,
            progress=bar.tell,
            done=(lambda entry: None) if as_json else _print_entry,
        )
    text = json.dumps(report, indent=2)
    if as_json:
        typer.echo(text)
    else:
        _print_stamp(report["environment"])
    if out is not None:  # last, so that a full disk costs no measurement
        sys.stdout.flush()
        atomic_write(out, f"{text}\n".encode())
    for failure in report["failed"]:
        typer.echo(f"Error: wrong result, not timed: {failure}", err=True)
    if report["failed"]:
        raise typer.Exit(1)


def _print_shapes(as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({s.name: [s.batch, s.length, s.vocab] for s in SHAPES.values()}))
        return
    rows = [(s.name, str(s.batch), str(s.length), str(s.vocab), s.source) for s in SHAPES.values()]
    tables.show(("name", "batch", "length", "vocab", "what"), rows)


def _print_stamp(stamp: dict[str, Any]) -> None:
    tables.say(
        f"{stamp['cpu']}, {stamp['torch_threads']} threads of {stamp['logical_cpus']} CPUs, "
        f"load {stamp['load_average']}, torch {stamp['packages']['torch']}, {stamp['date']}"
    )


def _print_entry(entry: dict[str, Any]) -> None:
    """One shape, dtype and mode, as soon as it is measured."""
    s, read = entry["shape"], entry["read"]
    sizes = f"{s['batch']} x {s['length']} x {s['vocab']}"
    own = (f"read: {read['method']}", *_times(read), f"{read['gb_per_s']:.1f}", "100%")
    tables.show(
        COLUMNS,
        [*map(_cells, entry["results"]), own],
        title=f"{entry['mode']}: {s['name']} ({sizes}), {entry['dtype']}, "
        f"{entry['logits_bytes'] / 1e6:.1f} MB, {entry['cache']} cache",
        note="" if entry["memory_method"] is None else f"memory: {entry['memory_method']}",
    )
    print(flush=True)


def _times(row: dict[str, Any]) -> list[str]:
    return [_duration(row[key]) for key in ("median_us", "p20_us", "p80_us")]


def _duration(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.1f} us"
    return f"{microseconds / 1000:.2f} ms"


def _cells(row: dict[str, Any]) -> list[str]:
    name = row["provider"] + (" (usual)" if row["usual"] else "")
    if not row["passed"]:
        return [f"{name}: refused, {row['gate']}"]
    extra, speedup = row["peak_extra_bytes"], row["speedup_over_usual"]
    return [
        name,
        *_times(row),
        f"{row['gb_per_s']:.1f}",
        f"{row['share_of_read']:.0%}",
        f"{row['times_best']:.2f}",
        "" if speedup is None else f"{speedup:.1f}x",
        "" if extra is None else f"{extra / 1e6:.1f} MB",
    ]
