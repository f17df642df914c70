"""What is measured: this library's backends, and the eager torch spellings that people use.

Three modes: "greedy" (argmax and its probability), "draw" (a token from the softmax and its
probability) and "step" (a whole MaskGIT decode step: draw, log-probability plus Gumbel noise,
commit the surest, mask the rest).  Eager code runs in the dtype of the logits, as it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import maskgit
from maskgit import StepRule

from .shapes import Shape

MODES = ("greedy", "draw", "step")
RULES = {
    "greedy": StepRule(name="greedy", sample_temperature=0.0, score="prob"),
    "draw": StepRule(name="draw", sample_temperature=1.0, score="prob"),
    "step": StepRule.preset("maskgit"),
}
STEP, NUM_STEPS = 0, 8  # the first step: everything is masked and all rows have to be read


@dataclass(frozen=True)
class Inputs:
    """One set of arguments; `seeds` (B,) and `tokens` (B, N), all masked, are the same in all."""

    logits: torch.Tensor
    tokens: torch.Tensor
    seeds: torch.Tensor
    mask_token_id: int


@dataclass(frozen=True)
class Provider:
    """One way to compute a mode: `prepare(inputs)` gives the call that is timed.

    A call returns (tokens, confidence), in mode "step" (next_tokens, candidates, confidence).
    `usual` marks the spelling that most codebases use, the base of the speed-up.
    """

    name: str
    prepare: Callable[[Inputs], Callable[[], Any]]
    backend: str | None = None
    usual: bool = False


def make_inputs(shape: Shape, dtype: str, copies: int = 1, seed: int = 0) -> list[Inputs]:
    """`copies` sets of random inputs, N(0, 3^2) logits, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.length, shape.vocab)
    logits = torch.empty(size, dtype=getattr(torch, dtype))
    for row in logits.view(-1, shape.vocab).split(max(1, 2**22 // shape.vocab)):
        row.copy_(torch.randn(row.shape, generator=generator) * 3)
    tokens = torch.full((shape.batch, shape.length), shape.vocab)
    seeds = torch.arange(shape.batch) * 7919 + 1234567890123
    moved = [logits]
    while len(moved) < copies:
        moved.append(logits.roll(1 + 31 * len(moved), dims=-1))
    return [Inputs(each, tokens, seeds, shape.vocab) for each in moved]


def providers(mode: str, backends: list[str], eager: bool = True) -> list[Provider]:
    """The backends asked for, then the eager spellings of the mode."""
    ours = [Provider(f"maskgit {name}", _ours(mode, name), backend=name) for name in backends]
    return ours + (_EAGER[mode] if eager else [])


def _ours(mode: str, backend: str) -> Callable[[Inputs], Callable[[], Any]]:
    rule = RULES[mode]

    def call(logits: Any, tokens: Any, seeds: Any, mask_token_id: int) -> Any:
        if mode == "step":
            return maskgit.decode_step(
                logits, tokens, rule=rule, mask_token_id=mask_token_id, step=STEP,
                num_steps=NUM_STEPS, seeds=seeds, backend=backend,
            )  # fmt: skip
        given = seeds if rule.needs_seeds else None
        out = maskgit.sample_tokens(logits, rule=rule, seeds=given, backend=backend)
        return out.candidate_tokens, out.confidence

    def prepare(x: Inputs) -> Callable[[], Any]:
        if backend == "jax":
            return _jitted(call, x)
        return lambda: call(x.logits, x.tokens, x.seeds, x.mask_token_id)

    return prepare


_compiled: dict[Any, Any] = {}


def _jitted(call: Callable[..., Any], x: Inputs) -> Callable[[], Any]:
    """The call under `jax.jit` on jax arrays, waited for."""
    import jax

    if call not in _compiled:
        _compiled[call] = jax.jit(call, static_argnums=3)
    words = torch.stack((x.seeds & 0xFFFFFFFF, x.seeds >> 32), dim=1).numpy().astype("uint32")
    arrays = jax.dlpack.from_dlpack(x.logits), jax.numpy.asarray(x.tokens.numpy()), words
    return lambda: jax.block_until_ready(_compiled[call](*arrays, x.mask_token_id))


def _eager(function: Callable[[Inputs], Any]) -> Callable[[Inputs], Callable[[], Any]]:
    return lambda x: lambda: function(x)


def _probability(probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return probs.gather(-1, ids[..., None]).squeeze(-1)


def _argmax_softmax(x: Inputs) -> Any:
    ids = x.logits.argmax(-1)
    return ids, _probability(x.logits.softmax(-1), ids)


def _max_softmax(x: Inputs) -> Any:
    ids = x.logits.max(-1).indices
    return ids, _probability(x.logits.softmax(-1), ids)


def _max_logsumexp(x: Inputs) -> Any:
    top, ids = x.logits.max(-1)
    return ids, (top - x.logits.logsumexp(-1)).exp()


def _multinomial(x: Inputs) -> Any:
    probs = x.logits.softmax(-1)
    ids = torch.multinomial(probs.view(-1, probs.shape[-1]), 1).view(probs.shape[:-1])
    return ids, _probability(probs, ids)


def _race(x: Inputs) -> Any:
    probs = x.logits.softmax(-1)
    ids = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
    return ids, _probability(probs, ids)


def _gumbel_float64(x: Inputs) -> Any:
    """LLaDA's `add_gumbel_noise` at temperature 1, then softmax and gather."""
    wide = x.logits.to(torch.float64)
    noise = (-torch.log(torch.rand_like(wide, dtype=torch.float64))) ** 1.0
    ids = (wide.exp() / noise).argmax(-1)
    return ids, _probability(x.logits.softmax(-1), ids)


def _whole_step(draw: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """The step as ports of MaskGIT write it (open-muse, Show-o, MMaDA), around a draw."""
    rule = RULES["step"]

    def step(x: Inputs) -> Any:
        drawn, probs = draw(x)
        is_masked = x.tokens == x.mask_token_id
        candidates = torch.where(is_masked, drawn, x.tokens)
        uniform = torch.zeros_like(probs).uniform_(0, 1).clamp(1e-20)
        noise = -torch.log(-torch.log(uniform))
        temperature = rule.choice_temperature * (1 - (STEP + 1) / NUM_STEPS)
        confidence = torch.log(probs.clamp(1e-20)) + temperature * noise
        confidence = torch.where(is_masked, confidence, torch.finfo(confidence.dtype).max)
        unknown = is_masked.sum(-1, keepdim=True)
        ratio = torch.cos(torch.tensor((STEP + 1) / NUM_STEPS * torch.pi / 2))
        stay = (unknown * ratio).floor().long().minimum(unknown - 1).clamp(min=1)
        cut = confidence.sort(dim=-1).values.gather(-1, stay.clamp(max=x.tokens.shape[-1] - 1))
        return torch.where(confidence < cut, x.mask_token_id, candidates), candidates, confidence

    return step


_EAGER = {
    "greedy": [
        Provider("eager argmax + softmax + gather", _eager(_argmax_softmax), usual=True),
        Provider("eager max + softmax + gather", _eager(_max_softmax)),
        Provider("eager max + logsumexp", _eager(_max_logsumexp)),
    ],
    "draw": [
        Provider("eager softmax + multinomial + gather", _eager(_multinomial), usual=True),
        Provider("eager softmax + exponential race", _eager(_race)),
        Provider("eager float64 Gumbel (LLaDA)", _eager(_gumbel_float64)),
    ],
    "step": [
        Provider("eager step, multinomial", _eager(_whole_step(_multinomial)), usual=True),
        Provider("eager step, exponential race", _eager(_whole_step(_race))),
    ],
}
