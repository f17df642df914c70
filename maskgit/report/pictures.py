"""Reading images as small grey arrays, and drawing grids and refinement strips as PNG.

Arrays hold ink: 0 is paper, 1 is full ink. Pictures show dark ink on light paper.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskgit.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

PAPER = np.array([255, 255, 255], dtype=np.float32)
INK = np.array([22, 28, 45], dtype=np.float32)
BACKGROUND = (236, 238, 242)
LABEL = (70, 76, 92)
MASKED = (196, 203, 217)
HATCH = (160, 170, 190)
GAP = 6
MARGIN = 12
MAX_PIXELS = 50_000_000

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


class ImageError(ValueError):
    """An image file cannot be read, or is not usable."""


def read_gray(path: str | Path, size: int, *, invert: bool | None = None) -> FloatArray:
    """Read any image file as ink (size, size) float32 in [0, 1].

    Transparency is laid on white, colours become luminance, a frame that is not square is padded
    with its border's shade, and the area is averaged down (or up). `invert` says whether dark is
    ink; by default it is when the border is light. Raises ImageError when the file is absent,
    empty, not an image, corrupt, or absurdly large.
    """
    from PIL import Image

    light = _read_light(Path(path))
    height, width = light.shape
    border = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
    shade = float(np.median(border))
    side = max(height, width)
    square = np.full((side, side), shade, dtype=np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = light
    small = Image.fromarray(square).resize((size, size), Image.Resampling.BOX)
    gray = np.asarray(small, dtype=np.float32).clip(0.0, 1.0)
    dark_is_ink = shade > 0.5 if invert is None else invert
    return np.ascontiguousarray(1.0 - gray if dark_is_ink else gray)


def _read_light(path: Path) -> FloatArray:
    """Lightness (H, W) in [0, 1] of an image file."""
    from PIL import Image

    try:
        if path.is_dir():
            raise ImageError(f"{path}: expected an image file, got a directory")
        data = path.read_bytes()
        if not data:
            raise ImageError(f"{path}: the file is empty")
        with Image.open(io.BytesIO(data)) as image:
            if max(image.width, image.height) ** 2 > MAX_PIXELS:  # it is padded to a square
                raise ImageError(f"{path}: {image.width} x {image.height} pixels is too large")
            image.load()
            return _lightness(image)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: not a readable image ({error})") from error


def _lightness(image: Image) -> FloatArray:
    from PIL import Image as PilImage

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float32)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if image.mode.startswith("I") and low >= 0:
            low, high = 0.0, 255.0 if high <= 255 else 65535.0
        scaled: FloatArray = np.nan_to_num((values - low) / max(high - low, 1e-12))
        return scaled.clip(0.0, 1.0)
    rgba = image.convert("RGBA")
    white = PilImage.new("RGBA", rgba.size, (255, 255, 255, 255))
    gray = PilImage.alpha_composite(white, rgba).convert("L")
    return np.asarray(gray, dtype=np.float32) / 255.0


def tile(image: FloatArray, scale: int, masked: BoolArray | None = None) -> Image:
    """Ink (H, W) as an RGB picture, `scale` pixels per pixel, nearest neighbour.

    `masked` (h, w), with h and w dividing H and W, marks token cells to be drawn hatched.
    """
    from PIL import Image as PilImage
    from PIL import ImageDraw

    ink = np.clip(image, 0.0, 1.0)[..., None]
    rgb = (PAPER + ink * (INK - PAPER)).round().astype(np.uint8)
    picture = PilImage.fromarray(rgb.repeat(scale, 0).repeat(scale, 1))
    if masked is not None and masked.any():
        cell = scale * image.shape[0] // masked.shape[0]
        stencil = PilImage.fromarray((masked * np.uint8(255)).repeat(cell, 0).repeat(cell, 1))
        picture.paste(_hatching(picture.size), mask=stencil)
        draw = ImageDraw.Draw(picture)
        for y, x in zip(*np.nonzero(masked), strict=True):
            corner = (x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1)
            draw.rectangle(corner, outline=BACKGROUND)
    return picture


def _hatching(size: tuple[int, int]) -> Image:
    from PIL import Image as PilImage

    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    lines = ((x + y) % 6 < 2)[..., None]
    return PilImage.fromarray(np.where(lines, HATCH, MASKED).astype(np.uint8))


def grid(
    rows: Sequence[Sequence[FloatArray]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    masked: Sequence[Sequence[BoolArray | None]] | None = None,
    scale: int = 8,
) -> Image:
    """Rows of equally large ink images as one picture, with labels at the left and above."""
    from PIL import Image as PilImage
    from PIL import ImageDraw

    if not rows or not rows[0]:
        raise ValueError("rows: expected at least one image")
    height, width = (side * scale for side in rows[0][0].shape)
    font = _font(max(11, min(20, height // 4)))
    left = MARGIN + (_text_width(font, row_labels) + MARGIN if row_labels else 0)
    top = MARGIN + (_font_height(font) + GAP if column_labels else 0)
    columns = max(len(row) for row in rows)
    size = (
        left + columns * (width + GAP) - GAP + MARGIN,
        top + len(rows) * (height + GAP) - GAP + MARGIN,
    )
    picture = PilImage.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        y = top + r * (height + GAP)
        if r < len(row_labels):
            draw.text((MARGIN, y + height / 2), row_labels[r], LABEL, font, anchor="lm")
        for c, image in enumerate(row):
            mask = masked[r][c] if masked is not None else None
            picture.paste(tile(image, scale, mask), (left + c * (width + GAP), y))
    _draw_column_labels(draw, column_labels, font, left, width)
    return picture


def _draw_column_labels(
    draw: ImageDraw, labels: Sequence[str], font: FreeTypeFont | ImageFont, left: int, width: int
) -> None:
    for c, label in enumerate(labels):
        x = left + c * (width + GAP) + width / 2
        draw.text((x, MARGIN), label, LABEL, font, anchor="mt")


def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_width(font: FreeTypeFont | ImageFont, labels: Sequence[str]) -> int:
    return max(round(font.getlength(label)) for label in labels)


def _font_height(font: FreeTypeFont | ImageFont) -> int:
    return round(font.getbbox("0g")[3])


def png_bytes(picture: Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_png(picture: Image, path: str | Path) -> Path:
    """Write a PNG file, whole or not at all; OSError names the path when it cannot be written."""
    return atomic_write(path, png_bytes(picture))
