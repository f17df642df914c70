"""Checks of the arguments of a decode step: one message each, naming what was expected and got."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import (
    as_scalar,
    check_floating,
    check_integers,
    check_no_grad,
    check_same_kind,
    check_shape,
    dtype_name,
    is_on_host,
    kind_of,
    to_numpy,
)
from .rule.plan import StepPlan
from .rule.rule import StepRule

LOGIT_DTYPES = ("float16", "bfloat16", "float32", "float64")  # the last is rounded to float32


def columns(logits: Any, rule: StepRule) -> Any:
    """The columns of `logits` that the rule may draw from, as a view."""
    if logits is None or rule.vocab_slice is None:
        return logits
    return logits[..., rule.vocab_slice[0] : rule.vocab_slice[1]]


def check_positions(positions: Any, model: Any) -> None:
    """(B, N) integers in the 32 bits of a Philox counter word, or None."""
    if positions is None:
        return
    check_same_kind("positions", positions, model)
    check_shape("positions", positions, tuple(model.shape[:2]))
    check_integers("positions", positions)
    if is_on_host(positions):
        values = to_numpy(positions)
        if values.size and (int(values.min()) < 0 or int(values.max()) >= 2**32):
            raise ValueError(
                f"positions: expected values in [0, 2^32), got {int(values.min())} to {int(values.max())}"
            )


def check_logits(logits: Any, ndim: int) -> tuple[int, ...]:
    """The shape of `logits`, once they are an array of a legal rank, width and dtype."""
    kind = kind_of(logits)
    if kind is None:
        raise TypeError(
            f"logits: expected a torch, jax or NumPy array, got {type(logits).__name__}"
        )
    if len(logits.shape) != ndim or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape (B, N, V) with V >= 1, got {tuple(logits.shape)}")
    if dtype_name(logits) not in LOGIT_DTYPES:
        raise TypeError(
            f"logits: expected dtype {', '.join(LOGIT_DTYPES)}, got {dtype_name(logits)}"
        )
    check_no_grad("logits", logits)
    return tuple(logits.shape)


def check_step_arrays(
    model: Any, vocab: int, tokens: Any, eligible: Any, mask_token_id: int
) -> None:
    """Tokens, mask id and eligibility against logits (or hidden states) and their vocabulary."""
    check_same_kind("tokens", tokens, model)
    check_shape("tokens", tokens, tuple(model.shape[:2]))
    check_integers("tokens", tokens)
    if not -(2**63) <= int(mask_token_id) < 2**63:
        raise ValueError(f"mask_token_id: expected a 64-bit integer, got {mask_token_id}")
    most = int(np.iinfo(np.dtype(dtype_name(tokens))).max)
    if vocab - 1 > most or mask_token_id > most:
        raise TypeError(
            f"tokens: expected a dtype that holds ids up to {max(vocab - 1, mask_token_id)}, "
            f"got {dtype_name(tokens)}"
        )
    check_eligible(eligible, model)
    if is_on_host(tokens):
        check_token_ids(tokens, vocab, mask_token_id)


def check_token_ids(tokens: Any, vocab: int, mask_token_id: int) -> None:
    """ValueError for an id outside the vocabulary, which is V columns or up to the mask id."""
    ids = to_numpy(tokens)
    if not ids.size:
        return
    ids = ids[ids != mask_token_id]
    top = max(vocab, mask_token_id + 1) if mask_token_id >= 0 else np.iinfo(np.int64).max
    bad = ids[(ids < 0) | (ids >= top)]
    if bad.size:
        raise ValueError(
            f"tokens: expected ids in [0, {top}) or the mask token {mask_token_id}, got {int(bad[0])}"
        )


def check_noise(
    model: Any, vocab: int, rule: StepRule, plan: StepPlan, seeds: Any, token: Any, choice: Any,
    both: bool,
) -> None:  # fmt: skip
    """Injected noise, the vocabulary slice, and seeds where this step needs them."""
    batch, length = model.shape[:2]
    start, stop = rule.vocab_slice or (0, vocab)
    if stop > vocab:
        raise ValueError(
            f"rule: vocab_slice {rule.vocab_slice} expected within V = {vocab} columns"
        )
    width = stop - start
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {}
    shapes["noise.token_gumbel"] = (token, (batch, length, width))
    shapes["noise.choice_gumbel"] = (choice, (batch, length))
    for name, (noise, shape) in shapes.items():
        if noise is None:
            continue
        check_same_kind(name, noise, model)
        check_no_grad(name, noise)
        check_shape(name, noise, shape)
        check_floating(name, noise)
    check_seeds(seeds, model)
    draws = plan.row.draws and token is None
    ranks = both and plan.commit.uses_noise
    if seeds is None and (draws or (ranks and choice is None)):
        what = "draws its candidates" if draws else "adds noise to its confidences"
        raise ValueError(
            f"seeds: expected ({batch},) integers because rule {rule.name!r} {what} at this step, got None"
        )


def check_seeds(seeds: Any, model: Any) -> None:
    """(B,) integers, (B, 2) words, or keys, like the rest; or None."""
    if seeds is None:
        return
    batch = model.shape[0]
    check_same_kind("seeds", seeds, model)
    is_keys = dtype_name(seeds).startswith("key")
    if not is_keys:
        check_integers("seeds", seeds)
    legal = ((batch,),) if is_keys else ((batch,), (batch, 2))
    if tuple(seeds.shape) not in legal:
        wanted = " or ".join(str(shape) for shape in legal)
        raise ValueError(f"seeds: expected shape {wanted}, got {tuple(seeds.shape)}")


def check_commit_noise(
    scores: Any, rule: StepRule, plan: StepPlan, seeds: Any, choice_gumbel: Any
) -> None:
    """Noise for the selection: the caller's, or seeds where this step needs some."""
    if choice_gumbel is not None:
        check_same_kind("choice_gumbel", choice_gumbel, scores)
        check_no_grad("choice_gumbel", choice_gumbel)
        check_shape("choice_gumbel", choice_gumbel, tuple(scores.shape))
        check_floating("choice_gumbel", choice_gumbel)
    check_seeds(seeds, scores)
    if seeds is None and choice_gumbel is None and plan.commit.uses_noise:
        raise ValueError(
            f"seeds: expected ({scores.shape[0]},) integers because rule {rule.name!r} adds noise to "
            "its confidences at this step, got None"
        )


