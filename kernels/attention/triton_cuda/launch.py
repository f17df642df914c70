"""Attention on NVIDIA GPUs: what the kernel is compiled for, its launch, and where it is the faster one."""

from __future__ import annotations

from typing import Any

import torch

from ...common.arrays import dtype_name
from ...common.backends import is_interpreting
from ...common.triton_tools import as_bytes, on
from ...common.tuning import tuned
from .kernel import AttentionSpec, attention_kernel

_LOG2E = 1.4426950408889634
LARGEST_SIZE = 256


def attention(q: Any, k: Any, v: Any, padding: Any, scale: float) -> Any:
    """(B, N, H, D) from (B, N, H, D) and twice (B, M, G, D)."""
    batch, queries, heads, size = q.shape
    if size > LARGEST_SIZE:
        raise ValueError(f"q: backend 'triton' expected D <= {LARGEST_SIZE}, got {size}")
    if q.element_size() != 2 and not is_interpreting():
        raise ValueError(f"q: backend 'triton' expected float16 or bfloat16, got {dtype_name(q)}")
    if (
        q.device.type == "cpu" and not is_interpreting()
    ):  # what is on the host goes to the first GPU
        padding = None if padding is None else padding.cuda()
        return attention(q.cuda(), k.cuda(), v.cuda(), padding, scale).cpu()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or k.shape[1] == 0:
        return out.zero_()
    tiling = tiles(q, k)
    main, rest = parts(size)
    spec = AttentionSpec(
        tiling["queries"], tiling["keys"], size, main, rest, heads // k.shape[2],
        k.shape[1] % tiling["keys"] == 0,
    )  # fmt: skip
    grid = (-(-queries // spec.queries), batch * heads)
    with on(q.device):
        attention_kernel[grid](
            q, k, v, as_bytes(padding), out, queries, k.shape[1], heads, scale * _LOG2E,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], A=spec,
            num_warps=tiling["warps"], num_stages=tiling["stages"],
        )  # fmt: skip
    return out


def parts(size: int) -> tuple[int, int]:
    """D as a power of two and what is left, each a depth that a tensor core takes; 0 for none."""
    main = max(16, 1 << (size.bit_length() - 1))
    left = max(0, size - main)
    return main, max(16, 1 << (left - 1).bit_length()) if left else 0


def tiles(q: Any, k: Any) -> dict[str, int]:
    """Rows of the two blocks, warps and stages of the pipeline."""
    wide = q.shape[3] > 96
    fields = {"queries": 64, "keys": 32 if wide else 64, "warps": 4, "stages": 2}
    fields |= _tuned(q, k)
    fields.pop("wins", None)
    return fields


def suits(q: Any, k: Any) -> bool:
    """Whether tuned data of this device says that the kernel is faster than torch's own."""
    if q.element_size() != 2 or q.shape[3] > LARGEST_SIZE:
        return False
    return bool(_tuned(q, k).get("wins", 0))


def _tuned(q: Any, k: Any) -> dict[str, int]:
    when: dict[str, str | int] = {
        "dtype": dtype_name(q), "size": str(q.shape[3]), "keys": int(k.shape[1]),
    }  # fmt: skip
    return tuned("attention", q.device, when)
