"""The torch.library form of `attention`."""

from __future__ import annotations

from typing import Any

import torch

from ..common.torch_op import TorchOp
from .dispatch import attend


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: Any, scale: float, backend: str
) -> Any:
    return attend(q, k, v, padding, scale, backend).contiguous()


def _fake(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape)


attention_op = TorchOp(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, float scale, str backend) "
    "-> Tensor",
    _attention,
    _fake,
)
