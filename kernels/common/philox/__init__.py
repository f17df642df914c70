"""The library's one random stream; a form of it for each language that kernels are written in."""

from .stream import (
    GROUPS,
    LEAF,
    PER_GROUP,
    STREAM_CHOICE,
    STREAM_INNER,
    STREAM_LEAF,
    STREAM_REPLACE,
    gumbel,
    gumbel_from_words,
    philox4x32,
    seed_words,
)

__all__ = [
    "GROUPS",
    "LEAF",
    "PER_GROUP",
    "STREAM_CHOICE",
    "STREAM_INNER",
    "STREAM_LEAF",
    "STREAM_REPLACE",
    "gumbel",
    "gumbel_from_words",
    "philox4x32",
    "seed_words",
]
