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
from functools import cache, lru_cache, wraps
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from ..common.arrays import (
    as_index,
    as_scalar,
    dtype_name,
    is_traced,
    kind_of,
    like,
    like_all,
    to_numpy,
)
from ..common.backends import BACKENDS, check_name, choose, device_of, module_of, serves_jax
from ..common.mesh import active
from .door import (
    admit,
    check_guidance,
    check_logits,
    check_scores,
    check_values,
    columns,
    plan_of,
    raise_on_dead_rows,
)
from .inputs import (
    StepInputs,
    complete,
    for_program,
    key_words,
    taking_part,
    to_framework,
    to_gpu,
    to_host,
)
from .rule.plan import Arguments, CommitPlan, RowPlan, StepPlan, as_arguments, constant_plan
from .rule.rule import StepRule

# beside the table's modules
_IN_JAX = {"cpp in jax": ".cpu.in_jax", "jax on a mesh": ".plain.jax_mesh"}
T = TypeVar("T")


@cache
def backend_module(name: str) -> ModuleType:
    """The module of a backend that `choose` has found able to run."""
    if name in _IN_JAX:
        return importlib.import_module(_IN_JAX[name], __package__)
    return module_of("decode_step", name)


def in_usual_jax(function: Callable[..., T]) -> Callable[..., T]:
    """For jax arrays a function runs in jax as it is written for, whatever else the caller has set.

    Infinities are part of the contract, NaN may stand in what a `where` then leaves out, and the numbers
    of a step come from the host.  The first argument says what arrays they are.
    """

    @wraps(function)
    def wrapped(model: Any, *args: Any, **options: Any) -> T:
        if kind_of(model) != "jax":
            return function(model, *args, **options)
        with _usual_jax():
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
    _, _, vocab = check_logits(logits)
    scale = check_guidance(logits, uncond_logits, guidance_scale)
    logits, uncond_logits = narrowed(logits), narrowed(uncond_logits)
    plan = plan_of(rule, mask_token_id, step, num_steps, logits)
    chosen = backend_for(logits, backend)
    x = admit(logits, vocab, rule, plan, mask_token_id, {
        "tokens": tokens, "num_masked_at_start": num_masked_at_start, "seeds": seeds,
        "token_gumbel": token_gumbel, "choice_gumbel": choice_gumbel, "eligible": eligible,
        "scores": scores, "num_commit": num_commit, "positions": positions,
    }, logits=_own_columns(logits, rule), uncond_logits=_own_columns(uncond_logits, rule),
        guidance_scale=scale)  # fmt: skip
    x = as_taken(x, chosen, logits)
    check_values(x, vocab, rule, plan, step)
    out = run("decode_step", x, plan, logits, chosen)
    if is_checked(check):
        eligible = taking_part(rule, tokens, mask_token_id, eligible)
        suspects = eligible & (like(out[2], logits) == -np.inf)
        _raise_on_dead_rows(suspects, x, plan, logits, chosen)
    return results(out, logits, tokens)


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
    if rule.vocab_slice is None or _mesh(logits) is not None:
        return logits
    return columns(logits, rule)


def _mesh(model: Any) -> Any:
    """The mesh that jax arrays are to be worked on, if any."""
    return active() if kind_of(model) == "jax" else None


def is_checked(check: bool) -> bool:
    """Whether rows without a finite logit raise: by argument, or by environment."""
    return check or os.environ.get("MASKGIT_CHECK", "") == "1"


def _raise_on_dead_rows(
    suspects: Any, x: StepInputs, plan: StepPlan, logits: Any, chosen: str
) -> None:
    """ValueError if one of the suspects, (B, N) with confidence -inf, has that for want of a logit."""
    if not is_traced(suspects) and not to_numpy(suspects).any():
        return
    eligible = to_numpy(suspects) if _on_host(chosen, logits) else suspects
    _, _, log_z = run("sample_tokens", x._replace(eligible=eligible), plan, logits, chosen)
    raise_on_dead(suspects & (like(log_z, logits) == -np.inf))


def raise_on_dead(dead: Any, name: str = "logits") -> None:
    """ValueError naming the first of the dead rows; in a traced program when that runs."""
    if not is_traced(dead):
        return raise_on_dead_rows(to_numpy(dead), name)
    import jax

    jax.debug.callback(lambda rows: raise_on_dead_rows(np.asarray(rows), name), dead)
    return None


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
    check_scores(scores)
    plan = plan_of(rule, mask_token_id, step, num_steps, scores)
    chosen = backend_for(scores, backend)
    x = admit(scores, None, rule, plan, mask_token_id, {
        "drawn": candidate_tokens, "scores": scores, "tokens": tokens,
        "num_masked_at_start": num_masked_at_start, "seeds": seeds, "choice_gumbel": choice_gumbel,
        "eligible": eligible, "num_commit": num_commit, "positions": positions,
    })  # fmt: skip
    x = as_taken(x, chosen, scores)
    check_values(x, None, rule, plan, step)
    return results(run("decode_step", x, plan, scores, chosen), scores, tokens)


