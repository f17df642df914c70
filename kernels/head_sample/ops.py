"""The torch.library form of `decode_step_from_hidden`."""

from __future__ import annotations

from typing import Any

import torch

from ..common.torch_op import TorchOp
from ..decode_step.ops import NUMBERS, SHOWN, fake_step
from ..decode_step.rule.rule import StepRule
from .dispatch import decode


def _decode(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any
) -> Any:
    return decode(hidden, weight, tokens, StepRule.decode(rule), *rest)


def _fake(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any
) -> Any:
    return fake_step(hidden, tokens, rule)


decode_step_from_hidden_op = TorchOp(
    "decode_step_from_hidden(Tensor hidden, Tensor head_weight, Tensor tokens, str rule, "
    "SymInt mask_token_id, SymInt step, SymInt num_steps, Tensor? head_bias, "
    "Tensor? uncond_hidden, Tensor? guidance_scale, Tensor? num_masked_at_start, Tensor? seeds, "
    "Tensor? token_gumbel, Tensor? choice_gumbel, Tensor? eligible, Tensor? scores, "
    "Tensor? num_commit, Tensor? positions, Tensor? temperature, Tensor? threshold, "
    "str backend, bool check) -> (Tensor, Tensor, Tensor)",
    _decode,
    _fake,
    SHOWN,
    NUMBERS,
)
