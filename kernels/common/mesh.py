"""Over which mesh of chips jax's backends are to run, if over one: `maskgit.sharded(mesh)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sharding:
    """A mesh, the axis that batches are split over, and the one that vocabularies are split over."""

    mesh: Any
    batch: str | None
    vocab: str | None


_active: ContextVar[Sharding | None] = ContextVar("_active", default=None)


@contextlib.contextmanager
def sharded(
    mesh: Any, *, batch: str | None = "data", vocab: str | None = "model"
) -> Iterator[None]:
    """In this block decode steps on jax arrays run on a mesh: sequences over one axis, tokens over another.

    Args:
        mesh: a `jax.sharding.Mesh` whose axes are of type Auto.
        batch: its axis that the B sequences are split over; None to keep them together.
        vocab: its axis that the V columns of logits are split over; None to keep them together.

    Raises:
        TypeError, ValueError: no mesh, axes of another type or that the mesh does not have, or one axis
            for both.

    Semantics: the same tokens as on one device.  With the vocabulary split, V must be a multiple of 128
    for each shard (pad the head's rows, and name the real columns by vocab_slice=(0, V)); chips exchange
    4 bytes a row for each of at most 8 reductions, never logits.  Rules with filters need the whole row:
    split the batch alone.  Eager or under `jax.jit`; `generate` in the block is sharded as its steps are.  A
    jitted function of yours keeps what it was traced with: trace it in the block.
    """
    if not hasattr(mesh, "axis_names"):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}")
    if batch is not None and batch == vocab:
        raise ValueError(f"mesh: expected two axes, got {batch!r} for batch and vocab")
    for name in (batch, vocab):
        if name is not None and name not in mesh.axis_names:
            raise ValueError(f"mesh: expected an axis {name!r}, got {', '.join(mesh.axis_names)}")
    if any(kind.name != "Auto" for kind in mesh.axis_types):
        raise ValueError(
            "mesh: expected axes of type Auto, as jax.sharding.Mesh makes them and jax.make_mesh with "
            f"axis_types=(jax.sharding.AxisType.Auto, ...), got {mesh.axis_types}"
        )
    token = _active.set(Sharding(mesh, batch, vocab))
    try:
        yield
    finally:
        _active.reset(token)


def active() -> Sharding | None:
    """The mesh of the block around the call."""
    return _active.get()
