"""From the public arguments to a backend and back.

`decode_step` and `sample_tokens` here take arrays of one kind and a `StepRule`; api.py gives them
their public signatures, ops.py their torch.library form.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial, wraps
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..common.arrays import (
    as_index,
    as_scalar,
    check_integer,
    check_integers,
    check_same_kind,
    check_shape,
    dtype_name,
    is_on_host,
    is_traced,
    kind_of,
    library_of,
    like,
    place_of,
    signed,
    to_kind,
    to_numpy,
    widen,
)
from ..common.backends import BACKENDS, TRACED, check_name, choose, is_interpreting, serves_jax
from ..common.mesh import active
from ..common.philox import seed_words
from .checks import (
    check_candidates,
    check_commit_arrays,
    check_commit_noise,
    check_guidance,
    check_logits,
    check_noise,
    check_positions,
    check_scores,
    check_start,
    check_step_arrays,
    columns,
    raise_on_dead_rows,
)
from .plan import CommitPlan, Numbers, RowPlan, StepPlan, constant_plan, resolve
from .spec import StepInputs, StepRule

_MODULES = {
    "triton": ".triton_cuda",
    "pallas": ".pallas_tpu",
    "cpp": ".cpu",
    "cpp in jax": ".cpu_ffi",
    "jax on a mesh": ".jax_sharded",
    "torch": ".torch_ref",
    "jax": ".jax_ref",
    "reference": ".reference",
}
T = TypeVar("T")
_UNSIGNED = ("uint16", "uint32", "uint64")
MOST_TRACED_STEPS = 4096
_SCALARS = ("guidance_scale", "mask_token_id")


@cache
def backend_module(name: str) -> ModuleType:
    """The module of a backend that `choose` has found able to run."""
    return importlib.import_module(_MODULES[name], __package__)


def in_usual_jax(function: Callable[..., T]) -> Callable[..., T]:
    """For jax arrays a function runs in jax as it is written for, whatever else the caller has set.

    Infinities are part of the contract, NaN may stand in what a `where` then leaves out, and the numbers
    of a step come from the host.  The first argument says what arrays they are.
    """

    @wraps(function)
    def wrapped(model: Any, *args: Any, **options: Any) -> T:
        with usual_jax(model):
            return function(model, *args, **options)

    return wrapped


def usual_jax(model: Any) -> contextlib.AbstractContextManager[None]:
    """Where `model` is a jax array, the context of `in_usual_jax`."""
    return _usual_jax() if kind_of(model) == "jax" else contextlib.nullcontext()


@contextlib.contextmanager
def _usual_jax() -> Iterator[None]:
    import jax

    wanted = {
        "jax_numpy_rank_promotion": ("allow", jax.numpy_rank_promotion),
        "jax_numpy_dtype_promotion": ("standard", jax.numpy_dtype_promotion),
        "jax_debug_nans": (False, jax.debug_nans),
        "jax_debug_infs": (False, jax.debug_infs),
        "jax_transfer_guard_host_to_device": ("allow", jax.transfer_guard_host_to_device),
    }
    with contextlib.ExitStack() as stack:
        for name, (value, switch) in wanted.items():
            if getattr(jax.config, name) not in (None, value):
                stack.enter_context(switch(value))
        yield


@in_usual_jax
def decode_step(
    logits: Any,
    tokens: Any,
    rule: StepRule,
    mask_token_id: int,
    step: int,
    num_steps: int,
    num_masked_at_start: Any = None,
    seeds: Any = None,
    token_gumbel: Any = None,
    choice_gumbel: Any = None,
    uncond_logits: Any = None,
    guidance_scale: Any = None,
    eligible: Any = None,
    scores: Any = None,
    num_commit: Any = None,
    positions: Any = None,
    temperature: Any = None,
    threshold: Any = None,
    backend: str = "auto",
    check: bool = False,
) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence) of one step; see `maskgit.decode_step`."""
    rule = with_scalars(rule, temperature, threshold)
    _, _, vocab = check_logits(logits, 3)
    scale = check_guidance(logits, uncond_logits, guidance_scale)
    logits, uncond_logits = narrowed(logits), narrowed(uncond_logits)
    x, plan = inputs(
        logits, vocab, tokens, rule, mask_token_id, step, num_steps, num_masked_at_start, seeds,
        token_gumbel, choice_gumbel, eligible, scores, num_commit, positions,
    )  # fmt: skip
    x = x._replace(
        logits=_own_columns(logits, rule),
        uncond_logits=_own_columns(uncond_logits, rule),
        guidance_scale=scale,
    )
    out = call("decode_step", x, plan, logits, backend)
    if is_checked(check):
        eligible = taking_part(rule, tokens, mask_token_id, eligible)
        suspects = eligible & (like(out[2], logits) == -np.inf)
        _raise_on_dead_rows(suspects, x, plan, logits, backend)
    return results(out, logits, tokens)


