"""The `maskgit audit` command, and the array files it reads."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from maskgit.cli import options as common
from maskgit.report import tables

SUFFIXES = (".npy", ".npz", ".safetensors")
MAX_HEADER = 100_000_000  # bytes, as the safetensors format says
_SAFETENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


@common.user_errors
def audit(
    logits: Annotated[
        Path,
        typer.Option("--logits", metavar="FILE", help=".npy, .npz or .safetensors, (B, N, V)."),
    ],
    rule: Annotated[str, typer.Option("--rule", help="Decode rule by preset name.")],
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens",
            metavar="FILE",
            help="(B, N) ids. [default: the array tokens beside the logits, or all masked]",
        ),
    ] = None,
    mask_token_id: Annotated[
        int | None,
        typer.Option(
            "--mask-token-id", parser=common.whole, metavar="N", help="Needed with tokens."
        ),
    ] = None,
    step: Annotated[
        int, typer.Option("--step", parser=common.whole, metavar="N", help="Step, from 0.")
    ] = 0,
    steps: Annotated[
        int, typer.Option("--steps", parser=common.whole, metavar="N", help="Decode steps in all.")
    ] = 8,
    guidance: common.GuidanceOption = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="What the logits were computed in. [default: the file's]"),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", parser=common.whole, metavar="N", help="Ties to list.")
    ] = 5,
    as_json: common.JsonOption = False,
) -> None:
    """Name the places where two right implementations of a step may differ because of a tie.

    Reads the arrays logits, and where they are there tokens, uncond_logits (with --guidance), scores
    and num_commit (for rules that are given them) and eligible.
    """
    common.check_range("--limit", limit, 0)
    common.check_range("--steps", steps, 1)
    common.check_range("--step", step, 0, steps - 1)
    _check_rule(rule)
    arrays = read_arrays(logits)
    values, stored = _pick(arrays, "logits", logits)
    if tokens is not None:
        arrays["tokens"] = _pick(read_arrays(tokens), "tokens", tokens)
    from maskgit.audit import audit_ties

    def optional(name: str) -> Any:
        return _batched(arrays[name][0], values.ndim, name) if name in arrays else None

    if (guidance is not None) != ("uncond_logits" in arrays):
        raise ValueError(
            f"--guidance: expected exactly where {logits} has uncond_logits, got {guidance}"
        )
    report = audit_ties(
        _batched(values, values.ndim, "logits"),
        optional("tokens"),
        rule=rule,
        mask_token_id=mask_token_id,
        step=step,
        num_steps=steps,
        uncond_logits=optional("uncond_logits"),
        guidance_scale=guidance,
        eligible=optional("eligible"),
        scores=optional("scores"),
        num_commit=arrays["num_commit"][0] if "num_commit" in arrays else None,
        dtype=dtype or stored,
    )
    if as_json:
        common.print_json(report.as_dict(limit))
        return
    _print(report, limit)


def _check_rule(name: str) -> None:
    from maskgit import StepRule

    try:
        StepRule.preset(name)
    except ValueError as error:
        raise common.bad("--rule", str(error)) from error


def _print(report: Any, limit: int) -> None:
    """The report for people: a table of ties, or one line that there are none."""
    tables.say(
        f"{report.rule}, step {report.step} of {report.num_steps}, {report.rows} rows of "
        f"{report.dtype} logits: {len(report.logits)} ties of logits, {len(report.probs)} of "
        f"probabilities, {len(report.cuts)} at the cut"
    )
    if report.is_clean or not limit:
        return
    rows = []
    for tie in (*report.logits[:limit], *report.probs[:limit]):
        place = f"sequence {tie.sequence}, position {tie.position}"
        tied = f"ids {_some(tie.tokens)} ({tie.count})"
        convention = f"lowest {tie.lowest}, highest {tie.highest}"
        rows.append((tie.what, tie.kind, place, tied, convention))
    for tie in report.cuts[:limit]:
        commits = ", ".join(f"{name} {_some(where)}" for name, where in tie.commits.items())
        positions = f"positions {_some(tie.positions)} ({len(tie.positions)})"
        rows.append(("cut", tie.kind, f"sequence {tie.sequence}", positions, commits))
    tables.show(("what", "kind", "where", "tied", "by convention"), rows)


def _some(numbers: tuple[int, ...], most: int = 6) -> str:
    more = " ..." if len(numbers) > most else ""
    return "[" + " ".join(str(n) for n in numbers[:most]) + more + "]"


def _batched(array: Any, logits_ndim: int, name: str) -> Any:
    """Arrays of one sequence, beside (N, V) logits, as a batch of one."""
    return array[None] if logits_ndim == 2 and name != "num_commit" else array


def _pick(arrays: dict[str, tuple[Any, str]], name: str, path: Path) -> tuple[Any, str]:
    """The array of that name, or the only one of a file that names none."""
    if name in arrays:
        return arrays[name]
    if set(arrays) == {""}:
        return arrays[""]
    raise ValueError(f"{path}: expected an array {name!r}, got {', '.join(arrays) or 'none'}")


# What a damaged file can raise on its way through NumPy, zip and JSON.
_UNREADABLE = (
    ValueError, KeyError, TypeError, AttributeError, EOFError, OverflowError, MemoryError,
    RecursionError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_arrays(path: Path) -> dict[str, tuple[Any, str]]:
    """The arrays of a .npy (under the name ""), .npz or .safetensors file, each with its dtype's name.

    bfloat16 is returned as float32.  Nothing is unpickled.

    Raises:
        OSError: no such file.  ValueError: another kind of file, or a damaged one.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file {', '.join(SUFFIXES)}, got {path.suffix!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"": _named(found)}
        with found as file:
            return {name: _named(file[name]) for name in file.files}
    except _UNREADABLE as error:
        raise ValueError(f"{path}: not a readable {path.suffix} file ({error})") from error


def _named(array: Any) -> tuple[Any, str]:
    """An array and its dtype; two opaque bytes are what NumPy makes of bfloat16."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return _from_bfloat16(array.view(np.uint16)), "bfloat16"
    return array, str(array.dtype)


def _from_bfloat16(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _read_safetensors(path: Path) -> dict[str, tuple[Any, str]]:
    """Every tensor: 8 bytes with the header's length, the header in JSON, the data."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(MAX_HEADER, path.stat().st_size - 8):
            raise ValueError(f"{path}: not a readable .safetensors file (header of {size} bytes)")
        try:
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            data = file.read()
            return {name: _tensor(entry, data) for name, entry in header.items()}
        except _UNREADABLE as error:
            raise ValueError(f"{path}: not a readable .safetensors file ({error})") from error


def _tensor(entry: dict[str, Any], data: bytes) -> tuple[Any, str]:
    """One tensor of a safetensors header."""
    name, shape = entry["dtype"], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if name not in _SAFETENSORS:
        raise ValueError(f"dtype {name}")
    kind = np.dtype(_SAFETENSORS[name])
    if not 0 <= start <= stop <= len(data) or stop - start != math.prod(shape) * kind.itemsize:
        raise ValueError(f"offsets {start} to {stop} for shape {shape}, {len(data)} bytes of data")
    array = np.frombuffer(data[start:stop], kind).reshape(shape)
    return (_from_bfloat16(array), "bfloat16") if name == "BF16" else (array, str(kind))
