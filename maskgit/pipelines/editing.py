"""Editing by regeneration: inpainting a box, outpainting from a half, swapping the class in a box.

An edit encodes the image, masks some tokens, lets the sampler fill them while the others stay, and
pastes the result into the original, so that pixels outside the masked cells are unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskgit.kernels.common.names import unknown
from maskgit.models.config import TokenizerConfig
from maskgit.pipelines.images import Pipeline

HALVES = ("left", "right", "top", "bottom")
GUESS_ROUNDS = 6

BoolArray = NDArray[np.bool_]


class EditError(ValueError):
    """A region is not usable: malformed, empty, or outside the image."""


@dataclass(frozen=True)
class Box:
    """Pixels x0 <= x < x1, y0 <= y < y1; (0, 0) is the top left."""

    x0: int
    y0: int
    x1: int
    y1: int

    @staticmethod
    def parse(text: str, name: str = "box") -> Box:
        """Read "x0,y0,x1,y1"; EditError names `name`."""
        try:
            x0, y0, x1, y1 = (int(part) for part in text.split(","))
        except ValueError:
            raise EditError(
                f"{name}: expected four whole numbers x0,y0,x1,y1, got {text!r}"
            ) from None
        return Box(x0, y0, x1, y1)

    def check(self, size: int, name: str = "box") -> None:
        """Raise EditError unless the box is not empty and inside a size x size image."""
        text = f"{self.x0},{self.y0},{self.x1},{self.y1}"
        if self.x0 >= self.x1 or self.y0 >= self.y1:
            raise EditError(f"{name}: expected x0 < x1 and y0 < y1, got the empty box {text}")
        if min(self.x0, self.y0) < 0 or max(self.x1, self.y1) > size:
            raise EditError(f"{name}: expected numbers in 0..{size}, got {text}")


@dataclass(frozen=True)
class Edit:
    """What an edit did: the image before (C, H, W) and its tokens (N,), the token grid's mask
    (h, w), and the alternatives after: images (S, C, H, W) and tokens (S, N)."""

    class_id: int
    masked: BoolArray
    before: Tensor
    after: Tensor
    tokens_before: Tensor
    tokens_after: Tensor


def box_mask(config: TokenizerConfig, box: Box, name: str = "box") -> BoolArray:
    """Token cells (h, w) that touch the box."""
    box.check(config.image_size, name)
    cell = config.downsampling
    masked = np.zeros((config.grid_size, config.grid_size), dtype=bool)
    masked[box.y0 // cell : -(-box.y1 // cell), box.x0 // cell : -(-box.x1 // cell)] = True
    return masked


def outpaint_mask(config: TokenizerConfig, keep: str) -> BoolArray:
    """Token cells (h, w) outside the half of the image that is kept."""
    if keep not in HALVES:
        raise EditError(unknown("outpaint", HALVES, keep))
    half = config.grid_size // 2
    masked = np.ones((config.grid_size, config.grid_size), dtype=bool)
    kept = slice(0, half) if keep in ("left", "top") else slice(half, None)
    masked[(slice(None), kept) if keep in ("left", "right") else (kept, slice(None))] = False
    return masked


def edit(
    pipeline: Pipeline,
    image: Tensor,
    masked: BoolArray,
    class_id: int | None,
    *,
    samples: int = 1,
    **settings: Any,
) -> Edit:
    """Regenerate the masked cells of an image (C, H, W) in [0, 1] as class `class_id`.

    Draws `samples` alternatives. Without a class, it is guessed from the tokens that stay. Settings
    are those of `Pipeline.fill`. Raises EditError when nothing is masked.
    """
    tokens = pipeline.encode(image.unsqueeze(0))
    hidden = torch.from_numpy(masked.reshape(1, -1))
    if not bool(hidden.any()):
        raise EditError("mask: nothing is masked")
    if class_id is None:
        class_id = guess_class(pipeline, tokens[0], ~hidden[0])
    start = tokens.masked_fill(hidden, pipeline.mask_token_id).repeat(samples, 1)
    filled = pipeline.fill(start, [class_id] * samples, **settings).tokens
    generated = pipeline.decode(filled)
    cell = pipeline.weights.config.tokenizer.downsampling
    pixels = torch.from_numpy(masked.repeat(cell, 0).repeat(cell, 1))
    after = torch.where(pixels, generated, image)
    return Edit(class_id, masked, image, after, tokens[0], filled)


def guess_class(pipeline: Pipeline, tokens: Tensor, known: Tensor) -> int:
    """The class under which the known tokens are likeliest, by the transformer itself.

    tokens (N,), known (N,) bool. Scores log p(token | class, the others) over fixed random halves
    of the known tokens (a pseudo-likelihood; no classifier is needed).
    """
    generator = torch.Generator().manual_seed(0)
    hide = (torch.rand(GUESS_ROUNDS, len(tokens), generator=generator) < 0.5) & known
    shown = tokens.masked_fill(hide | ~known, pipeline.mask_token_id)
    count = pipeline.num_classes
    target = tokens.masked_fill(~known, 0).expand(count * GUESS_ROUNDS, -1).unsqueeze(-1)
    classes = torch.arange(count).repeat_interleave(GUESS_ROUNDS)
    with torch.inference_mode():
        logits = pipeline.weights.transformer(shown.repeat(count, 1), classes)
    picked = logits.log_softmax(-1).gather(-1, target).squeeze(-1)
    scores = picked.masked_fill(~hide.repeat(count, 1), 0.0).reshape(count, -1).sum(1)
    return int(scores.argmax())
