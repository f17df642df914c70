"""The blocks of semi-autoregressive decoding, which may lie elsewhere in every row."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..kernels.common.arrays import (
    as_index,
    check_integers,
    check_shape,
    kind_of,
    library_of,
    place_of,
    to_kind,
    to_numpy,
)


class Block(NamedTuple):
    """The same block of every row: from `starts` (B,) up to `stops` (B,), equal where a row has none."""

    starts: Any
    stops: Any

    def window(self, tokens: Any, *, prefix: bool) -> Any:
        """(B, N) bool: the block; with `prefix` all up to its end, in rows that have it."""
        library = library_of(tokens)
        place = library.arange(int(tokens.shape[1]), **place_of(tokens))
        starts = self.starts
        if prefix:
            starts = library.where(starts < self.stops, 0, self.stops)
        return (place >= starts[:, None]) & (place < self.stops[:, None])


def plan_blocks(
    tokens: Any, block_length: Any, prompt_length: Any, eligible: Any
) -> list[Block | None]:
    """The blocks of tokens (B, N); [None] where all is decoded at once.

    A row's blocks begin where its prompt ends, and none goes beyond its last eligible position.  With
    one prompt length for all there are as many as fill the rest of N, else as the longest row has.
    """
    batch, length = (int(size) for size in tokens.shape)
    prompts, is_one = _prompt_lengths(prompt_length, batch, length)
    if block_length is None:
        if prompts.any():
            raise ValueError("prompt_length: expected 0 without block_length, got a prompt")
        return [None]
    size, library = as_index("block_length", block_length, 1), library_of(tokens)
    first = library.full((batch,), int(prompts.max(initial=0)), **place_of(tokens))
    if not is_one:
        first = _beside(prompts, tokens)
    end = first * 0 + length
    if eligible is not None and length:
        place = library.arange(1, length + 1, **place_of(tokens))
        end = library.maximum(first, library.amax(library.where(eligible, place, 0), 1))
    if is_one:
        span = length - int(prompts)
        if span == 0 or span % size:
            raise ValueError(
                f"block_length: expected a divisor of the {span} positions to generate, got {size}"
            )
    else:
        span = int(to_numpy(end - first).max(initial=1))
    blocks: list[Block | None] = []
    for shift in range(0, span, size):
        starts = library.minimum(first + shift, end)
        blocks.append(Block(starts, library.minimum(starts + size, end)))
    return blocks


def _prompt_lengths(given: Any, batch: int, length: int) -> tuple[Any, bool]:
    """(each row's, or one for all, as integers; whether it is one for all)."""
    is_one = not isinstance(given, (list, tuple)) and not getattr(given, "ndim", 0)
    if is_one:
        prompts = np.array(as_index("prompt_length", given))
    else:
        prompts = np.asarray(given) if kind_of(given) is None else to_numpy(given)
        if prompts.size:
            check_integers("prompt_length", prompts)
        check_shape("prompt_length", prompts, (batch,))
    if prompts.size and not 0 <= int(prompts.min()) <= int(prompts.max()) <= length:
        raise ValueError(
            f"prompt_length: expected an integer in [0, {length}] or one for each row, got {given!r}"
        )
    return prompts.astype(np.int64), is_one


def _beside(array: Any, tokens: Any) -> Any:
    """A NumPy array in the library and on the device of the tokens."""
    kind = kind_of(tokens)
    assert kind is not None
    return to_kind(array, kind, tokens.device if kind == "torch" else None)
