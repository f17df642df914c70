"""MaskGIT's transformer in JAX: the parameters of model.py by the same names, from the same file.

    weights = model_jax.load("weights.safetensors")
    out = model_jax.generate(weights, classes, seeds=seeds, num_steps=8)      # one compiled program

`params` is a flat dict of arrays by their names in the torch model's state dict, so a checkpoint serves
both.  Matrices are (out, in) as there.  The function is that of model.py: post-LayerNorm, tanh GELU,
a head that multiplies by the codebook's rows of the tied embedding alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskgit.checkpoint_format import FORMAT, FORMAT_VERSION, WEIGHTS, digest
from maskgit.config import ConfigError, PresetConfig, TransformerConfig, from_dict
from maskgit.kernels.attention import attention
from maskgit.kernels.common.arrays import dtype_name, is_on_host
from maskgit.kernels.common.sharding import active
from maskgit.kernels.decode_step import StepRule, as_rule
from maskgit.kernels.decode_step.checks import as_index, check_integers, check_token_ids
from maskgit.kernels.decode_step.run import backend_for, key_words
from maskgit.sampler import GenerateResult
from maskgit.sampler import generate as generate_tokens

Params = Mapping[str, jax.Array]


class Weights(NamedTuple):
    """A transformer's parameters, its configuration, and the settings it is sampled with."""

    params: dict[str, jax.Array]
    config: PresetConfig


def load(path: str | Path, dtype: Any = jnp.float32) -> Weights:
    """The transformer of a file that `maskgit.checkpoint.save_weights` wrote; torch is not needed.

    Raises:
        ValueError: no such file, not a checkpoint of weights, altered, or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    found = (metadata.get("format"), metadata.get("format_version"), metadata.get("kind"))
    if found != (FORMAT, FORMAT_VERSION, WEIGHTS):
        raise ValueError(f"{path}: expected a maskgit checkpoint of weights, got {found}")
    facts = ((n, f"torch.{a.dtype.name}", a.shape, a.tobytes()) for n, a in sorted(tensors.items()))
    if metadata.get("sha256") != digest(
        facts, metadata.get("config", ""), metadata.get("info", "")
    ):
        raise ValueError(f"{path}: tensors or metadata do not match the file's own SHA-256")
    try:
        config = from_dict(PresetConfig, json.loads(metadata["config"]))
    except ConfigError as error:
        raise ValueError(f"{path}: bad configuration: {error}") from error
    prefix = "transformer."
    named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    params = {name: jnp.asarray(value).astype(dtype) for name, value in named.items()}
    check(params, config.transformer)
    return Weights(params, config)


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


def generate(
    weights: Weights,
    class_ids: jax.Array,
    *,
    seeds: jax.Array,
    num_steps: int | None = None,
    rule: StepRule | str | None = None,
    guidance_scale: float | None = None,
    tokens: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Images' tokens (B, N) for (B,) classes: the whole loop as one compiled program.

    Args:
        weights: see `load`.
        class_ids: (B,) integers; `num_classes` is "no class" in a model that has it.
        seeds: (B,) 64-bit integers or (B, 2) uint32 words, one for each image.
        num_steps, rule, guidance_scale: by default those of the weights.  A scale s other than 1 needs a
            model with a null class: u + s (c - u), mixed on what goes into the head.
        tokens: (B, N), the mask id where tokens are to be generated; by default everywhere.
        backend: of the decode step, as in `maskgit.decode_step`; with "pallas" of attention too.

    Raises:
        ValueError: guidance without a null class, shapes that do not fit, classes and tokens that the
            model has not (where they are on the host), and as `generate`.

    Semantics: schedule and counts are compiled in, seeds, classes and tokens are arguments: further
    calls with other values and equal shapes run the same program, and nothing waits for the host.
    """
    config, settings = weights.config.transformer, weights.config.generate
    step_rule = as_rule(settings.rule if rule is None else rule)
    if rule is None or rule == settings.rule:
        step_rule = dataclasses.replace(
            step_rule, choice_temperature=settings.choice_temperature,
            sample_temperature=settings.sample_temperature,
        )  # fmt: skip
    scale: float | None = settings.guidance_scale if guidance_scale is None else guidance_scale
    if scale is not None and not isinstance(scale, Real | np.ndarray | jax.Array):
        raise TypeError(f"guidance_scale: expected a number, got {scale!r}")
    scale = None if scale is None or scale == 1.0 else float(scale)
    if scale is not None and config.null_class_id is None:
        raise ValueError(f"guidance_scale: expected 1, this model has no null class, got {scale}")
    class_ids = _checked_classes(class_ids, config)
    size = (class_ids.shape[0], config.num_tokens)
    if tokens is None:
        tokens = jnp.full(size, config.mask_token_id, jnp.int32)
    if np.shape(tokens) != size:
        raise ValueError(f"tokens: expected shape {size}, got {np.shape(tokens)}")
    tokens = jnp.asarray(tokens)
    check_integers("tokens", tokens)
    if is_on_host(tokens):
        check_token_ids(tokens, config.codebook_size, config.mask_token_id)
    steps = as_index("num_steps", settings.num_steps if num_steps is None else num_steps, 1)
    if seeds is None:
        raise ValueError(f"seeds: expected ({size[0]},) integers, got None")
    seeds = seeds if isinstance(seeds, jax.Array) else np.asarray(seeds)
    if "key" not in dtype_name(seeds):
        check_integers("seeds", seeds)
    words = key_words(seeds, size[0])
    backend_for(tokens, backend)
    run = _program(config, step_rule, steps, scale, backend, active())
    out: jax.Array = run(weights.params, jnp.asarray(tokens), class_ids, jnp.asarray(words))
    return out


