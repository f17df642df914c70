"""Whole recipes, the named presets: a tokenizer, a transformer, how to train and how to sample them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from maskgit.kernels.common.names import unknown
from maskgit.models.config import TokenizerConfig, TransformerConfig
from maskgit.settings import ConfigError, require_positive
from maskgit.training.config import TrainConfig


@dataclass(frozen=True)
class GenerateConfig:
    """Default settings of generation. `guidance_scale` 1 means no guidance."""

    rule: str = "maskgit"
    num_steps: int = 8
    choice_temperature: float = 4.5
    sample_temperature: float = 1.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "num_steps")
        for name in ("choice_temperature", "sample_temperature", "guidance_scale"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class PresetConfig:
    """A tokenizer, a transformer over its tokens, and how to train and to sample them."""

    name: str
    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    tokenizer_training: TrainConfig
    transformer_training: TrainConfig
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        for name in ("codebook_size", "num_tokens"):
            of_tokenizer, of_model = getattr(self.tokenizer, name), getattr(self.transformer, name)
            if of_tokenizer != of_model:
                raise ConfigError(
                    f"{name}: the tokenizer has {of_tokenizer}, the transformer {of_model}"
                )


def _official(name: str, num_heads: int) -> PresetConfig:
    """The 256x256 ImageNet models of Chang et al. 2022 (arXiv:2202.04200)."""
    return PresetConfig(
        name=name,
        tokenizer=TokenizerConfig(
            image_size=256,
            image_channels=3,
            channels=128,
            channel_mults=(1, 1, 2, 2, 4),
            num_res_blocks=2,
            codebook_size=1024,
            embedding_dim=256,
        ),
        transformer=TransformerConfig(
            codebook_size=1024,
            num_classes=1000,
            num_tokens=256,
            hidden_size=768,
            num_layers=24,
            num_heads=num_heads,
            mlp_size=3072,
        ),
        tokenizer_training=TrainConfig(steps=1_000_000, batch_size=256, learning_rate=1e-4),
        transformer_training=TrainConfig(
            steps=1_500_000, batch_size=256, learning_rate=1e-4, warmup_steps=5000
        ),
        generate=GenerateConfig(num_steps=12),
    )


def _digits() -> PresetConfig:
    """8x8 handwritten digits, one token per pixel; trains on one CPU core."""
    return PresetConfig(
        name="digits",
        tokenizer=TokenizerConfig(
            image_size=8,
            image_channels=1,
            channels=32,
            channel_mults=(1,),
            num_res_blocks=1,
            codebook_size=16,
            embedding_dim=4,
            norm_groups=8,
        ),
        transformer=TransformerConfig(
            codebook_size=16,
            num_classes=10,
            num_tokens=64,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            mlp_size=384,
            attention_dropout=0.0,
            null_class=True,
        ),
        tokenizer_training=TrainConfig(
            steps=1500,
            batch_size=64,
            learning_rate=2e-3,
            ema_decay=0.99,
            shift_augmentation=True,
            code_restart_steps=750,
        ),
        transformer_training=TrainConfig(
            steps=4000,
            batch_size=64,
            learning_rate=1e-3,
            warmup_steps=200,
            weight_decay=0.05,
            ema_decay=0.998,
            label_smoothing=0.0,
            class_dropout=0.1,
            shift_augmentation=True,
        ),
        generate=GenerateConfig(guidance_scale=1.5),
    )


def preset(name: str) -> PresetConfig:
    """The named preset; ValueError with the legal names for any other."""
    builders: dict[str, Callable[[], PresetConfig]] = {
        "digits": _digits,
        "maskgit-paper": lambda: _official("maskgit-paper", num_heads=8),
        "maskgit-official": lambda: _official("maskgit-official", num_heads=16),
    }
    if name not in builders:
        raise ConfigError(unknown("preset", builders, name))
    return builders[name]()


PRESETS = ("digits", "maskgit-paper", "maskgit-official")
