"""LayerNorm of a sum in Triton: a program takes a row, reads it once and writes it once.

For rows x and r (D,), weight w and bias c:

    s = x + r,  m = mean(s),  v = mean((s - m)^2),  out = (s - m) / sqrt(v + eps) w + c

On chip: s in float32, D / threads numbers each.  So the sum is not rounded to 16 bits before its mean is
taken, and the variance is of differences from the mean, not of squares.  Bytes: 3 D a row, against 5 D
for an addition and a LayerNorm, and one launch instead of two, which is what counts for few rows.

Limits: D <= 16384, 32 numbers a thread.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from ..common.triton_tools import on, rounded_to

LARGEST_WIDTH = 1 << 14


@triton.jit
def norm_kernel(
    x, residual, weight, bias, out, stride_x, stride_residual, width, eps, block: tl.constexpr
):
    """Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    s = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    s += tl.load(residual + row * stride_residual + column, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, s - tl.sum(s, 0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    y = rounded_to(centred * scale * w + c, out.dtype.element_ty)
    tl.store(out + row * width + column, y.to(out.dtype.element_ty), mask=inside)


def residual_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm(x + residual), (..., D), all of one dtype."""
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = out.numel() // width
    if rows == 0:
        return out
    a, b = (
        t if t.stride(-1) == 1 else t.contiguous()
        for t in (x.reshape(rows, width), residual.reshape(rows, width))
    )
    block = triton.next_power_of_2(width)
    with on(x.device):
        norm_kernel[(rows,)](
            a, b, weight.contiguous(), bias.contiguous(), out, a.stride(0), b.stride(0), width, eps,
            block=block, num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
    return out