def _checked_classes(given: Any, config: TransformerConfig) -> jax.Array:
    """Classes (B,), int32; ValueError for another shape or dtype, and, on the host, outside the model."""
    classes = given if isinstance(given, jax.Array) else np.asarray(given)
    if classes.ndim != 1:
        raise ValueError(f"class_ids: expected shape (B,), got {classes.shape}")
    check_integers("class_ids", classes)
    if is_on_host(classes):
        end = config.num_classes + int(config.null_class)
        outside = [int(c) for c in np.asarray(classes) if not 0 <= c < end]
        if outside:
            raise ValueError(f"class_ids: expected ids in [0, {end}), got {outside[0]}")
    return jnp.asarray(classes).astype(jnp.int32)


@functools.lru_cache(maxsize=64)
def _program(
    config: TransformerConfig, rule: StepRule, steps: int, scale: float | None, backend: str,
    mesh: Any,
) -> Any:  # fmt: skip
    """The compiled loop for one model, rule and number of steps, on the mesh that is active."""

    @jax.jit
    def run(params: Params, tokens: jax.Array, class_ids: jax.Array, seeds: jax.Array) -> jax.Array:
        def states(x: jax.Array, classes: jax.Array) -> jax.Array:
            kind = "pallas" if backend == "pallas" else "auto"
            out = hidden(params, config, x, classes, attention_backend=kind)
            return project(params, config, out)

        def forward(x: jax.Array) -> Any:
            if scale is None:
                return states(x, class_ids)
            none = jnp.full_like(class_ids, config.num_classes)
            both = states(jnp.tile(x, (2, 1)), jnp.concatenate([class_ids, none]))
            return both[: len(x)], both[len(x) :]

        weight, bias = head_weight(params, config)
        out: GenerateResult = generate_tokens(
            forward, tokens, rule=rule, mask_token_id=config.mask_token_id, num_steps=steps,
            seeds=seeds, guidance_scale=scale, head_weight=weight, head_bias=bias, backend=backend,
        )  # fmt: skip
        return out.tokens

    return run
