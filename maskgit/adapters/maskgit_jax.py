"""google-research/maskgit at 1db23594: `parallel_decode.decode`.

    import maskgit.adapters

    maskgit.__path__.append("checkout/maskgit")      # their package has the name of this one
    from maskgit.libml import parallel_decode

    with maskgit.adapters.fast_sampler(parallel_decode):        # or with fast=True
        steps = parallel_decode.decode(tokens, rng, tokens_to_logits, num_iter=8)

Replaced: `decode` in the module that is given, with its arguments and its result, (B, num_iter, N)
candidates of all steps.  What stays: `tokens_to_logits`, and `jax.jit` or `jax.pmap` around it all.
By default the noise comes from `rng` as theirs does, so that the same key gives the same tokens up
to near ties of the last bit.  With fast=True it comes from one counter-based seed per sequence
that is drawn from `rng`: the same law, other tokens, and no (B, N, V) array of noise.

What differs: the steps are a Python loop, unrolled under `jax.jit`, not a `lax.while_loop`, so
`num_iter` and `start_iter` have to be numbers.  Unknown schedules raise ValueError.  Rows whose
logits have no finite value stay masked.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

from ..kernels.common.selection import check_name
from ..kernels.decode_step import StepNoise, StepRule, decode_step
from ..kernels.decode_step.checks import check_integer
from ..kernels.decode_step.counts import check_schedule
from .common import Handle, Report, check_signature

_CODEBASE = (
    "google-research/maskgit@1db23594e1bd328ee78eadcd148a19281cd0f5b8 "
    "maskgit/libml/parallel_decode.py"
)
_ARGUMENTS = (
    "inputs, rng, tokens_to_logits, mask_token_id, num_iter, start_iter, choice_temperature, "
    "mask_scheduling_method"
)
_SCHEDULES = ("uniform", "cosine", "log", "exp")


def matches(target: Any) -> bool:
    """Whether the target is a module with their functions."""
    names = ("decode", "mask_by_random_topk", "state_init", "State")
    return isinstance(target, ModuleType) and all(hasattr(target, name) for name in names)


def install(target: Any, *, fast: bool = False, backend: str = "auto") -> Handle:
    """Replace `decode` in the module `target`.

    Args:
        target: the module.
        fast: whether the noise is this library's, drawn where it is used.
        backend: as in `maskgit.decode_step`.
    """
    check_name(backend)
    check_signature(getattr(target, "decode", None), _ARGUMENTS, "decode")
    report = Report("maskgit_jax", _CODEBASE, "parallel_decode")
    if fast:
        report.note("random numbers: one seed per sequence and call, drawn from rng")
    else:
        report.note("random numbers: jax.random's, with the keys of the original")
    report.note("the steps are unrolled: num_iter and start_iter are numbers")
    handle = Handle(target, report)

    options: dict[str, Any] = {"fast": fast, "backend": backend}

    def call(_: Any, *args: Any, **kwargs: Any) -> Any:
        return decode(*args, **(options | kwargs))

    call.__doc__ = decode.__doc__
    handle.replace_method("decode", call)
    return handle


def decode(
    inputs: Any,
    rng: Any,
    tokens_to_logits: Any,
    mask_token_id: int = -1,
    num_iter: int = 12,
    start_iter: int = 0,
    choice_temperature: float = 1.0,
    mask_scheduling_method: str = "cosine",
    *,
    fast: bool = False,
    seeds: Any = None,
    backend: str = "auto",
) -> Any:
    """Their loop: (B, num_iter, N) int32, every step's candidates and known tokens.

    Args:
        inputs: (B, N) integers; `mask_token_id` marks what is generated.
        rng: a jax key.
        tokens_to_logits: maps tokens (B, N) to logits (B, N, V).
        mask_token_id, num_iter, choice_temperature: numbers, as in theirs.
        start_iter: the first step; the entries before it hold `inputs`.
        mask_scheduling_method: uniform, cosine, log, exp or pow<x>.
        fast: see `install`.
        seeds: with fast, (B,) integers or (B, 2) words in place of those drawn from `rng`.
        backend: as in `maskgit.decode_step`.

    Raises:
        TypeError, ValueError: a wrong number or schedule, seeds without fast; and as `decode_step`.
    """
    import jax.numpy as jnp

    for name, number in (("num_iter", num_iter), ("start_iter", start_iter)):
        check_integer(name, number)
    if not 0 <= start_iter <= num_iter:
        raise ValueError(f"start_iter: expected 0 to num_iter = {num_iter}, got {start_iter}")
    if seeds is not None and not fast:
        raise ValueError("seeds: expected None without fast=True, where the noise is that of rng")
    x = jnp.asarray(inputs).astype(jnp.int32)
    rule = _rule(float(choice_temperature), mask_scheduling_method, x.shape[-1] == 1)
    options: dict[str, Any] = {
        "rule": rule,
        "mask_token_id": int(mask_token_id),
        "num_steps": num_iter,
        "num_masked_at_start": (x == mask_token_id).sum(-1),
        "backend": backend,
    }
    if fast:
        options["seeds"] = _seeds(rng, len(x)) if seeds is None else seeds
    steps = [x] * start_iter
    for step in range(start_iter, num_iter):
        logits = tokens_to_logits(x)
        if not fast:
            rng, options["noise"] = _noise(rng, logits)
        x, candidates, _ = decode_step(logits, x, step=step, **options)
        steps.append(candidates)
    return jnp.stack(steps, axis=1) if steps else jnp.tile(x[:, None], (1, 0, 1))


@lru_cache(maxsize=256)
def _rule(temperature: float, method: str, is_single: bool) -> StepRule:
    """Their step, with this library's name of the schedule.

    `is_single`: of a sequence of one token theirs masks none, since it reads the cut behind the end of
    the sorted confidences, and gets NaN.
    """
    if method not in _SCHEDULES and not str(method).startswith("pow"):
        raise ValueError(
            f"mask_scheduling_method: expected one of {', '.join(_SCHEDULES)} or pow<x>, "
            f"got {method!r}"
        )
    schedule = check_schedule("linear" if method == "uniform" else method)
    rule = replace(StepRule.preset("maskgit"), schedule=schedule, choice_temperature=temperature)
    return replace(rule, clamps=("commit_one",)) if is_single else rule


def _noise(rng: Any, logits: Any) -> tuple[Any, StepNoise]:
    """The next key and a step's noise: two splits, for the tokens and then for the choice."""
    import jax

    rng, key = jax.random.split(rng)
    token = jax.random.gumbel(key, logits.shape, logits.dtype)
    rng, key = jax.random.split(rng)
    return rng, StepNoise(token, jax.random.gumbel(key, logits.shape[:-1]))


def _seeds(rng: Any, batch: int) -> Any:
    """(B, 2) words, the seeds of the sequences."""
    import jax

    return jax.random.bits(rng, (batch, 2), "uint32")
