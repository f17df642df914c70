"""MaskGIT's transformer in JAX: the parameters of transformer.py by the same names.

`params` is a flat dict of arrays by their names in the torch model's state dict, so a checkpoint serves
both.  Matrices are (out, in) as there.  The function is that of transformer.py: post-LayerNorm, tanh GELU,
a head that multiplies by the codebook's rows of the tied embedding alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maskgit.kernels.attention import attention
from maskgit.models.config import TransformerConfig

Params = Mapping[str, jax.Array]


def from_torch(state_dict: Mapping[str, Any], dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Parameters from the state dict of a `MaskGitTransformer`."""
    return {
        k: jnp.asarray(v.detach().float().cpu().numpy()).astype(dtype)
        for k, v in state_dict.items()
    }


def shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter."""
    width, mlp = config.hidden_size, config.mlp_size
    out: dict[str, tuple[int, ...]] = {
        "embedding.word.weight": (config.vocab_size, width),
        "embedding.position.weight": (config.num_tokens + 1, width),
        "head.dense.weight": (width, width),
        "head.dense.bias": (width,),
        "head.bias": (config.vocab_size,),
    }
    norms = ["embedding.norm", "head.norm"]
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        norms += [f"{layer}.attention.norm", f"{layer}.mlp.norm"]
        for name, shape in (
            ("attention.qkv", (3 * width, width)), ("attention.out", (width, width)),
            ("mlp.up", (mlp, width)), ("mlp.down", (width, mlp)),
        ):  # fmt: skip
            out[f"{layer}.{name}.weight"], out[f"{layer}.{name}.bias"] = shape, shape[:1]
    return out | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


def check(params: Params, config: TransformerConfig) -> None:
    """ValueError naming the first parameter that is missing, unknown or of another shape."""
    wanted = shapes(config)
    for name in sorted(set(wanted) ^ set(params)):
        what = "missing" if name in wanted else "not one of this model"
        raise ValueError(f"params: {name!r} is {what}")
    for name, shape in wanted.items():
        if tuple(params[name].shape) != shape:
            raise ValueError(f"params: {name!r}: expected {shape}, got {tuple(params[name].shape)}")


def _linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    out = jnp.einsum("...i,oi->...o", x, params[f"{name}.weight"], precision="highest")
    return out + params[f"{name}.bias"]


def _norm(params: Params, name: str, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """LayerNorm with float32 statistics."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + config.layer_norm_eps)
    normal = (centred * scale).astype(x.dtype)
    return normal * params[f"{name}.weight"] + params[f"{name}.bias"]


def _layer(
    params: Params, name: str, x: jax.Array, config: TransformerConfig, backend: str
) -> jax.Array:
    """(B, L, D) -> (B, L, D)."""
    batch, length, width = x.shape
    qkv = _linear(params, f"{name}.attention.qkv", x)
    qkv = qkv.reshape(batch, length, 3, config.num_heads, width // config.num_heads)
    y = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], backend=backend)
    y = _linear(params, f"{name}.attention.out", y.reshape(batch, length, width))
    x = _norm(params, f"{name}.attention.norm", x + y, config)
    y = jax.nn.gelu(_linear(params, f"{name}.mlp.up", x), approximate=True)
    y = _linear(params, f"{name}.mlp.down", y)
    return _norm(params, f"{name}.mlp.norm", x + y, config)


def hidden(
    params: Params, config: TransformerConfig, tokens: jax.Array, class_ids: jax.Array,
    *, attention_backend: str = "auto",
) -> jax.Array:  # fmt: skip
    """Last hidden states (B, N, D) at the image positions.

    tokens is (B, N) with the mask id where unknown; class_ids is (B,), where `num_classes` stands for "no
    class" in a model that has it.
    """
    first = (config.codebook_size + class_ids.astype(jnp.int32))[:, None]
    ids = jnp.concatenate([first, tokens.astype(jnp.int32)], axis=1)
    x = params["embedding.word.weight"][ids] + params["embedding.position.weight"][: ids.shape[1]]
    x = _norm(params, "embedding.norm", x, config)
    for i in range(config.num_layers):
        x = _layer(params, f"layers.{i}", x, config, attention_backend)
    return x[:, 1:]


def project(params: Params, config: TransformerConfig, states: jax.Array) -> jax.Array:
    """(..., D) -> (..., D): what is multiplied by the codebook's embedding."""
    x = jax.nn.gelu(_linear(params, "head.dense", states), approximate=True)
    return _norm(params, "head.norm", x, config)


def head_weight(params: Params, config: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """The head's matrix (codebook_size, D) and bias (codebook_size,)."""
    size = config.codebook_size
    return params["embedding.word.weight"][:size], params["head.bias"][:size]


def logits(
    params: Params, config: TransformerConfig, tokens: jax.Array, class_ids: jax.Array
) -> jax.Array:
    """Logits (B, N, codebook_size); see `hidden` for the arguments."""
    states = project(params, config, hidden(params, config, tokens, class_ids))
    weight, bias = head_weight(params, config)
    return jnp.einsum("...i,oi->...o", states, weight, precision="highest") + bias
