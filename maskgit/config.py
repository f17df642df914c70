"""Configurations of tokenizer, transformer, training and generation, and the named presets.

Everything here is plain frozen dataclasses, so that a configuration can be printed, compared,
hashed and written into a checkpoint's metadata as JSON.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from maskgit.kernels.common.names import unknown

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration has an unknown field, a field of the wrong type, or an impossible value."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Shape of the VQ tokenizer: encoder, codebook, decoder.

    `channel_mults` has one entry per resolution; the image is halved between entries, so an image
    of `image_size` becomes a grid of `image_size / 2**(len(channel_mults) - 1)` tokens a side.
    """

    image_size: int
    image_channels: int
    channels: int
    channel_mults: tuple[int, ...]
    num_res_blocks: int
    codebook_size: int
    embedding_dim: int
    norm_groups: int = 32
    commitment_weight: float = 0.25
    codebook_decay: float = 0.99

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "image_size",
            "image_channels",
            "channels",
            "num_res_blocks",
            "codebook_size",
            "embedding_dim",
            "norm_groups",
        )
        if not self.channel_mults or min(self.channel_mults) < 1:
            raise ConfigError(
                f"channel_mults: expected positive integers, got {self.channel_mults}"
            )
        if self.image_size % self.downsampling:
            raise ConfigError(
                f"image_size: expected a multiple of {self.downsampling}, got {self.image_size}"
            )
        for mult in self.channel_mults:
            if (self.channels * mult) % self.norm_groups:
                raise ConfigError(
                    f"norm_groups: {self.norm_groups} does not divide {self.channels * mult}"
                )

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return 1 << (len(self.channel_mults) - 1)

    @property
    def grid_size(self) -> int:
        """Tokens along one side of the image."""
        return self.image_size // self.downsampling

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        return self.grid_size**2


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the bidirectional transformer.

    Vocabulary: codes `0 .. codebook_size - 1`, then one id per class, then (if `null_class`) the
    "no class" id of classifier-free guidance, then the mask id.
    """

    codebook_size: int
    num_classes: int
    num_tokens: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    null_class: bool = False

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "codebook_size",
            "num_classes",
            "num_tokens",
            "hidden_size",
            "num_layers",
            "num_heads",
            "mlp_size",
        )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads: {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")

    @property
    def null_class_id(self) -> int | None:
        """Token id of "no class", or None for a model trained without it."""
        return self.codebook_size + self.num_classes if self.null_class else None

    @property
    def mask_token_id(self) -> int:
        """Token id of a masked position: the last of the vocabulary."""
        return self.codebook_size + self.num_classes + int(self.null_class)

    @property
    def vocab_size(self) -> int:
        """Rows of the word embedding: codes, classes, "no class" if any, mask."""
        return self.mask_token_id + 1


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one of the two stages."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.96
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    label_smoothing: float = 0.1
    class_dropout: float = 0.0
    mask_schedule: str = "cosine"
    shift_augmentation: bool = False
    code_restart_steps: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "batch_size", "learning_rate")
        for name in ("label_smoothing", "class_dropout", "ema_decay"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name}: expected a number in [0, 1], got {value}")


@dataclass(frozen=True)
class GenerateConfig:
    """Default settings of generation. `guidance_scale` 1 means no guidance."""

    rule: str = "maskgit"
    num_steps: int = 8
    choice_temperature: float = 4.5
    sample_temperature: float = 1.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "num_steps")
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


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain dicts, lists and numbers, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: Any) -> T:
    """Build the configuration dataclass `cls` from what `to_dict` gave, checking names and types.

    Raises ConfigError naming the field that is missing, unknown or of the wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{cls.__name__}: expected an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{cls.__name__}: unknown field {unknown[0]!r}")
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _coerce(f"{cls.__name__}.{name}", hints[name], data[name])
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{cls.__name__}: field {name!r} is missing")
    return cls(**values)


def _coerce(where: str, hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_coerce(where, typing.get_args(hint)[0], v) for v in value)
    if isinstance(hint, types.UnionType):
        raise ConfigError(f"{where}: unsupported field type {hint}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name}: expected more than 0, got {getattr(config, name)}")


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