def check_scores(rule: StepRule, scores: Any, model: Any, name: str) -> None:
    """Scores from outside: exactly where the rule asks for them."""
    if (scores is not None) != (rule.score == "given"):
        got = "None" if scores is None else f"scores with score={rule.score!r}"
        raise ValueError(f"{name}: expected exactly where the rule has score='given', got {got}")
    if scores is None:
        return
    check_same_kind(name, scores, model)
    check_no_grad(name, scores)
    check_shape(name, scores, tuple(model.shape[:2]))
    check_floating(name, scores)


def check_candidates(candidates: Any, scores: Any) -> tuple[int, ...]:
    """The shape (B, N) of candidates, once they and their scores are arrays of one kind."""
    if kind_of(scores) is None:
        raise TypeError(
            f"scores: expected a torch, jax or NumPy array, got {type(scores).__name__}"
        )
    if len(scores.shape) != 2:
        raise ValueError(f"scores: expected shape (B, N), got {tuple(scores.shape)}")
    check_floating("scores", scores)
    check_no_grad("scores", scores)
    check_same_kind("candidate_tokens", candidates, scores)
    check_shape("candidate_tokens", candidates, tuple(scores.shape))
    check_integers("candidate_tokens", candidates)
    return tuple(scores.shape)


def check_commit_arrays(
    scores: Any, candidates: Any, tokens: Any, eligible: Any, mask_token_id: int
) -> None:
    """Tokens and eligibility against the scores of their candidates."""
    check_same_kind("tokens", tokens, scores)
    check_shape("tokens", tokens, tuple(scores.shape))
    check_integers("tokens", tokens)
    most = int(np.iinfo(np.dtype(dtype_name(tokens))).max)
    if not -(2**63) <= int(mask_token_id) <= most:
        raise ValueError(
            f"mask_token_id: expected an id that {dtype_name(tokens)} holds, got {mask_token_id}"
        )
    check_eligible(eligible, scores)
    if is_on_host(candidates):
        ids = to_numpy(candidates)
        if ids.size and not -1 <= int(ids.min()) <= int(ids.max()) <= most:
            raise ValueError(
                f"candidate_tokens: expected ids in [0, {most}], or -1 for none, "
                f"got {int(ids.min())} to {int(ids.max())}"
            )


def check_eligible(eligible: Any, model: Any) -> None:
    """(B, N) bool like the rest, or None."""
    if eligible is None:
        return
    check_same_kind("eligible", eligible, model)
    check_shape("eligible", eligible, tuple(model.shape[:2]))
    if dtype_name(eligible) != "bool":
        raise TypeError(f"eligible: expected dtype bool, got {dtype_name(eligible)}")


def check_guidance(
    logits: Any, uncond_logits: Any, guidance_scale: Any,
    name: str = "uncond_logits", like: str = "logits",
) -> Any:  # fmt: skip
    """The scale as `as_scalar` gives it, 0 without; unconditional logits (or hidden states) must fit."""
    if (uncond_logits is None) != (guidance_scale is None):
        names = (name, "guidance_scale")
        given, missing = names if guidance_scale is None else names[::-1]
        raise ValueError(f"{missing}: expected together with {given}, got None")
    if uncond_logits is None:
        return 0.0
    check_same_kind(name, uncond_logits, logits)
    check_no_grad(name, uncond_logits)
    check_shape(name, uncond_logits, tuple(logits.shape))
    if dtype_name(uncond_logits) != dtype_name(logits):
        raise TypeError(
            f"{name}: expected dtype {dtype_name(logits)} like {like}, "
            f"got {dtype_name(uncond_logits)}"
        )
    return as_scalar("guidance_scale", guidance_scale)


def raise_on_dead_rows(dead: Any, name: str = "logits") -> None:
    """ValueError naming the first row without a finite logit."""
    if dead.any():
        b, n = np.argwhere(dead)[0]
        raise ValueError(
            f"{name}: expected a finite logit in every row, got none in row (sequence {b}, position {n})"
        )
