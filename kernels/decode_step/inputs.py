"""What goes into a decode step and what comes out: the containers, and the way from arguments to them.

`inputs` and `commit_inputs` check the arguments of a step and put them into a `StepInputs`; the rest here
completes that and converts it to the arrays of a backend.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..common.arrays import (
    check_integer,
    check_integers,
    check_same_kind,
    check_shape,
    dtype_name,
    is_on_host,
    kind_of,
    library_of,
    place_of,
    signed,
    to_kind,
    to_numpy,
    widen,
)
from ..common.backends import is_interpreting
from ..common.philox import seed_words
from .checks import (
    check_candidates,
    check_commit_arrays,
    check_commit_noise,
    check_noise,
    check_positions,
    check_scores,
    check_step_arrays,
)
from .rule.plan import RowPlan, StepPlan, resolve
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

    logits: Any
    tokens: Any
    eligible: Any
    num_masked_at_start: Any
    seeds: Any
    positions: Any
    token_gumbel: Any
    choice_gumbel: Any
    uncond_logits: Any
    guidance_scale: float
    mask_token_id: int
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


_UNSIGNED = ("uint16", "uint32", "uint64")
_SCALARS = ("guidance_scale", "mask_token_id")


class TracedStep(NamedTuple):
    """Steps whose plans differ in their numbers alone; `index` (traced) says which of them it is."""

    steps: tuple[int, ...]
    index: Any


def inputs(
    model: Any,
    vocab: int,
    tokens: Any,
    rule: StepRule,
    mask_token_id: int,
    step: int,
    num_steps: int,
    num_masked_at_start: Any,
    seeds: Any,
    token_gumbel: Any,
    choice_gumbel: Any,
    eligible: Any,
    scores: Any,
    num_commit: Any,
    positions: Any,
    dtype: str | None = None,
) -> tuple[StepInputs, StepPlan]:
    """The checked inputs of a step as given, logits to be filled in, and the rule at this step.

    `model` (B, N, ...) is the array whose kind, device and, by default, dtype of logits the others
    must have.  `complete` makes of them what a backend needs that does not derive it from the tokens.
    """
    batch, length = model.shape[:2]
    plan = plan_of(rule, mask_token_id, step, num_steps, model, dtype)
    check_step_arrays(model, vocab, tokens, eligible, mask_token_id)
    check_scores(rule, scores, model, "scores")
    check_positions(positions, model)
    check_noise(model, vocab, rule, plan, seeds, token_gumbel, choice_gumbel, both=True)
    x = StepInputs(
        logits=None,
        tokens=_signed_in_torch(tokens),
        eligible=eligible,
        num_masked_at_start=_starts(rule, num_masked_at_start, tokens),
        seeds=seeds,
        positions=_signed_in_torch(positions),
        token_gumbel=token_gumbel if plan.row.draws else None,
        choice_gumbel=choice_gumbel,
        uncond_logits=None,
        guidance_scale=0.0,
        mask_token_id=mask_token_id,
        scores=scores,
        num_commit=_commits(rule, num_commit, tokens, batch, length),
    )
    check_start(rule, plan, x, step)
    return x, plan


def commit_inputs(
    candidate_tokens: Any,
    scores: Any,
    tokens: Any,
    rule: StepRule,
    mask_token_id: int,
    step: Any,
    num_steps: int,
    num_masked_at_start: Any,
    seeds: Any,
    choice_gumbel: Any,
    eligible: Any,
    num_commit: Any,
    positions: Any,
) -> tuple[StepInputs, StepPlan]:
    """As `inputs`, of candidates and their scores (B, N) in place of logits."""
    batch, length = check_candidates(candidate_tokens, scores)
    plan = plan_of(rule, mask_token_id, step, num_steps, scores)
    check_positions(positions, scores)
    check_commit_arrays(scores, candidate_tokens, tokens, eligible, mask_token_id)
    check_commit_noise(scores, rule, plan, seeds, choice_gumbel)
    x = StepInputs(
        logits=None,
        tokens=_signed_in_torch(tokens),
        eligible=eligible,
        num_masked_at_start=_starts(rule, num_masked_at_start, tokens),
        seeds=seeds,
        positions=_signed_in_torch(positions),
        token_gumbel=None,
        choice_gumbel=choice_gumbel,
        uncond_logits=None,
        guidance_scale=0.0,
        mask_token_id=mask_token_id,
        scores=scores,
        drawn=_signed_in_torch(candidate_tokens),
        num_commit=_commits(rule, num_commit, tokens, batch, length),
    )
    check_start(rule, plan, x, step)
    return x, plan


def complete(x: StepInputs, plan: StepPlan) -> StepInputs:
    """The inputs with what follows from them filled in: who takes part, U0, key words, positions."""
    batch, length = (x.tokens if x.logits is None else x.logits).shape[:2]
    if x.tokens is None:  # rows without a sequence, all to be drawn
        x = x._replace(tokens=_all_masked(batch, length), eligible=_everywhere(batch, length))
    eligible = taking_part(plan.row, x.tokens, x.mask_token_id, x.eligible)
    start = x.num_masked_at_start
    return x._replace(
        eligible=eligible,
        num_masked_at_start=eligible.sum(1) if start is None else start,
        seeds=key_words(x.seeds, batch),
        positions=_rows_of_positions(batch, length) if x.positions is None else x.positions,
    )


def plan_of(
    rule: StepRule, mask_token_id: int, step: Any, num_steps: int, model: Any,
    dtype: str | None = None,
) -> StepPlan:  # fmt: skip
    """The rule at this step, once the numbers are integers."""
    if isinstance(step, TracedStep):
        plans = [plan_of(rule, mask_token_id, s, num_steps, model, dtype) for s in step.steps]
        return StepPlan(plans[0].row, plans[0].commit, plans, step.index)
    numbers = {"mask_token_id": mask_token_id, "step": step, "num_steps": num_steps}
    for name, number in numbers.items():
        check_integer(name, number)
    return resolve(rule, step, num_steps, tuple(model.shape[:2]), dtype or dtype_name(model))


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
    fields = {
        k: to_numpy(v)
        for k, v in zip(x._fields, x, strict=True)
        if v is not None and k not in _SCALARS
    }
    for name in ("token_gumbel", "choice_gumbel", "scores"):
        if name in fields:
            fields[name] = widen(fields[name], dtype_name(getattr(x, name)))
    if chosen == "reference":
        for name in ("logits", "uncond_logits"):
            fields[name] = widen(fields.get(name), dtype)
    return x._replace(**fields)


def to_framework(x: StepInputs, native: str, logits: Any) -> StepInputs:
    """The inputs as torch or jax arrays, in torch on the device of the logits."""
    fields = {k: v for k, v in x._asdict().items() if k not in _SCALARS}
    if native == "torch":
        fields = {k: _signed_for_torch(v) for k, v in fields.items()}
    target = logits.device if kind_of(logits) == "torch" else None
    fields = {k: to_kind(v, native, target) for k, v in fields.items()}
    if native == "jax":
        fields = {k: _strongly_typed(v) for k, v in fields.items()}
    return x._replace(**fields)


def _strongly_typed(x: Any) -> Any:
    """A jax array without jax's weak type (jnp.full's of a number), for which a program is compiled anew."""
    return x.astype(x.dtype) if getattr(x, "weak_type", False) else x


def to_gpu(x: StepInputs, logits: Any) -> StepInputs:
    """The inputs as torch tensors on the GPU of the logits; what is on the host goes to the first one."""
    import torch

    device = logits.device if kind_of(logits) == "torch" else torch.device("cpu")
    if device.type == "cpu" and not is_interpreting():
        device = torch.device("cuda")
    fields = {k: v for k, v in x._asdict().items() if v is not None and k not in _SCALARS}
    plain = {k: v if k == "seeds" else _signed_for_torch(v) for k, v in fields.items()}
    return x._replace(**{k: to_kind(v, "torch").to(device) for k, v in plain.items()})


def key_words(seeds: Any, batch: int) -> Any:
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
    return np.stack(seed_words(seeds), axis=1).astype(np.uint32)


def _signed_for_torch(x: Any) -> Any:
    """Integers that torch can compute with: it has few operations on the wider unsigned ones."""
    return signed(x) if x is not None and dtype_name(x) in _UNSIGNED else x


def _signed_in_torch(x: Any) -> Any:
    return _signed_for_torch(x) if kind_of(x) == "torch" else x


def _starts(rule: StepRule, given: Any, tokens: Any) -> Any:
    """num_masked_at_start as (B,) integers where it is given; without, a block is the whole of N."""
    batch, length = tokens.shape
    if given is None and rule.count_base == "block":
        return library_of(tokens).full((batch,), length, **place_of(tokens))
    return _counts("num_masked_at_start", given, tokens, batch, length)


def _commits(rule: StepRule, given: Any, tokens: Any, batch: int, length: int) -> Any:
    """num_commit as (B,) integers, there exactly where the rule's count is given."""
    if (given is not None) != (rule.count == "given"):
        got = "None" if given is None else f"numbers with count={rule.count!r}"
        raise ValueError(
            f"num_commit: expected exactly where the rule has count='given', got {got}"
        )
    return _counts("num_commit", given, tokens, batch, length)


