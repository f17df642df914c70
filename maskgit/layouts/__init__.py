"""Layouts of the field as the (B, N, V) of `decode_step`, and back, as views where strides allow it.

B is the batch, N positions, V columns.  Nothing here copies logits, with three exceptions that are
named where they apply: `pair_factors` (a sum), arrays whose strides do not allow the view, and jax,
where every view is an operation that the compiler fuses or copies as it likes.
"""

from .steps import decode_shifted, decode_spans
from .views import (
    PaddedBatch,
    flatten_factors,
    from_v_major,
    pad_left,
    pair_factors,
    rvq_level,
    split_pairs,
    to_grid,
    unflatten_factors,
    with_level,
)

__all__ = [
    "PaddedBatch",
    "decode_shifted",
    "decode_spans",
    "flatten_factors",
    "from_v_major",
    "pad_left",
    "pair_factors",
    "rvq_level",
    "split_pairs",
    "to_grid",
    "unflatten_factors",
    "with_level",
]