class TracedStep(NamedTuple):
    """Steps whose plans differ in their numbers alone; `index` (traced) says which of them it is."""

    steps: tuple[int, ...]
    index: Any


def at_step(
    call: Callable[[Any], Any], rule: StepRule, step: Any, num_steps: Any, model: Any
) -> Any:
    """`call(step)`; with a traced step a program with a branch for each structure of a plan."""
    if kind_of(step) is None:
        return call(step)
    if not is_traced(step):
        return call(as_index("step", step))
    check_integer("num_steps", num_steps)
    if tuple(step.shape) or not dtype_name(step).startswith(("int", "uint")):
        raise TypeError(f"step: expected an integer, got {step!r}")
    if not 1 <= num_steps <= MOST_TRACED_STEPS:
        raise ValueError(
            f"num_steps: expected 1 to {MOST_TRACED_STEPS} with a traced step, whose program holds the "
            f"numbers of all; got {num_steps}"
        )
    import jax
    import jax.numpy as jnp

    alike: dict[Any, list[int]] = {}
    for s in range(int(num_steps)):
        plan = _plan(rule, -1, s, num_steps, model)
        alike.setdefault((plan.row, plan.commit), []).append(s)
    groups = [tuple(steps) for steps in alike.values()]
    places = sorted(
        (s, group, i) for group, steps in enumerate(groups) for i, s in enumerate(steps)
    )
    at = jnp.asarray(places, jnp.int32)[jnp.clip(step, 0, int(num_steps) - 1)]
    branches = [partial(_at_traced, call, steps) for steps in groups]
    return jax.lax.switch(at[1], branches, at[2])


def _at_traced(call: Callable[[Any], Any], steps: tuple[int, ...], index: Any) -> Any:
    return call(TracedStep(steps, index))


def with_scalars(rule: StepRule, temperature: Any, threshold: Any) -> StepRule:
    """The rule with the numbers that are given in place of its own."""
    if temperature is None and threshold is None:
        return rule
    numbers = {"sample_temperature": temperature, "threshold": threshold}
    for field, value in numbers.items():
        name = field.removeprefix("sample_")
        numbers[field] = None if value is None else as_scalar(name, value)
        if is_traced(numbers[field]):
            raise TypeError(f"{name}: expected a number, got one that the program computes")
    return _replaced(rule, **numbers)


@lru_cache(maxsize=256)
def _replaced(rule: StepRule, **numbers: float | None) -> StepRule:
    given: Any = {field: value for field, value in numbers.items() if value is not None}
    return dataclasses.replace(rule, **given)


def narrowed(logits: Any) -> Any:
    """The logits, float64 ones rounded to float32."""
    is_double = logits is not None and dtype_name(logits) == "float64"
    if not is_double:
        return logits
    with np.errstate(over="ignore"):
        return _cast(logits, "float32")


def _own_columns(logits: Any, rule: StepRule) -> Any:
    """The columns that may be drawn; on a mesh all, since a slice would move them between chips."""
    return logits if _mesh(logits) is not None else columns(logits, rule)


def _mesh(model: Any) -> Any:
    """The mesh that jax arrays are to be worked on, if any."""
    return active() if kind_of(model) == "jax" else None


def is_checked(check: bool) -> bool:
    """Whether rows without a finite logit raise: by argument, or by environment."""
    return check or os.environ.get("MASKGIT_CHECK", "") == "1"


def _raise_on_dead_rows(
    suspects: Any, x: StepInputs, plan: StepPlan, logits: Any, backend: str
) -> None:
    """ValueError if one of the suspects, (B, N) with confidence -inf, has that for want of a logit."""
    if not is_traced(suspects) and not to_numpy(suspects).any():
        return
    _, _, log_z = call("sample_tokens", x._replace(eligible=suspects), plan, logits, backend)
    raise_on_dead(suspects & (like(log_z, logits) == -np.inf))


