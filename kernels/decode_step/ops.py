"""torch.library form of the decode step: schemas, fake kernels and the bodies behind them.

One op per public function, defined with define/impl (half the call overhead of `custom_op`), so
that `torch.compile(fullgraph=True)` has no graph break.  The rule travels as its JSON string.
The body picks the backend, by the same rules as for any other array.
"""

from __future__ import annotations

from typing import Any

import torch

from . import dispatch
from .rule.rule import StepRule

_LIB = torch.library.Library("maskgit", "DEF")
_LIB.define(
    "decode_step(Tensor logits, Tensor tokens, str rule, SymInt mask_token_id, SymInt step, "
    "SymInt num_steps, Tensor? num_masked_at_start, Tensor? seeds, Tensor? token_gumbel, "
    "Tensor? choice_gumbel, Tensor? uncond_logits, Tensor? guidance_scale, Tensor? eligible, "
    "Tensor? scores, Tensor? num_commit, Tensor? positions, Tensor? temperature, Tensor? threshold, "
    "str backend, bool check) -> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "commit_tokens(Tensor candidate_tokens, Tensor scores, Tensor tokens, str rule, "
    "SymInt mask_token_id, SymInt step, SymInt num_steps, Tensor? num_masked_at_start, "
    "Tensor? seeds, Tensor? choice_gumbel, Tensor? eligible, Tensor? num_commit, "
    "Tensor? positions, Tensor? threshold, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "sample_tokens(Tensor logits, str rule, Tensor? seeds, Tensor? positions, SymInt step, "
    "Tensor? token_gumbel, Tensor? temperature, str backend, bool check) -> (Tensor, Tensor, Tensor)"
)


def _decode_step(logits: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any) -> Any:
    return dispatch.decode_step(logits, tokens, StepRule.decode(rule), *rest)


def _commit_tokens(
    candidates: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any
) -> Any:
    return dispatch.commit_tokens(candidates, scores, tokens, StepRule.decode(rule), *rest)


def _sample_tokens(logits: torch.Tensor, rule: str, *rest: Any) -> Any:
    return dispatch.sample_tokens(logits, StepRule.decode(rule), *rest)


def _score_dtype(rule: str) -> torch.dtype:
    wide = StepRule.decode(rule).score_dtype == "float64"
    return torch.float64 if wide else torch.float32


def _fake_decode_step(logits: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any) -> Any:
    confidence = tokens.new_empty(tokens.shape, dtype=_score_dtype(rule))
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape), confidence


def _fake_commit_tokens(
    candidates: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor, rule: str, *rest: Any
) -> Any:
    return _fake_decode_step(scores, tokens, rule)


def _fake_sample_tokens(logits: torch.Tensor, rule: str, *rest: Any) -> Any:
    shape, dtype = logits.shape[:-1], _score_dtype(rule)
    score = logits.new_empty(shape, dtype=dtype)
    return logits.new_empty(shape, dtype=torch.int64), score, torch.empty_like(score)


_LIB.impl("decode_step", _decode_step, "CompositeExplicitAutograd")
_LIB.impl("commit_tokens", _commit_tokens, "CompositeExplicitAutograd")
_LIB.impl("sample_tokens", _sample_tokens, "CompositeExplicitAutograd")
torch.library.register_fake("maskgit::decode_step", _fake_decode_step, lib=_LIB)
torch.library.register_fake("maskgit::commit_tokens", _fake_commit_tokens, lib=_LIB)
torch.library.register_fake("maskgit::sample_tokens", _fake_sample_tokens, lib=_LIB)

decode_step_op = torch.ops.maskgit.decode_step.default
commit_tokens_op = torch.ops.maskgit.commit_tokens.default
sample_tokens_op = torch.ops.maskgit.sample_tokens.default
