"""What goes into a decode step and what comes out: the containers, and the way from arguments to them.

door.py checks the arguments of a step and puts them into a `StepInputs`; what is here completes that and
converts it to the arrays of a backend.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..common.arrays import (
    dtype_name,
    kind_of,
    library_of,
    signed,
    to_kind,
    to_numpy,
    widen,
)
from ..common.backends import is_interpreting
from .rule.plan import RowPlan, StepPlan
from .rule.rule import StepRule


class StepNoise(NamedTuple):
    """The caller's own standard Gumbel noise, in place of the counter-based draw.

    token_gumbel: (B, N, V), added as l + temperature * g; V is the width after vocab_slice.
    choice_gumbel: (B, N), for the noise on the confidence and for random scores.
    Either may be None where the rule does not use it.  Floating, same library as the logits.
    """

    token_gumbel: Any = None
    choice_gumbel: Any = None


class StepInputs(NamedTuple):
    """What a backend's `decode_step` and `sample_tokens` get, checked, in the backend's arrays.

    logits (B, N, V) after vocab_slice, tokens (B, N) int64, eligible (B, N) bool (the masked
    positions that take part), num_masked_at_start (B,), seeds (B, 2) uint32 key words or None,
    positions (B, N) Philox position words, noise or None, uncond_logits or None.  scores (B, N)
    where the rule's score is "given", num_commit (B,) where its count is.  With `drawn` (B, N),
    candidates or -1, there are no logits and `scores` are those of the candidates.

    `triton` and `pallas` get the inputs as they were given: eligible, num_masked_at_start and positions
    may be None, and so may tokens be in `sample_tokens`; seeds are (B,) 64-bit integers for `triton`,
    (B, 2) words for `pallas`.
    """

    logits: Any = None
    tokens: Any = None
    eligible: Any = None
    num_masked_at_start: Any = None
    seeds: Any = None
    positions: Any = None
    token_gumbel: Any = None
    choice_gumbel: Any = None
    uncond_logits: Any = None
    guidance_scale: Any = 0.0
    mask_token_id: int = -1
    scores: Any = None
    drawn: Any = None
    num_commit: Any = None


class StepResult(NamedTuple):
    """What one decode step returns; arrays of the kind and on the device that went in.

    next_tokens: (B, N), the sequence with the committed candidates, the rest masked again.
    candidate_tokens: (B, N), every eligible position filled in: MaskGIT's final image.
    confidence: (B, N) float32 (float64 where the rule scores in float64), the ranking key with
        its noise; +inf at known positions, -inf at masked positions that were not eligible and
        at rows without a finite logit.
    """

    next_tokens: Any
    candidate_tokens: Any
    confidence: Any


class TokenStats(NamedTuple):
    """What `sample_tokens` returns, all of the shape of the logits without V.

    candidate_tokens: drawn ids in the dtype int64 (int32 in jax without 64-bit integers);
        -1 for a row without a finite logit.
    confidence: the rule's score, without the annealed noise; -inf for such a row.
    log_z: log of the sum of exp(l / score temperature) over the score's distribution.
    """

    candidate_tokens: Any
    confidence: Any
    log_z: Any


UNSIGNED = ("uint16", "uint32", "uint64")
_SCALARS = ("guidance_scale", "mask_token_id")
_FLOATING = ("token_gumbel", "choice_gumbel", "scores")
_ARRAYS = [(i, name) for i, name in enumerate(StepInputs._fields) if name not in _SCALARS]


def complete(x: StepInputs, plan: StepPlan) -> StepInputs:
    """The inputs with what follows from them filled in: who takes part, U0, key words, positions.

    Rows without a sequence are all drawn; of tensors `tokens` and `eligible` then stay None.
    """
    model = x.tokens if x.logits is None else x.logits
    batch, length = model.shape[:2]
    is_torch = kind_of(model) == "torch"
    if x.tokens is None and is_torch and x.seeds is None:
        return x
    if x.tokens is None and not is_torch:
        x = x._replace(tokens=_all_masked(batch, length), eligible=_everywhere(batch, length))
    eligible, start, positions = x.eligible, x.num_masked_at_start, x.positions
    if x.tokens is not None:
        eligible = taking_part(plan.row, x.tokens, x.mask_token_id, x.eligible)
        start = eligible.sum(1) if start is None else start
    if positions is None and is_torch:  # made where they are used: no copy from the host
        positions = library_of(model).arange(length, device=model.device).expand(batch, length)
    elif positions is None:
        positions = _rows_of_positions(batch, length)
    return x._replace(
        eligible=eligible,
        num_masked_at_start=start,
        seeds=key_words(x.seeds),
        positions=positions,
    )


def taking_part(rule: StepRule | RowPlan, tokens: Any, mask_token_id: int, eligible: Any) -> Any:
    """(B, N) bool: the masked positions that `eligible` admits; known ones too where they are revised."""
    is_masked = tokens == mask_token_id
    if rule.touches_known:
        return is_masked | True if eligible is None else eligible
    return is_masked if eligible is None else is_masked & eligible


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


@lru_cache(maxsize=64)
def _rows_of_positions(batch: int, length: int) -> Any:
    """0..N-1 for every sequence, (B, N) uint32, read-only."""
    return _read_only(np.tile(np.arange(length, dtype=np.uint32), (batch, 1)))


@lru_cache(maxsize=64)
def _all_masked(batch: int, length: int) -> Any:
    return _read_only(np.full((batch, length), -1))


@lru_cache(maxsize=64)
def _everywhere(batch: int, length: int) -> Any:
    return _read_only(np.ones((batch, length), bool))


def to_host(x: StepInputs, chosen: str, dtype: str) -> StepInputs:
    """The inputs as NumPy arrays; bfloat16 logits as bits, for the reference as float32."""
    fields = list(_without_keys(x))
    for i, name in _ARRAYS:
        value = fields[i]
        if value is None:
            continue
        fields[i] = to_numpy(value)
        if name in _FLOATING:
            fields[i] = widen(fields[i], dtype_name(value))
        elif chosen == "reference" and name in ("logits", "uncond_logits"):
            fields[i] = widen(fields[i], dtype)
    return StepInputs._make(fields)


def to_framework(x: StepInputs, native: str, logits: Any) -> StepInputs:
    """The inputs as torch or jax arrays, in torch on the device of the logits."""
    fields = list(_without_keys(x) if native == "torch" else x)
    target = logits.device if kind_of(logits) == "torch" else None
    for i, _ in _ARRAYS:
        value = fields[i]
        if value is None:
            continue
        value = _signed_for_torch(value) if native == "torch" else value
        value = to_kind(value, native, target)
        fields[i] = _strongly_typed(value) if native == "jax" else value
    return StepInputs._make(fields)


def for_program(x: StepInputs) -> StepInputs:
    """The inputs as a jitted program takes them: seeds as words, since jax may have no 64-bit integers."""
    seeds = x.seeds if kind_of(x.seeds) == "jax" else key_words(x.seeds)
    fields = list(x._replace(seeds=seeds))
    for i, _ in _ARRAYS:
        value = fields[i]
        if type(value) is not np.ndarray:  # which goes in as it is
            fields[i] = _strongly_typed(to_kind(value, "jax"))
    return StepInputs._make(fields)


def _strongly_typed(x: Any) -> Any:
    """A jax array without jax's weak type (jnp.full's of a number), for which a program is compiled anew."""
    return x.astype(x.dtype) if getattr(x, "weak_type", False) else x


def to_gpu(x: StepInputs, logits: Any) -> StepInputs:
    """The inputs as torch tensors on the GPU of the logits; what is on the host goes to the first one."""
    import torch

    device = logits.device if kind_of(logits) == "torch" else torch.device("cpu")
    if device.type != "cpu":  # as all are
        return signed_inputs(x)
    if not is_interpreting():
        device = torch.device("cuda")
    fields = list(to_framework(x, "torch", logits))
    for i, _ in _ARRAYS:
        fields[i] = None if fields[i] is None else fields[i].to(device)
    return StepInputs._make(fields)


def signed_inputs(x: StepInputs) -> StepInputs:
    """Tensors of integers as torch can compute with them; seeds have their own way (key_words)."""
    for name in ("tokens", "positions", "drawn", "num_masked_at_start", "num_commit"):
        value = getattr(x, name)
        if value is not None and kind_of(value) == "torch" and dtype_name(value) in UNSIGNED:
            x = x._replace(**{name: _signed_for_torch(value)})
    return x


def key_words(seeds: Any) -> Any:
    """(B, 2) words of the 64-bit seeds, uint32 (in torch int64), in the library of `seeds`."""
    if seeds is None:
        return None
    kind = kind_of(seeds)
    if kind == "torch":
        import torch

        if seeds.ndim == 2:
            return seeds.to(torch.int64) & 0xFFFFFFFF
        wide = seeds.view(torch.int64) if seeds.dtype == torch.uint64 else seeds.to(torch.int64)
        return torch.stack([wide & 0xFFFFFFFF, (wide >> 32) & 0xFFFFFFFF], dim=1)
    if kind == "jax":
        import jax
        import jax.numpy as jnp

        if jnp.issubdtype(seeds.dtype, jax.dtypes.prng_key):
            # of rbg keys, four words, the second half repeats the first
            words = jax.random.key_data(seeds).astype(jnp.uint32)
            return jnp.pad(words, ((0, 0), (0, max(0, 2 - words.shape[1]))))[:, :2]
        if seeds.ndim == 2:
            return seeds.astype(jnp.uint32)
        if seeds.dtype.itemsize == 8:
            return jnp.stack([seeds.astype(jnp.uint32), (seeds >> 32).astype(jnp.uint32)], axis=1)
        signed = jnp.issubdtype(seeds.dtype, jnp.signedinteger)
        high = jnp.where(signed & (seeds < 0), jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
        return jnp.stack([seeds.astype(jnp.uint32), high], axis=1)
    if seeds.ndim == 2:
        return seeds.astype(np.uint32)
    if seeds.dtype != np.int64:
        seeds = seeds.astype(np.uint64 if seeds.dtype.kind == "u" else np.int64)
    words = np.ascontiguousarray(seeds).view(np.uint32).reshape(-1, 2)
    return words if sys.byteorder == "little" else words[:, ::-1]


def _without_keys(x: StepInputs) -> StepInputs:
    """jax's keys, which nothing else knows, as words."""
    if x.seeds is None or not dtype_name(x.seeds).startswith("key"):
        return x
    return x._replace(seeds=key_words(x.seeds))


def _signed_for_torch(x: Any) -> Any:
    """Integers that torch can compute with: it has few operations on the wider unsigned ones."""
    if x is None or dtype_name(x) not in UNSIGNED:
        return x
    return signed(x) if kind_of(x) == "torch" else to_numpy(x).astype(np.int64)