def raise_on_dead(dead: Any, name: str = "logits") -> None:
    """ValueError naming the first of the dead rows; in a traced program when that runs."""
    if not is_traced(dead):
        return raise_on_dead_rows(to_numpy(dead), name)
    import jax

    jax.debug.callback(lambda rows: raise_on_dead_rows(np.asarray(rows), name), dead)
    return None


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
    plan = _plan(rule, mask_token_id, step, num_steps, model, dtype)
    check_step_arrays(model, vocab, tokens, eligible, mask_token_id)
    check_scores(rule, scores, model, "scores")
    check_positions(positions, model)
    check_noise(model, vocab, rule, plan, seeds, token_gumbel, choice_gumbel, both=True)
    x = StepInputs(
        logits=None,
        tokens=_signed_in_torch(tokens),
        eligible=eligible,
        num_masked_at_start=_starts(rule, num_masked_at_start, tokens, mask_token_id, eligible),
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
    at = step.steps[-1] if isinstance(step, TracedStep) else step
    check_start(rule, plan, x, at, is_given=num_masked_at_start is not None)
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


@in_usual_jax
def commit_tokens(
    candidate_tokens: Any,
    scores: Any,
    tokens: Any,
    rule: StepRule,
    mask_token_id: int,
    step: int,
    num_steps: int,
    num_masked_at_start: Any = None,
    seeds: Any = None,
    choice_gumbel: Any = None,
    eligible: Any = None,
    num_commit: Any = None,
    positions: Any = None,
    threshold: Any = None,
    backend: str = "auto",
) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence); see `maskgit.commit_tokens`."""
    rule = with_scalars(rule, None, threshold)
    batch, length = check_candidates(candidate_tokens, scores)
    plan = _plan(rule, mask_token_id, step, num_steps, scores)
    check_positions(positions, scores)
    check_commit_arrays(scores, candidate_tokens, tokens, eligible, mask_token_id)
    check_commit_noise(scores, rule, plan, seeds, choice_gumbel)
    x = StepInputs(
        logits=None,
        tokens=_signed_in_torch(tokens),
        eligible=eligible,
        num_masked_at_start=_starts(rule, num_masked_at_start, tokens, mask_token_id, eligible),
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
    at = step.steps[-1] if isinstance(step, TracedStep) else step
    check_start(rule, plan, x, at, is_given=num_masked_at_start is not None)
    return results(call("decode_step", x, plan, scores, backend), scores, tokens)


def _plan(
    rule: StepRule, mask_token_id: int, step: Any, num_steps: int, model: Any,
    dtype: str | None = None,
) -> StepPlan:  # fmt: skip
    """The rule at this step, once the numbers are integers."""
    if isinstance(step, TracedStep):
        plans = [_plan(rule, mask_token_id, s, num_steps, model) for s in step.steps]
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


def results(out: Any, model: Any, tokens: Any) -> tuple[Any, Any, Any]:
    """A backend's arrays in the library of `model` and the dtype of the tokens."""
    next_tokens, candidates, confidence = (like(array, model) for array in out)
    return _cast_like(next_tokens, tokens), _cast_like(candidates, tokens), confidence


@in_usual_jax
def sample_tokens(
    logits: Any,
    rule: StepRule,
    seeds: Any = None,
    positions: Any = None,
    step: int = 0,
    token_gumbel: Any = None,
    temperature: Any = None,
    backend: str = "auto",
    check: bool = False,
) -> tuple[Any, Any, Any]:
    """(candidate_tokens, confidence, log_z) of (B, N, V) logits; see `maskgit.sample_tokens`."""
    rule = with_scalars(rule, temperature, None)
    _, _, vocab = check_logits(logits, 3)
    logits = narrowed(logits)
    plan = constant_plan(rule, step, dtype_name(logits))
    if rule.score in ("random", "given"):
        raise ValueError(
            f"rule: expected a score computed from the logits, got score={rule.score!r}"
        )
    check_noise(logits, vocab, rule, plan, seeds, token_gumbel, None, both=False)
    check_positions(positions, logits)
    x = StepInputs(
        logits=_own_columns(logits, rule),
        tokens=None,
        eligible=None,
        num_masked_at_start=None,
        seeds=seeds,
        positions=positions,
        token_gumbel=token_gumbel if plan.row.draws else None,
        choice_gumbel=None,
        uncond_logits=None,
        guidance_scale=0.0,
        mask_token_id=-1,
    )
    drawn, score, log_z = (like(a, logits) for a in call("sample_tokens", x, plan, logits, backend))
    if is_checked(check):
        raise_on_dead(drawn < 0)
    kind = "float64" if rule.score_dtype == "float64" else "float32"
    return drawn, _cast(score, kind), _cast(log_z, kind)


