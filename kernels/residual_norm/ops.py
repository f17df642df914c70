"""`residual_norm` as a `torch.library` op, and the way to a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..common.backends import why_missing
from ..common.torch_op import TorchOp


def residual_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm(x + residual) over the last axis, without gradients.

    Args:
        x, residual: (..., D) of one shape, floating point.
        weight, bias: (D,).
        eps: added to the variance.

    Returns:
        (..., D), contiguous, in the dtype of x + residual.  On a GPU, where all four have one dtype, one
        Triton kernel, which keeps the sum in float32; elsewhere torch's addition and layer_norm.

    Source: arXiv 1607.06450; eps and the biased variance as in torch.nn.LayerNorm.
    """
    result: torch.Tensor = _residual_norm_op(x, residual, weight, bias, eps)
    return result


def _fuses(x: torch.Tensor, others: tuple[torch.Tensor, ...]) -> bool:
    if x.device.type != "cuda" or why_missing("triton") is not None:
        return False
    from .triton_cuda import LARGEST_WIDTH

    kinds = (torch.float16, torch.bfloat16, torch.float32)
    alike = x.dtype in kinds and all(t.dtype == x.dtype for t in others)
    return alike and 0 < x.shape[-1] <= LARGEST_WIDTH


def _residual_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    if not _fuses(x, (residual, weight, bias)):
        return F.layer_norm(x + residual, x.shape[-1:], weight, bias, eps).contiguous()
    from . import triton_cuda

    return triton_cuda.residual_norm(x, residual, weight, bias, eps)


def _fake(x: torch.Tensor, residual: torch.Tensor, *rest: object) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


_residual_norm_op = TorchOp(
    "residual_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> Tensor",
    _residual_norm,
    _fake,
)
