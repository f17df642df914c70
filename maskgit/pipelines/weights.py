"""A tokenizer and a transformer in one file, for inference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskgit.checkpoint import CheckpointError, check_tensors, load_checkpoint, save_checkpoint
from maskgit.files import WEIGHTS
from maskgit.models.transformer import MaskGitTransformer
from maskgit.models.vqgan import Tokenizer
from maskgit.pipelines.recipes import PresetConfig
from maskgit.settings import ConfigError, from_dict, to_dict

TRAINING_ONLY = ("tokenizer.quantizer.ema_count", "tokenizer.quantizer.ema_sum")


@dataclass(frozen=True)
class Weights:
    """A tokenizer and a transformer ready to use, in eval mode, float32."""

    config: PresetConfig
    tokenizer: Tokenizer
    transformer: MaskGitTransformer
    info: dict[str, Any]


def save_weights(
    path: str | Path,
    config: PresetConfig,
    tokenizer: nn.Module,
    transformer: nn.Module,
    *,
    info: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write both models for inference (without what only training needs) as `dtype`."""
    tensors = {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()}
    tensors.update({f"transformer.{k}": v for k, v in transformer.state_dict().items()})
    kept = {k: v.to(dtype) for k, v in tensors.items() if k not in TRAINING_ONLY}
    return save_checkpoint(path, kept, kind=WEIGHTS, config=to_dict(config), info=info)


def load_weights(path: str | Path) -> Weights:
    """Read a file written by `save_weights` and build both models from the configuration in it.

    Raises CheckpointError, naming the tensor or field, when anything does not fit.
    """
    checkpoint = load_checkpoint(path, kind=WEIGHTS)
    try:
        config = from_dict(PresetConfig, checkpoint.config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: bad configuration: {error}") from error
    with torch.device("meta"):
        tokenizer, transformer = Tokenizer(config.tokenizer), MaskGitTransformer(config.transformer)
    want = {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()}
    want.update({f"transformer.{k}": v for k, v in transformer.state_dict().items()})
    check_tensors(path, checkpoint.tensors, _without(want, TRAINING_ONLY))
    tensors = {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
    for name in TRAINING_ONLY:
        tensors[name] = torch.zeros(want[name].shape)
    for prefix, module in (("tokenizer.", tokenizer), ("transformer.", transformer)):
        part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        module.load_state_dict(part, assign=True)
        module.eval().requires_grad_(False)
    return Weights(config, tokenizer, transformer, checkpoint.info)


def _without(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    dropped = set(names)
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}