def results(out: Any, model: Any, tokens: Any) -> tuple[Any, Any, Any]:
    """A backend's arrays in the library of `model` and the dtype of the tokens."""
    next_tokens, candidates, confidence = like_all(out, model)
    if next_tokens.dtype != tokens.dtype:
        kind = dtype_name(tokens)
        next_tokens, candidates = _cast(next_tokens, kind), _cast(candidates, kind)
    return next_tokens, candidates, confidence


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
    _, _, vocab = check_logits(logits)
    logits = narrowed(logits)
    plan = constant_plan(rule, as_index("step", step), dtype_name(logits))
    if rule.score in ("random", "given"):
        raise ValueError(
            f"rule: expected a score computed from the logits, got score={rule.score!r}"
        )
    given = {"seeds": seeds, "positions": positions, "token_gumbel": token_gumbel}
    chosen = backend_for(logits, backend)
    x = admit(logits, vocab, rule, plan, -1, given, logits=_own_columns(logits, rule))
    x = as_taken(x, chosen, logits)
    check_values(x, vocab, rule, plan, step)
    out = run("sample_tokens", x, plan, logits, chosen)
    drawn, score, log_z = like_all(out, logits)
    if is_checked(check):
        raise_on_dead(drawn < 0)
    kind = "float64" if rule.score_dtype == "float64" else "float32"
    return drawn, _cast(score, kind), _cast(log_z, kind)


def call(name: str, x: StepInputs, plan: StepPlan, logits: Any, backend: str) -> Any:
    """Run a backend on inputs that have been checked; `logits` says of which kind and dtype they are."""
    chosen = backend_for(logits, backend)
    out = run(name, as_taken(x, chosen, logits), plan, logits, chosen)
    return like_all(out, logits) if chosen == "triton" else out  # to the host, if they were there


def as_taken(x: StepInputs, chosen: str, logits: Any) -> StepInputs:
    """The inputs for `run`: on the host where the backend works there, else as they are."""
    return to_host(x, chosen, _logits_dtype(x, logits)) if _on_host(chosen, logits) else x


def _on_host(chosen: str, logits: Any) -> bool:
    """Whether a backend works on NumPy arrays; the C++ core can do so inside jax's programs too."""
    in_jax = chosen == "cpp" and kind_of(logits) == "jax" and serves_jax()
    return BACKENDS[chosen].arrays == "numpy" and not in_jax


def _logits_dtype(x: StepInputs, logits: Any) -> str:
    return "float32" if x.logits is None else dtype_name(logits)


def run(name: str, x: StepInputs, plan: StepPlan, logits: Any, chosen: str) -> Any:
    """Run a backend on what `as_taken` gives."""
    dtype, mask_token_id = _logits_dtype(x, logits), x.mask_token_id
    if _on_host(chosen, logits):
        return getattr(backend_module(chosen), name)(complete(x, plan), plan, dtype)
    if BACKENDS[chosen].arrays == "torch":
        if BACKENDS[chosen].derives:  # for which `complete` would launch kernels
            x = to_gpu(x, logits)
        else:
            x = complete(to_framework(x, "torch", logits), plan)
        return getattr(backend_module(chosen), name)(x, plan, dtype)
    mesh = _mesh(logits)
    chosen = "cpp in jax" if chosen == "cpp" else "jax on a mesh" if mesh is not None else chosen
    x = for_program(x)._replace(mask_token_id=0)
    numbers = arguments_of(plan, chosen, dtype, mask_token_id)
    program = _jitted(name, chosen, mesh)
    return program(x, numbers, mask_token_id, plan.row, plan.commit, dtype)


def backend_for(model: Any, backend: str) -> str:
    """The backend that runs on arrays like `model`, (B, N) or (B, N, ...); on a mesh, jax's own."""
    if _mesh(model) is not None:
        if check_name(backend) not in ("auto", "jax"):
            raise ValueError(f"backend: expected 'jax' or 'auto' on a mesh, got {backend!r}")
        return "jax"
    chosen = choose(backend, kind_of(model) or "numpy", device_of(model))
    return "jax" if chosen == "pallas" and backend == "auto" and _exceeds_tpu(model) else chosen


def _exceeds_tpu(model: Any) -> bool:
    """Whether the TPU's kernels refuse: it has no float16, and long sequences do not fit."""
    is_half = len(model.shape) == 3 and dtype_name(model) == "float16"
    return is_half or int(model.shape[1]) > backend_module("pallas").MOST_POSITIONS


@cache
def _jitted(name: str, backend: str, sharding: Any = None) -> Any:
    """A jax backend's function, compiled once for plans that are alike; perhaps on a mesh."""
    import jax

    from .jax_shared import float_of

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
        if isinstance(numbers, Arguments):
            numbers = numbers.unpacked(float_of(row.is_wide))
        plan = StepPlan(row, commit, numbers)
        if backend in BACKENDS and BACKENDS[backend].derives:
            x = x._replace(seeds=key_words(x.seeds))
        else:
            x = to_framework(complete(x, plan), "jax", x.logits)
        return function(x, plan, dtype, *more)

    return jax.jit(call, static_argnames=("mask_token_id", "row", "commit", "dtype"))


def arguments_of(plan: StepPlan, chosen: str, dtype: str = "", mask_token_id: int = 0) -> Any:
    """The numbers of a plan as a jitted program of a backend takes them."""
    if plan.index is None:
        if chosen == "cpp in jax":
            return backend_module(chosen).packed(plan, dtype, mask_token_id)
        return as_arguments(plan)
    import jax
    import jax.numpy as jnp

    each = [arguments_of(one, chosen, dtype, mask_token_id) for one in plan.numbers]
    return jax.tree.map(lambda *numbers: jnp.asarray(np.stack(numbers))[plan.index], *each)


def _cast(x: Any, dtype: str) -> Any:
    if dtype_name(x) == dtype:
        return x
    kind = kind_of(x)
    if kind == "torch":
        import torch

        return x.to(getattr(torch, dtype))
    if kind == "jax" and dtype == "float64":
        from .jax_shared import float_of

        return x.astype(float_of(True))
    return x.astype(dtype)
