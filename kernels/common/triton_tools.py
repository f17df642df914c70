"""What the Triton kernels of all ops share: small functions of the language, and what a launch needs."""

# mypy: ignore-errors

import contextlib
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .backends import is_interpreting

BIG = tl.constexpr(2147483647)
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
INTERPRETED = tl.constexpr(is_interpreting())


@triton.jit
def scalar(value, kind: tl.constexpr):
    """A number that was passed to the kernel, in the dtype `kind`."""
    return tl.full((), value, kind)


@triton.jit
def spread(values, leaves: tl.constexpr):
    """[rows] -> [rows * leaves], each row's value for all its leaves."""
    rows: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, None], [rows, leaves]), [rows * leaves])


@triton.jit
def by_row(values, leaves: tl.constexpr):
    """[rows * leaves] -> [rows, leaves]."""
    return tl.reshape(values, [values.shape[0] // leaves, leaves])


@triton.jit
def rounded_to(x, kind: tl.constexpr):
    """Float32 `x` rounded to the dtype `kind`; in the interpreter, which truncates, by its bits."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, up.to(tl.float32, bitcast=True), x)
    else:
        return x.to(kind).to(tl.float32)


def on(device: torch.device) -> Any:
    """The device's own stream and context; nothing in the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def options(warps: int, registers: int) -> dict[str, int]:
    """How to compile: left alone, ptxas spills a few bytes to fit one more program.

    With more registers than a multiprocessor's 65536 hold for the warps of one a kernel cannot start.
    """
    limit = {"maxnreg": min(registers, 2048 // warps)} if torch.version.hip is None else {}
    return {"num_warps": warps} | limit


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; an H100's for tensors without memory."""
    if device.type != "cuda":  # the interpreter is the fastest with few large programs
        return 132 if device.type == "meta" else 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def as_bytes(x: torch.Tensor | None) -> torch.Tensor | None:
    """A bool tensor as a kernel reads it."""
    return None if x is None else x.contiguous().view(torch.uint8)


def flat(x: torch.Tensor | None) -> torch.Tensor | None:
    """A small tensor without gaps."""
    return None if x is None else x.contiguous()
