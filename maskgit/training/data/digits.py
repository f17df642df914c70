"""The handwritten digits of scikit-learn (8x8, ten classes, 1797 images) as training data.

The set ships with scikit-learn (UCI "Optical Recognition of Handwritten Digits", E. Alpaydin and
C. Kaynak, 1998, CC BY 4.0), so it needs no download.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 8
NUM_CLASSES = 10
MAX_INTENSITY = 16.0
TEST_EVERY = 5
SHIFTS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
MAX_LOST_INK = 0.5

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) float32 in [0, 1] and labels (n,) int64."""

    images: FloatArray
    labels: IntArray


def load_split() -> tuple[Digits, Digits]:
    """Training and held-out test digits.

    Every fifth image of each class is held out (stratified, fixed, independent of any random
    generator): 1434 images to train on, 363 to test on.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / MAX_INTENSITY).astype(np.float32)[:, None]
    labels = data.target.astype(np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(NUM_CLASSES):
        held_out[np.flatnonzero(labels == label)[::TEST_EVERY]] = True
    train = Digits(images[~held_out], labels[~held_out])
    return train, Digits(images[held_out], labels[held_out])


def with_shifts(digits: Digits) -> tuple[Digits, IntArray]:
    """Every shift of every digit by at most one pixel that pushes no ink out of the frame.

    "No ink" is at most half of one full pixel. Returns the shifted digits, and for each the index
    of the digit that it was made from; the unshifted digit is always among them.
    """
    images, labels, sources = [], [], []
    for shift in SHIFTS:
        moved = _shift(digits.images, *shift)
        kept = digits.images.sum((1, 2, 3)) - moved.sum((1, 2, 3)) <= MAX_LOST_INK
        images.append(moved[kept])
        labels.append(digits.labels[kept])
        sources.append(np.flatnonzero(kept))
    return Digits(np.concatenate(images), np.concatenate(labels)), np.concatenate(sources)


def _shift(images: FloatArray, dy: int, dx: int) -> FloatArray:
    size = IMAGE_SIZE
    moved = np.zeros_like(images)
    to_y, from_y = slice(max(dy, 0), size + min(dy, 0)), slice(max(-dy, 0), size + min(-dy, 0))
    to_x, from_x = slice(max(dx, 0), size + min(dx, 0)), slice(max(-dx, 0), size + min(-dx, 0))
    moved[:, :, to_y, to_x] = images[:, :, from_y, from_x]
    return moved