def _counts(name: str, given: Any, tokens: Any, batch: int, length: int) -> Any:
    """Numbers of positions as (B,) integers, where they are given."""
    if given is None:
        return None
    if kind_of(given) in (None, "numpy"):
        array = np.asarray(given)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected integers, got {given!r}")
        given = np.full(batch, array, np.int64) if array.ndim == 0 else array
    else:
        check_same_kind(name, given, tokens)
    check_shape(name, given, (batch,))
    check_integers(name, given)
    if is_on_host(given):
        values = to_numpy(given)
        if values.size and (values.min() < 0 or values.max() > length):
            bad = int(values[(values < 0) | (values > length)][0])
            raise ValueError(
                f"{name}: expected counts between 0 and the {length} positions, got {bad}"
            )
    return _signed_in_torch(given)


def check_start(rule: StepRule, plan: StepPlan, x: StepInputs, step: Any) -> None:
    """ValueError where a count from the start of the loop is missing, or cannot be right.

    With a block's eligible positions the masks that earlier blocks left are there too, uncounted.
    """
    looks_up = plan.commit.count in ("masked", "quota") or plan.commit.least_is_quota
    if not looks_up or plan.commit.count == "all" or rule.count_base == "positions":
        return
    start = x.num_masked_at_start
    last = step.steps[-1] if isinstance(step, TracedStep) else step
    # where known positions take part the base is all that do, the same at every step
    if start is None and last > 0 and not rule.touches_known:
        raise ValueError(
            "num_masked_at_start: expected the (B,) numbers of positions masked before step 0, from "
            f"which rule {rule.name!r} counts at step {last}, got None"
        )
    if start is None or (x.eligible is not None and rule.block_scope == "prefix"):
        return
    if not (is_on_host(x.tokens) and is_on_host(start)):
        return
    masked = to_numpy(x.tokens) == x.mask_token_id
    now = (masked if x.eligible is None else masked & to_numpy(x.eligible)).sum(1)
    short = np.flatnonzero(to_numpy(start) < now)
    if short.size:
        b = int(short[0])
        raise ValueError(
            f"num_masked_at_start: expected at least the {now[b]} positions that are masked now in "
            f"sequence {b}, got {int(to_numpy(start)[b])}"
        )
