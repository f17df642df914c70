"""The two training tasks: the tokenizer, and the transformer by masked visual token modelling."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.kernels.decode_step.rule.schedules import gamma
from maskgit.models.config import TokenizerConfig, TransformerConfig
from maskgit.models.transformer import MaskGitTransformer
from maskgit.models.vqgan import Tokenizer
from maskgit.settings import to_dict
from maskgit.training.config import TrainConfig
from maskgit.training.data.digits import Digits, with_shifts

RESTART_EVERY = 50


class Task(Protocol):
    """What is trained: the model, its loss on a random batch, and what follows each update."""

    name: str
    config: TrainConfig
    model_config: dict[str, Any]

    def build(self) -> nn.Module:
        """A freshly initialised model (from torch's global generator)."""

    def loss(self, model: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch drawn with `generator`, and figures worth showing."""

    def after_step(self, model: nn.Module, generator: torch.Generator, step: int) -> None:
        """Called after the update of `step` (counted from 0)."""


class Stages(Protocol):
    """What of a recipe (`maskgit.pipelines.recipes.PresetConfig`) is trained, and how."""

    @property
    def tokenizer(self) -> TokenizerConfig:
        """Shape of the tokenizer."""

    @property
    def transformer(self) -> TransformerConfig:
        """Shape of the transformer."""

    @property
    def tokenizer_training(self) -> TrainConfig:
        """How the first stage is trained."""

    @property
    def transformer_training(self) -> TrainConfig:
        """How the second stage is trained."""


class ImageSource:
    """Draws batches of training images, shifted at random if the configuration says so."""

    def __init__(self, digits: Digits, augment: bool) -> None:
        sources = np.arange(len(digits.labels))
        if augment:
            digits, sources = with_shifts(digits)
        weights = 1.0 / np.bincount(sources)[sources]
        self.images = torch.from_numpy(digits.images)
        self.labels = torch.from_numpy(digits.labels)
        self.weights = torch.from_numpy(weights)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices (count,) int64: each original image equally likely, then each of its shifts."""
        return torch.multinomial(self.weights, count, replacement=True, generator=generator)


class TokenizerTask:
    """Stage 1: squared error of the reconstruction plus the commitment loss."""

    name = "tokenizer"

    def __init__(self, preset: Stages, digits: Digits) -> None:
        self.config = preset.tokenizer_training
        self.model_config = to_dict(preset.tokenizer)
        self._shape = preset.tokenizer
        self._source = ImageSource(digits, self.config.shift_augmentation)

    def build(self) -> Tokenizer:
        """A freshly initialised tokenizer."""
        return Tokenizer(self._shape)

    def loss(self, model: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch; see `Task`."""
        images = self._source.images[self._source.draw(self.config.batch_size, generator)]
        reconstruction, quantized = model(images)
        error = F.mse_loss(reconstruction, images)
        loss = error + self._shape.commitment_weight * quantized.commitment
        return loss, {"rmse": math.sqrt(error.item()), "commit": quantized.commitment.item()}

    def after_step(self, model: nn.Module, generator: torch.Generator, step: int) -> None:
        """Restart dead codes on the first step, then every 50 for the first part of training."""
        assert isinstance(model, Tokenizer)
        if step % RESTART_EVERY == 0 and step < self.config.code_restart_steps:
            images = self._source.images[self._source.draw(self.config.batch_size, generator)]
            with torch.no_grad():
                encoded = model.encoder(images)
            model.quantizer.restart_dead_codes(encoded, generator)


class TransformerTask:
    """Stage 2: predict the masked tokens (masked visual token modelling)."""

    name = "transformer"

    def __init__(self, preset: Stages, tokenizer: Tokenizer, digits: Digits) -> None:
        self.config = preset.transformer_training
        self.model_config = to_dict(preset.transformer)
        self._shape = preset.transformer
        self._source = ImageSource(digits, self.config.shift_augmentation)
        with torch.no_grad():
            self._tokens = tokenizer.eval().encode(self._source.images)

    def build(self) -> MaskGitTransformer:
        """A freshly initialised transformer."""
        return MaskGitTransformer(self._shape)

    def loss(self, model: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch; the head runs on masked positions alone. See `Task`."""
        assert isinstance(model, MaskGitTransformer)
        rows = self._source.draw(self.config.batch_size, generator)
        tokens, classes = self._tokens[rows], self._source.labels[rows]
        if self.config.class_dropout:
            dropped = torch.rand(len(rows), generator=generator) < self.config.class_dropout
            classes = classes.masked_fill(dropped, self._shape.num_classes)
        masked = draw_mask(tokens.shape, self.config.mask_schedule, generator)
        hidden = model.hidden(tokens.masked_fill(masked, self._shape.mask_token_id), classes)
        logits, target = model.logits(hidden[masked]), tokens[masked]
        loss = F.cross_entropy(logits, target, label_smoothing=self.config.label_smoothing)
        accuracy = (logits.argmax(-1) == target).float().mean().item()
        return loss, {"nll": loss.item(), "accuracy": accuracy}

    def after_step(self, model: nn.Module, generator: torch.Generator, step: int) -> None:
        """Nothing to do."""


def draw_mask(shape: torch.Size, schedule: str, generator: torch.Generator) -> Tensor:
    """Random mask (B, N) bool: per row `ceil(N * gamma(u))` positions, u uniform in (0, 1]."""
    batch, length = shape
    ratios = 1.0 - torch.rand(batch, generator=generator, dtype=torch.float64)
    counts = [masked_count(r, schedule, length) for r in ratios.tolist()]
    order = torch.rand(batch, length, generator=generator).argsort(1).argsort(1)
    return order < torch.tensor(counts).unsqueeze(1)


def masked_count(ratio: float, schedule: str, length: int) -> int:
    """Positions to mask, at least 1 and at most `length`."""
    return min(length, max(1, math.ceil(length * float(gamma(ratio, schedule, length)))))
