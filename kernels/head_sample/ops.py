"""torch.library form of `decode_step_from_hidden`: schema, fake kernel and the body behind them."""

from __future__ import annotations

from typing import Any

import torch

from ..decode_step.rule.rule import StepRule
from .dispatch import decode

_LIB = torch.library.Library("maskgit", "FRAGMENT")
_LIB.define(
    "decode_step_from_hidden(Tensor hidden, Tensor head_weight, Tensor tokens, str rule, "
    "SymInt mask_token_id, SymInt step, SymInt num_steps, Tensor? head_bias, "
    "Tensor? uncond_hidden, Tensor? guidance_scale, Tensor? num_masked_at_start, Tensor? seeds, "
    "Tensor? token_gumbel, Tensor? choice_gumbel, Tensor? eligible, Tensor? scores, "
    "Tensor? num_commit, Tensor? positions, Tensor? temperature, Tensor? threshold, "
    "str backend, bool check) -> (Tensor, Tensor, Tensor)"
)


def _decode(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any
) -> Any:
    return decode(hidden, weight, tokens, StepRule.decode(rule), *rest)


def _fake(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any
) -> Any:
    wide = StepRule.decode(rule).score_dtype == "float64"
    confidence = tokens.new_empty(tokens.shape, dtype=torch.float64 if wide else torch.float32)
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape), confidence


_LIB.impl("decode_step_from_hidden", _decode, "CompositeExplicitAutograd")
torch.library.register_fake("maskgit::decode_step_from_hidden", _fake, lib=_LIB)

decode_step_from_hidden_op = torch.ops.maskgit.decode_step_from_hidden.default
