"""The loop in JAX: one compiled program from the masked tokens to the result.

    python examples/jax_loop.py --steps 4

Needs the extra `jax`.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp

import maskgit

VOCAB, LENGTH = 50, 16
MASK = VOCAB


def logits_of(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Stands for your model: tokens (B, N) -> logits (B, N, VOCAB)."""
    x = params["embed"][tokens]
    return jnp.tanh(x + jnp.roll(x, 1, axis=1)) @ params["head"]


@partial(jax.jit, static_argnames="num_steps")
def sample(
    params: dict[str, jax.Array], tokens: jax.Array, seeds: jax.Array, num_steps: int
) -> jax.Array:
    """All steps in one program; on a CPU the C++ core runs inside it, on a TPU the Pallas kernels."""
    result = maskgit.generate(
        partial(logits_of, params),
        tokens,
        rule="maskgit",
        mask_token_id=MASK,
        num_steps=num_steps,
        seeds=seeds,
    )
    return result.tokens


def main() -> None:
    """Decode a batch of two and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()

    first, second = jax.random.split(jax.random.key(0))
    params = {
        "embed": jax.random.normal(first, (VOCAB + 1, 32)),
        "head": jax.random.normal(second, (32, VOCAB)),
    }
    tokens = jnp.full((2, LENGTH), MASK)
    seeds = jax.random.split(jax.random.key(1), 2)  # one key per sequence; (B, 2) words do as well
    for row in sample(params, tokens, seeds, given.steps).tolist():
        print(*row)


if __name__ == "__main__":
    main()
