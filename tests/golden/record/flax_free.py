"""What the recorders of JAX codebases share: flax's dataclass, and noise that is kept.

`lax.while_loop` runs as a Python loop under `jax.disable_jit()`, so that every array is there to be
kept.  The noise is jax's own: the wrapped functions keep the Gumbel noise of the key they are given.
"""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fake_flax() -> None:
    """`flax.struct.dataclass`, and the name of the array type that jax has given up."""

    def dataclass(cls: type) -> type:
        return jax.tree_util.register_dataclass(dataclasses.dataclass(cls))

    flax = SimpleNamespace(struct=SimpleNamespace(dataclass=dataclass))
    sys.modules.setdefault("flax", flax)  # type: ignore[arg-type]
    if not hasattr(jnp, "DeviceArray"):
        jnp.DeviceArray = jax.Array


def keep_states(module: Any) -> list[Any]:
    """The loop states that `module` makes from now on; the first is the initial one."""
    states, make = [], module.State

    def state(**fields: Any) -> Any:
        states.append(make(**fields))
        return states[-1]

    module.State = state
    return states


class JaxNoise:
    """Keeps what `jax.random.categorical` and `gumbel` draw: lists `token` and `choice`."""

    def __init__(self) -> None:
        self.token: list[np.ndarray] = []
        self.choice: list[np.ndarray] = []

    def __enter__(self) -> JaxNoise:
        self.saved = jax.random.categorical, jax.random.gumbel
        categorical, gumbel = self.saved

        def keep_categorical(key: Any, logits: Any, axis: int = -1) -> Any:
            noise = gumbel(key, logits.shape, logits.dtype)
            out = categorical(key, logits, axis)
            assert (out == jnp.argmax(logits + noise, axis)).all()
            self.token.append(np.asarray(noise))
            return out

        def keep_gumbel(key: Any, shape: Any = (), dtype: Any = None) -> Any:
            self.choice.append(np.asarray(gumbel(key, shape, dtype or jnp.float32)))
            return jnp.asarray(self.choice[-1])

        jax.random.categorical, jax.random.gumbel = keep_categorical, keep_gumbel
        return self

    def __exit__(self, *error: object) -> None:
        jax.random.categorical, jax.random.gumbel = self.saved
