"""Axes, factors, levels and padding as the (B, N, V) of `decode_step`, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ..kernels.common.arrays import (
    as_index,
    check_floating,
    check_integers,
    check_same_kind,
    check_shape,
    kind_of,
    library_of,
    to_kind,
    to_numpy,
)


class PaddedBatch(NamedTuple):
    """Sequences of several lengths as one batch; arrays (B, L), L the longest length.

    tokens: padding, prompt, then what is to be generated.
    eligible: bool, False at the padding: `eligible` of `decode_step`, and an attention mask.
    positions: where each token stands in its own sequence, 0 at the padding.
    """

    tokens: Any
    eligible: Any
    positions: Any


def from_v_major(logits: Any) -> Any:
    """Logits with the vocabulary before the positions, as (B, N, V) with N = H W, row by row.

    Args:
        logits: (B, V, H, W) or (B, V, N), torch, NumPy or jax.

    Returns:
        A strided view of the same memory; a copy only where H and W do not merge (a crop).

    Raises:
        TypeError: no array.  ValueError: another rank.

    Source: the [B, V, H, W] that huggingface/diffusers hands to `AmusedScheduler.step`, and 1xgpt.
    """
    _check_array("logits", logits)
    if len(logits.shape) not in (3, 4):
        raise ValueError(
            f"logits: expected shape (B, V, N) or (B, V, H, W), got {tuple(logits.shape)}"
        )
    if len(logits.shape) == 4:
        batch, vocab, height, width = logits.shape
        logits = logits.reshape(batch, vocab, height * width)
    return library_of(logits).swapaxes(logits, 1, 2)


def to_grid(tokens: Any, height: int, width: int) -> Any:
    """(B, N) tokens, confidences or masks as (B, H, W), row by row; a view.

    Raises:
        TypeError: no array, no integers.  ValueError: N is not height x width.
    """
    _check_array("tokens", tokens)
    height, width = as_index("height", height, 0), as_index("width", width, 0)
    if len(tokens.shape) != 2 or tokens.shape[1] != height * width:
        raise ValueError(
            f"tokens: expected shape (B, {height * width}) for a grid of {height} x {width}, "
            f"got {tuple(tokens.shape)}"
        )
    return tokens.reshape(tokens.shape[0], height, width)


def flatten_factors(x: Any) -> Any:
    """F factor tokens at each of N positions as one sequence of N F tokens, factors fastest.

    Args:
        x: logits (B, N, F, V), or tokens, confidences and masks (B, N, F).

    Returns:
        (B, N F, V) or (B, N F), a view of contiguous memory.  Each factor is drawn, ranked and
        committed by itself; position and random numbers of factor f at n are those of n F + f.

    Raises:
        TypeError: no array.  ValueError: another rank.

    Source: markweberdev/maskbit `sample`.
    """
    _check_array("x", x)
    if len(x.shape) not in (3, 4):
        raise ValueError(f"x: expected shape (B, N, F) or (B, N, F, V), got {tuple(x.shape)}")
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def unflatten_factors(x: Any, factors: int) -> Any:
    """The inverse of `flatten_factors`: (B, N F) to (B, N, F), or (B, N F, V) to (B, N, F, V).

    Raises:
        TypeError: no array, no integer.  ValueError: another rank, or a length that F does not divide.
    """
    _check_array("x", x)
    factors = as_index("factors", factors, 1)
    if len(x.shape) not in (2, 3) or x.shape[1] % factors:
        raise ValueError(
            f"x: expected shape (B, N * {factors}) or (B, N * {factors}, V), got {tuple(x.shape)}"
        )
    return x.reshape(x.shape[0], x.shape[1] // factors, factors, *x.shape[2:])


def pair_factors(slow: Any, fast: Any) -> Any:
    """Logits (or Gumbel noise) of two independent factors as those of the pair, id = a C + b.

    The logit of a pair is the sum of its factors', so its probability is their product, and with
    noise paired in the same way the pair that wins is the pair of the winners.  This forms A C
    columns in float32, so it suits small factors (6 x 6, 32 x 32); for large ones draw the factors
    with `flatten_factors`, add up their log-probabilities and call `commit_tokens`.

    Args:
        slow: (B, N, A) floating, the factor a.
        fast: (B, N, C) floating, the factor b.

    Returns:
        (B, N, A C) float32.

    Raises:
        TypeError: no floating arrays of one library.  ValueError: other ranks, or B, N that differ.

    Source: 1x-technologies/1xgpt `STMaskGIT.maskgit_generate`, where the second factor is the slow one.
    """
    for name, x in (("slow", slow), ("fast", fast)):
        _check_array(name, x)
        if len(x.shape) != 3:
            raise ValueError(f"{name}: expected shape (B, N, V), got {tuple(x.shape)}")
        check_floating(name, x)
    check_same_kind("fast", fast, slow)
    check_shape("fast", fast, (*slow.shape[:2], fast.shape[2]))
    total = _float32(slow)[:, :, :, None] + _float32(fast)[:, :, None, :]
    return total.reshape(*slow.shape[:2], slow.shape[2] * fast.shape[2])


def split_pairs(tokens: Any, fast_size: int) -> tuple[Any, Any]:
    """Ids a C + b as the factors (a, b), C being `fast_size`; negative ids (none) stay negative in both.

    The mask token has no factors: split a finished sequence.
    """
    _check_array("tokens", tokens)
    check_integers("tokens", tokens)
    fast_size = as_index("fast_size", fast_size, 1)
    where, none = library_of(tokens).where, tokens < 0
    return where(none, tokens, tokens // fast_size), where(none, tokens, tokens % fast_size)


def rvq_level(logits: Any, tokens: Any, level: int, *, axis: Literal[1, 2] = 1) -> tuple[Any, Any]:
    """One residual-quantizer level: views (B, N, V) of the logits and (B, N) of the tokens.

    Args:
        logits: (B, Q, N, V), or (B, N, Q, V) with axis=2 (SoundStorm's interleaved levels).
        tokens: (B, Q, N), or (B, N, Q) with axis=2.
        level: 0 .. Q - 1.
        axis: where Q is.

    Returns:
        (logits, tokens) of the level, sharing memory with what was given.  `with_level` puts the
        level's next tokens back.

    Raises:
        TypeError: no arrays of one library.  ValueError: shapes that do not fit, no such level.

    Source: facebookresearch/audiocraft MAGNeT, hugofloresgarcia/vampnet and Amphion MaskGCT
    (axis 1), lucidrains/soundstorm-pytorch (axis 2).
    """
    _check_array("logits", logits)
    if len(logits.shape) != 4:
        raise ValueError(f"logits: expected shape (B, Q, N, V), got {tuple(logits.shape)}")
    check_same_kind("tokens", tokens, logits)
    check_shape("tokens", tokens, tuple(logits.shape[:3]))
    index = _level_index(tokens, level, axis)
    return logits[index], tokens[index]


def with_level(tokens: Any, level: int, level_tokens: Any, *, axis: Literal[1, 2] = 1) -> Any:
    """`tokens` (B, Q, N) with one level replaced by (B, N) ids; a new array, the input stays.

    Raises: as `rvq_level`.
    """
    _check_array("tokens", tokens)
    index = _level_index(tokens, level, axis)
    check_same_kind("level_tokens", level_tokens, tokens)
    check_shape("level_tokens", level_tokens, tuple(tokens[index].shape))
    if kind_of(tokens) == "jax":
        return tokens.at[index].set(level_tokens)
    out = tokens.clone() if kind_of(tokens) == "torch" else tokens.copy()
    out[index] = level_tokens
    return out


def pad_left(
    prompts: Sequence[Any],
    pad_id: int,
    *,
    num_new: int = 0,
    mask_token_id: int | None = None,
) -> PaddedBatch:
    """Prompts of several lengths as one batch, padded on the left, with room to generate.

    Args:
        prompts: B sequences of ids: lists, or 1-D integer arrays of one library.
        pad_id: what stands before the shorter ones; not the mask token.
        num_new: how many masked positions follow each prompt.
        mask_token_id: what they hold; needed with num_new.

    Returns:
        `PaddedBatch`, of the library and on the device of the prompts (NumPy for lists), int64
        tokens (in jax the default integer).  Given `eligible` and `positions`, a row draws what it
        draws alone; the model must leave the padding out of its attention itself.

    Raises:
        TypeError: ids that are no integers.  ValueError: no prompts, or no 1-D ones.

    Source: left-padded batches of ML-GSAI/LLaDA, Dream and ZHZisZZ/dllm.
    """
    num_new, pad_id = as_index("num_new", num_new, 0), as_index("pad_id", pad_id)
    if mask_token_id is not None:
        mask_token_id = as_index("mask_token_id", mask_token_id)
    if not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts: expected at least one sequence of ids, got {prompts!r}")
    if (num_new > 0) != (mask_token_id is not None):
        raise ValueError(
            f"mask_token_id: expected exactly with num_new > 0, got {mask_token_id!r} with {num_new}"
        )
    if num_new and mask_token_id == pad_id:
        raise ValueError(f"pad_id: expected another id than the mask token, got {pad_id}")
    rows = [_ids(prompt, i) for i, prompt in enumerate(prompts)]
    length = max(row.size for row in rows) + num_new
    tokens = np.full((len(rows), length), pad_id, np.int64)
    eligible = np.zeros(tokens.shape, bool)
    positions = np.zeros(tokens.shape, np.int64)
    for i, row in enumerate(rows):
        start = length - num_new - row.size
        tokens[i, start : length - num_new] = row
        eligible[i, start:] = True
        positions[i, start:] = np.arange(length - start)
    if num_new:
        tokens[:, length - num_new :] = mask_token_id
    kind = kind_of(prompts[0]) or "numpy"
    device = prompts[0].device if kind == "torch" else None
    return PaddedBatch(*(to_kind(x, kind, device) for x in (tokens, eligible, positions)))


def _check_array(name: str, x: Any) -> None:
    if kind_of(x) is None:
        raise TypeError(f"{name}: expected a torch, jax or NumPy array, got {type(x).__name__}")


def _level_index(tokens: Any, level: int, axis: int) -> Any:
    if axis not in (1, 2):
        raise ValueError(f"axis: expected 1 or 2, got {axis!r}")
    if len(tokens.shape) != 3:
        raise ValueError(f"tokens: expected shape (B, Q, N), got {tuple(tokens.shape)}")
    level = as_index("level", level)
    if not 0 <= level < tokens.shape[axis]:
        raise ValueError(f"level: expected an integer in [0, {tokens.shape[axis]}), got {level}")
    return (slice(None), level) if axis == 1 else (slice(None), slice(None), level)


def _float32(x: Any) -> Any:
    library = library_of(x)
    return x.to(library.float32) if kind_of(x) == "torch" else x.astype(library.float32)


def _ids(prompt: Any, index: int) -> Any:
    """One prompt as a 1-D NumPy array of integers."""
    array = np.asarray(prompt) if kind_of(prompt) is None else to_numpy(prompt)
    if array.ndim != 1:
        raise ValueError(f"prompts[{index}]: expected one dimension, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"prompts[{index}]: expected integers, got dtype {array.dtype}")
    return array.astype(np.int64)