def call(name: str, x: StepInputs, plan: StepPlan, logits: Any, backend: str) -> Any:
    """Run the chosen backend on arrays of its own kind; `logits` says which kind and dtype."""
    chosen = backend_for(logits, backend)
    dtype = "float32" if x.logits is None else dtype_name(logits)
    if chosen == "pallas" and backend == "auto" and _exceeds_tpu(x, dtype):
        chosen = "jax"
    native, mask_token_id = BACKENDS[chosen][1], x.mask_token_id
    if chosen == "triton":  # which derives in the kernel what `complete` would launch kernels for
        out = getattr(backend_module(chosen), name)(to_gpu(x, logits), plan, dtype)
        return tuple(like(array, logits) for array in out)  # to the host, if they were there
    if chosen == "pallas":
        x = x._replace(
            seeds=key_words(x.seeds, (x.tokens if x.logits is None else x.logits).shape[0])
        )
    else:
        x = complete(x, plan)
    mesh = _mesh(logits)
    if chosen == "cpp" and kind_of(logits) == "jax" and serves_jax():
        chosen, native = "cpp in jax", "jax"
    elif mesh is not None:
        chosen = "jax on a mesh"
    if native == "jax":
        x = _to_framework(x, native, logits)._replace(mask_token_id=0)
        numbers = _arguments(plan, chosen, dtype, mask_token_id)
        program = _jitted(name, chosen, mesh)
        return program(x, numbers, mask_token_id, plan.row, plan.commit, dtype)
    x = _to_host(x, chosen, dtype) if native == "numpy" else _to_framework(x, native, logits)
    return getattr(backend_module(chosen), name)(x, plan, dtype)


def _exceeds_tpu(x: StepInputs, dtype: str) -> bool:
    """Whether the TPU's kernels refuse: it has no float16, and long sequences do not fit."""
    from .pallas_tpu import MOST_POSITIONS

    shaped = x.tokens if x.logits is None else x.logits
    return dtype == "float16" or int(shaped.shape[1]) > MOST_POSITIONS


def backend_for(model: Any, backend: str) -> str:
    """The backend that runs on arrays like `model`; on a mesh, jax's own."""
    if _mesh(model) is not None:
        if check_name(backend) not in ("auto", "jax"):
            raise ValueError(f"backend: expected 'jax' or 'auto' on a mesh, got {backend!r}")
        return "jax"
    device = "cpu" if is_on_host(model) else _device_of(model)
    return choose(backend, kind_of(model) or "numpy", device)


def _device_of(model: Any) -> str:
    import sys

    jax = sys.modules.get("jax")
    if jax is not None and isinstance(model, jax.core.Tracer):
        return TRACED
    return str(getattr(model, "device", TRACED))


@cache
def _jitted(name: str, backend: str, sharding: Any = None) -> Any:
    """A jax backend's function, compiled once for plans that are alike; perhaps on a mesh."""
    import jax

    function = getattr(backend_module(backend), name)
    more = () if sharding is None else (sharding,)

    def call(
        x: StepInputs,
        numbers: Any,
        mask_token_id: int,
        row: RowPlan,
        commit: CommitPlan,
        dtype: str,
    ) -> Any:
        x = x._replace(mask_token_id=mask_token_id)
        return function(x, StepPlan(row, commit, numbers), dtype, *more)

    return jax.jit(call, static_argnames=("mask_token_id", "row", "commit", "dtype"))


def _arguments(plan: StepPlan, chosen: str, dtype: str, mask_token_id: int) -> Any:
    """The numbers of a plan as a jitted program of a backend takes them."""
    if plan.index is None:
        if chosen == "cpp in jax":
            return backend_module(chosen).packed(plan, dtype, mask_token_id)
        return as_arguments(plan.numbers)
    import jax
    import jax.numpy as jnp

    each = [_arguments(one, chosen, dtype, mask_token_id) for one in plan.numbers]
    return jax.tree.map(lambda *numbers: jnp.asarray(np.stack(numbers))[plan.index], *each)


def as_arguments(numbers: Numbers) -> Numbers:
    """The numbers of a plan as a jitted program takes them."""
    return numbers._replace(step=np.uint32(numbers.step))


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


def _to_host(x: StepInputs, chosen: str, dtype: str) -> StepInputs:
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


def _to_framework(x: StepInputs, native: str, logits: Any) -> StepInputs:
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


def _starts(rule: StepRule, given: Any, tokens: Any, mask_token_id: int, eligible: Any) -> Any:
    """num_masked_at_start as (B,) integers, or None for the number of those that take part.

    Without it a block is the whole of N, and of rules that touch known positions it is what is masked.
    """
    batch, length = tokens.shape
    if given is None and rule.count_base == "block":
        return library_of(tokens).full((batch,), length, **place_of(tokens))
    if given is None and rule.touches_known:
        is_masked = _signed_in_torch(tokens) == mask_token_id
        return (is_masked if eligible is None else is_masked & eligible).sum(1)
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


def _cast(x: Any, dtype: str) -> Any:
    if dtype_name(x) == dtype:
        return x
    if kind_of(x) == "jax" and dtype == "float64" and not has_float64():
        dtype = "float32"
    if kind_of(x) == "torch":
        import torch

        return x.to(getattr(torch, dtype))
    return x.astype(dtype)


def has_float64() -> bool:
    """Whether jax has 64-bit types."""
    import jax

    return bool(jax.config.read("jax_enable_x64"))


def _cast_like(x: Any, model: Any) -> Any:
    return _cast(x, dtype_name(model))
