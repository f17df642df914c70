"""The shapes at which masked models run, by name, and the parsing of shapes given by hand."""

from __future__ import annotations

import re
from dataclasses import dataclass

from maskgit.kernels.common.names import did_you_mean

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """Logits (batch, length, vocab): B sequences of N positions over V tokens."""

    name: str
    batch: int
    length: int
    vocab: int
    source: str

    @property
    def rows(self) -> int:
        """B x N."""
        return self.batch * self.length

    def num_bytes(self, dtype: str) -> int:
        """Size of the logits in `dtype`."""
        return self.rows * self.vocab * ITEM_SIZES[dtype]

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.length}x{self.vocab}"
        return sizes if self.name == sizes else f"{self.name} ({sizes})"


_SHAPES = (
    Shape("maskgit-256-one", 1, 256, 1024, "MaskGIT ImageNet 256, one image: 16 x 16 tokens"),
    Shape("maskgit-256", 64, 256, 1024, "MaskGIT ImageNet 256, a batch of 64"),
    Shape("maskgit-512", 8, 1024, 1024, "MaskGIT ImageNet 512: 32 x 32 tokens"),
    Shape("titok-l-32", 64, 32, 4096, "TiTok-L: 32 tokens an image"),
    Shape("titok-s-128", 64, 128, 4096, "TiTok-S: 128 tokens an image"),
    Shape("maskbit-14", 8, 512, 128, "MaskBit, 14 bits: 256 positions of 2 sub-tokens"),
    Shape("amused-256", 8, 256, 8192, "aMUSEd 256, Show-o, MMaDA: 16 x 16 tokens of 8192"),
    Shape("amused-512", 2, 1024, 8192, "aMUSEd 512: 32 x 32 tokens of 8192"),
    Shape("muse-256", 32, 256, 8192, "Muse base, a batch of 32"),
    Shape("meissonic", 1, 4096, 8192, "Meissonic 1024: 64 x 64 tokens"),
    Shape("magvit-v2", 4, 1280, 262144, "MAGVIT-v2 video tokens, codebook 2^18"),
    Shape("soundstorm", 1, 1500, 1024, "SoundStorm: 30 s of one codec level"),
    Shape("maskgct-t2s", 1, 1500, 8192, "MaskGCT text to semantic tokens: 30 s"),
    Shape("mdlm", 8, 1024, 50258, "MDLM, ReMDM: GPT-2 vocabulary and mask"),
    Shape("llada-block-one", 1, 32, 126464, "LLaDA-8B, a block of 32, one sequence"),
    Shape("llada-block", 8, 32, 126464, "LLaDA-8B, a block of 32, 8 sequences"),
    Shape("llada-full", 1, 4096, 126464, "LLaDA-8B, all rows of a full context, uncached"),
    Shape("llada2-block", 1, 32, 157184, "LLaDA2, a block of 32"),
    Shape("dream-block", 1, 32, 152064, "Dream-7B, a block of 32"),
    Shape("sdar-block", 1, 4, 151936, "SDAR (Qwen3 vocabulary), a block of 4"),
)
SHAPES = {shape.name: shape for shape in _SHAPES}


def parse_shape(text: str) -> Shape:
    """A named shape, "ROWSxVOCAB" or "BATCHxLENGTHxVOCAB".

    Raises:
        ValueError: none of these, or a size below 1.
    """
    if text in SHAPES:
        return SHAPES[text]
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)", text.strip())
    sizes = [int(group) for group in match.groups(default="1")] if match else [0]
    if not match or min(sizes) < 1:
        raise ValueError(
            f"shape: expected ROWSxVOCAB (64x126464), BATCHxLENGTHxVOCAB (8x256x1024) or one of "
            f"{', '.join(SHAPES)}, got {text!r}{did_you_mean(SHAPES, text)}"
        )
    batch, length, vocab = sizes
    return Shape(f"{batch}x{length}x{vocab}", batch, length, vocab, "given by hand")
