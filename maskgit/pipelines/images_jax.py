"""From a file of weights to images' tokens in JAX; torch is not needed.

weights = images_jax.load("weights.safetensors")
out = images_jax.generate(weights, classes, seeds=seeds, num_steps=8)     # one compiled program
"""

from __future__ import annotations

import dataclasses
import functools
import json
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskgit.files import FORMAT, FORMAT_VERSION, WEIGHTS, digest
from maskgit.kernels.common.arrays import as_index, check_integers, dtype_name, is_on_host
from maskgit.kernels.common.mesh import active
from maskgit.kernels.decode_step import StepRule, as_rule
from maskgit.kernels.decode_step.dispatch import backend_for
from maskgit.kernels.decode_step.door import check_token_ids
from maskgit.kernels.decode_step.inputs import key_words
from maskgit.models.config import TransformerConfig
from maskgit.models.transformer_jax import Params, check, head_weight, hidden, project
from maskgit.pipelines.recipes import PresetConfig
from maskgit.sampling.loop import generate as generate_tokens
from maskgit.sampling.result import GenerateResult
from maskgit.settings import ConfigError, from_dict


class Weights(NamedTuple):
    """A transformer's parameters, its configuration, and the settings it is sampled with."""

    params: dict[str, jax.Array]
    config: PresetConfig


def load(path: str | Path, dtype: Any = jnp.float32) -> Weights:
    """The transformer of a file that `maskgit.pipelines.weights.save_weights` wrote; torch is not needed.

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
    words = key_words(seeds)
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
