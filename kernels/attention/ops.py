"""torch.library form of `attention`: schema, fake kernel and the body behind them."""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import attend

_LIB = torch.library.Library("maskgit", "FRAGMENT")
_LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, float scale, str backend) "
    "-> Tensor"
)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: Any, scale: float, backend: str
) -> Any:
    return attend(q, k, v, padding, scale, backend).contiguous()


def _fake(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape)


_LIB.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("maskgit::attention", _fake, lib=_LIB)

attention_op = torch.ops.maskgit.attention.default
