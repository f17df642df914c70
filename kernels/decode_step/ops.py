"""The torch.library form of the decode step; the rule travels as its JSON string.

The bodies pick the backend, by the same rules as for any other array.
"""

from __future__ import annotations

from typing import Any

import torch

from ..common.torch_op import TorchOp
from . import dispatch
from .rule.rule import StepRule

NUMBERS = ("guidance_scale", "temperature", "threshold")
SHOWN = {"token_gumbel": "noise.token_gumbel", "choice_gumbel": "noise.choice_gumbel"}


def _decode_step(logits: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any) -> Any:
    return dispatch.decode_step(logits, tokens, StepRule.decode(rule), *rest)


def _commit_tokens(
    candidates: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any
) -> Any:
    return dispatch.commit_tokens(candidates, scores, tokens, StepRule.decode(rule), *rest)


def _sample_tokens(logits: torch.Tensor, rule: str, *rest: Any) -> Any:
    return dispatch.sample_tokens(logits, StepRule.decode(rule), *rest)


def fake_step(model: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any) -> Any:
    """The three arrays of a step without their values."""
    confidence = tokens.new_empty(tokens.shape, dtype=_score_dtype(rule))
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape), confidence


def _score_dtype(rule: str) -> torch.dtype:
    wide = StepRule.decode(rule).score_dtype == "float64"
    return torch.float64 if wide else torch.float32


def _fake_commit(
    candidates: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any
) -> Any:
    return fake_step(scores, tokens, rule)


def _fake_sample(logits: torch.Tensor, rule: str, *rest: Any) -> Any:
    shape, dtype = logits.shape[:-1], _score_dtype(rule)
    score = logits.new_empty(shape, dtype=dtype)
    return logits.new_empty(shape, dtype=torch.int64), score, torch.empty_like(score)


decode_step_op = TorchOp(
    "decode_step(Tensor logits, Tensor tokens, str rule, SymInt mask_token_id, SymInt step, "
    "SymInt num_steps, Tensor? num_masked_at_start, Tensor? seeds, Tensor? token_gumbel, "
    "Tensor? choice_gumbel, Tensor? uncond_logits, Tensor? guidance_scale, Tensor? eligible, "
    "Tensor? scores, Tensor? num_commit, Tensor? positions, Tensor? temperature, Tensor? threshold, "
    "str backend, bool check) -> (Tensor, Tensor, Tensor)",
    _decode_step,
    fake_step,
    SHOWN,
    NUMBERS,
)
commit_tokens_op = TorchOp(
    "commit_tokens(Tensor candidate_tokens, Tensor scores, Tensor tokens, str rule, "
    "SymInt mask_token_id, SymInt step, SymInt num_steps, Tensor? num_masked_at_start, "
    "Tensor? seeds, Tensor? choice_gumbel, Tensor? eligible, Tensor? num_commit, "
    "Tensor? positions, Tensor? threshold, str backend) -> (Tensor, Tensor, Tensor)",
    _commit_tokens,
    _fake_commit,
    anywhere=NUMBERS,
    model=1,
)
sample_tokens_op = TorchOp(
    "sample_tokens(Tensor logits, str rule, Tensor? seeds, Tensor? positions, SymInt step, "
    "Tensor? token_gumbel, Tensor? temperature, str backend, bool check) -> (Tensor, Tensor, Tensor)",
    _sample_tokens,
    _fake_sample,
    SHOWN,
    NUMBERS,
)
