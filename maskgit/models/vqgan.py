"""VQ image tokenizer: convolutional encoder, nearest-code quantiser, convolutional decoder.

Layout and details follow google-research/maskgit (`maskgit/nets/vqgan_tokenizer.py`): residual
blocks of GroupNorm, swish, 3x3 convolution; no attention; average pooling down, nearest neighbour
up. The codebook is trained by exponential moving averages (van den Oord et al. 2017, appendix A)
with dead codes restarted from encoder outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.models.config import TokenizerConfig

NORM_EPS = 1e-6


class ResBlock(nn.Module):
    """Residual block of the official tokenizer.

    Where the width changes, the 1x1 shortcut is applied to the *branch's output*, as the official
    code does and its published weights need (so its kernel is out x out, and the sum no longer
    contains the block's input).
    """

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(y))


def _res_blocks(count: int, in_channels: int, out_channels: int, norm_groups: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * count
    return nn.ModuleList(ResBlock(widths[i], widths[i + 1], norm_groups) for i in range(count))


class Encoder(nn.Module):
    """Image to a grid of embeddings, one per token."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_mults]
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1, bias=False)
        self.levels = nn.ModuleList()
        previous = config.channels
        for width in widths:
            self.levels.append(
                _res_blocks(config.num_res_blocks, previous, width, config.norm_groups)
            )
            previous = width
        self.mid = _res_blocks(config.num_res_blocks, previous, previous, config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, previous, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(previous, config.embedding_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, embedding_dim, grid, grid)."""
        x = self.conv_in(images)
        for i, level in enumerate(self.levels):
            if i:
                x = F.avg_pool2d(x, 2)
            for block in level:
                x = block(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Grid of code vectors to an image."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.channel_mults)]
        self.conv_in = nn.Conv2d(config.embedding_dim, widths[0], 3, padding=1)
        self.mid = _res_blocks(config.num_res_blocks, widths[0], widths[0], config.norm_groups)
        self.levels = nn.ModuleList()
        self.upsample = nn.ModuleList()
        previous = widths[0]
        for i, width in enumerate(widths):
            self.levels.append(
                _res_blocks(config.num_res_blocks, previous, width, config.norm_groups)
            )
            if i < len(widths) - 1:
                self.upsample.append(nn.Conv2d(width, width, 3, padding=1))
            previous = width
        self.norm_out = nn.GroupNorm(config.norm_groups, previous, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(previous, config.image_channels, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, embedding_dim, grid, grid) -> (B, C, H, W), nominally in [0, 1] but not clamped."""
        x = self.conv_in(codes)
        for block in self.mid:
            x = block(x)
        for i, level in enumerate(self.levels):
            for block in level:
                x = block(x)
            if i < len(self.upsample):
                x = self.upsample[i](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantized(NamedTuple):
    """What the quantiser gives back."""

    codes: Tensor  # (B, D, h, w): code vectors, with the straight-through gradient
    tokens: Tensor  # (B, h * w) int64, row-major
    commitment: Tensor  # scalar: mean squared distance of encoder outputs to their codes


class Quantizer(nn.Module):
    """Nearest-code quantiser, codebook (K, D) trained by moving averages.

    The averages are buffers, so a checkpoint resumes them exactly.
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        size, dim = config.codebook_size, config.embedding_dim
        self.decay = config.codebook_decay
        self.register_buffer("codebook", torch.randn(size, dim))
        self.register_buffer("ema_count", torch.ones(size))
        self.register_buffer("ema_sum", self.codebook.clone())

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index (M,) int64 of the code nearest to each of vectors (M, D); ties to the lowest."""
        vectors = vectors.float()
        codebook = self.codebook.float()
        distance = codebook.square().sum(1) - 2.0 * (vectors @ codebook.t())
        return distance.argmin(1)

    def forward(self, encoded: Tensor) -> Quantized:
        """Quantise encoded (B, D, h, w); updates the moving averages in training mode."""
        batch, dim, height, width = encoded.shape
        flat = encoded.permute(0, 2, 3, 1).reshape(-1, dim)
        tokens = self.nearest(flat.detach())
        if self.training:
            self._update(flat.detach().float(), tokens)
        codes = F.embedding(tokens, self.codebook)
        commitment = F.mse_loss(flat, codes)
        straight = flat + (codes - flat).detach()
        grid = straight.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
        return Quantized(grid, tokens.reshape(batch, height * width), commitment)

    @torch.no_grad()
    def _update(self, flat: Tensor, tokens: Tensor) -> None:
        size = self.codebook.shape[0]
        count = torch.bincount(tokens, minlength=size).to(flat.dtype)
        total = torch.zeros_like(self.ema_sum).index_add_(0, tokens, flat)
        self.ema_count.lerp_(count, 1.0 - self.decay)
        self.ema_sum.lerp_(total, 1.0 - self.decay)
        self.codebook.copy_(self.ema_sum / self.ema_count.clamp_min(1e-5).unsqueeze(1))

    @torch.no_grad()
    def restart_dead_codes(
        self, encoded: Tensor, generator: torch.Generator, min_count: float = 0.1
    ) -> int:
        """Move codes used less than `min_count` times a batch onto random rows of encoded.

        encoded is (B, D, h, w). Returns how many codes were moved.
        """
        flat = encoded.permute(0, 2, 3, 1).reshape(-1, encoded.shape[1]).float()
        dead = (self.ema_count < min_count).nonzero().squeeze(1)
        rows = torch.randint(flat.shape[0], (len(dead),), generator=generator)
        self.codebook[dead] = flat[rows]
        self.ema_sum[dead] = flat[rows]
        self.ema_count[dead] = 1.0
        return len(dead)


class Tokenizer(nn.Module):
    """Encoder, quantiser and decoder of images (B, C, H, W) in [0, 1]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstruction (B, C, H, W) and the quantiser's output, for training."""
        quantized = self.quantizer(self.encoder(images))
        return self.decoder(quantized.codes), quantized

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> tokens (B, num_tokens) int64, row-major."""
        size, channels = self.config.image_size, self.config.image_channels
        if images.ndim != 4 or tuple(images.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"images: expected shape (B, {channels}, {size}, {size}), got {tuple(images.shape)}"
            )
        encoded = self.encoder(images)
        flat = encoded.permute(0, 2, 3, 1).reshape(-1, encoded.shape[1])
        return self.quantizer.nearest(flat).reshape(len(images), self.config.num_tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, num_tokens) in 0 .. codebook_size - 1 -> images (B, C, H, W) in [0, 1]."""
        grid, size = self.config.grid_size, self.config.codebook_size
        if tokens.ndim != 2 or tokens.shape[1] != grid * grid:
            raise ValueError(
                f"tokens: expected shape (B, {grid * grid}), got {tuple(tokens.shape)}"
            )
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= size):
            low, high = int(tokens.min()), int(tokens.max())
            raise ValueError(f"tokens: expected ids in 0..{size - 1}, got {low}..{high}")
        codes = F.embedding(tokens, self.quantizer.codebook)
        codes = codes.reshape(len(tokens), grid, grid, self.config.embedding_dim)
        codes = codes.permute(0, 3, 1, 2)
        return self.decoder(codes).clamp(0.0, 1.0)
