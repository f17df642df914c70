"""Shapes of the tokenizer and of the transformer."""

from __future__ import annotations

from dataclasses import dataclass

from maskgit.settings import ConfigError, require_positive


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
        require_positive(
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
        require_positive(
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
