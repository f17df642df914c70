"""google-research/maskgit at 1db23594: `parallel_decode.decode`.

    import maskgit.adapters

    maskgit.__path__.append("checkout/maskgit")      # their package has the name of this one
    from maskgit.libml import parallel_decode

    with maskgit.adapters.fast_sampler(parallel_decode):        # or with fast=True
        steps = parallel_decode.decode(tokens, rng, tokens_to_logits, num_iter=8)

Replaced: `decode` in the module that is given, with its arguments and its result, (B, num_iter, N)
candidates of all steps.  What stays: `tokens_to_logits`, and `jax.jit` or `jax.pmap` around it all.
By default every step is computed as theirs is, from the same keys by the same operations in one
`lax.while_loop`: the same key gives the same tokens, bit for bit.  With fast=True the steps are this
library's, with one counter-based seed per sequence that is drawn from `rng`: the same law, other tokens,
and neither (B, N, V) noise nor probabilities.

What differs: schedules other than uniform, cosine, log, exp and pow<x> raise ValueError.  With fast=True
the steps are unrolled, so `num_iter`, `start_iter` and `choice_temperature` have to be numbers, and rows
whose logits have no finite value stay masked.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

from ..kernels.common.arrays import as_index
from ..kernels.decode_step import StepRule, decode_step
from ..kernels.decode_step.rule.schedules import check_schedule
from .fingerprint import check_signature, check_version
from .patching import Handle, Report

_CODEBASE = (
    "google-research/maskgit@1db23594e1bd328ee78eadcd148a19281cd0f5b8 "
    "maskgit/libml/parallel_decode.py"
)
_ARGUMENTS = (
    "inputs, rng, tokens_to_logits, mask_token_id, num_iter, start_iter, choice_temperature, "
    "mask_scheduling_method"
)
VERSIONS = {
    "1db23594": {
        "decode": "50945b57520d1a84",
        "state_init": "ab5c2544ae70328b",
        "mask_schedule.schedule": "adc62e5fe0647df2",
        "_CONFIDENCE_OF_KNOWN_TOKENS": "inf",
        "mask_by_random_topk": "fb5f3322f856cbc3",
    }
}
_SCHEDULES = ("uniform", "cosine", "log", "exp")


def matches(target: Any) -> bool:
    """Whether the target is a module with their functions."""
    names = ("decode", "mask_by_random_topk", "state_init", "State")
    return isinstance(target, ModuleType) and all(hasattr(target, name) for name in names)


def install(
    target: Any, *, fast: bool = False, backend: str = "auto", trust_version: bool = False
) -> Handle:
    """Replace `decode` in the module `target`.

    Args:
        target: the module.
        fast: whether steps and noise are this library's.
        backend: of fast steps, as in `maskgit.decode_step`.
        trust_version: whether a target whose code is not known is taken for a known one.
    """
    check_signature(getattr(target, "decode", None), _ARGUMENTS, "decode")
    version = check_version(
        target, ("decode",), VERSIONS, what="parallel_decode.decode", trusted=trust_version
    )
    report = Report("maskgit_jax", _CODEBASE, version)
    if fast:
        report.note("random numbers: one seed per sequence and call, drawn from rng")
        report.note("the steps are unrolled: num_iter and start_iter are numbers")
    else:
        report.note("random numbers: jax.random's, with the keys of the original")
    handle = Handle(target, report)

    options: dict[str, Any] = {"fast": fast, "backend": backend}

    def call(_: Any, **kwargs: Any) -> Any:
        return decode(**(options | kwargs))

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
        start_iter: the first step; the entries before it hold `inputs`.  May be traced without fast.
        mask_scheduling_method: uniform, cosine, log, exp or pow<x>.
        fast: see `install`.
        seeds: with fast, (B,) integers or (B, 2) words in place of those drawn from `rng`.
        backend: of fast steps, as in `maskgit.decode_step`.

    Raises:
        TypeError, ValueError: a wrong number or schedule, seeds without fast; and as `decode_step`.
    """
    import jax
    import jax.numpy as jnp

    num_iter = as_index("num_iter", num_iter, 0)
    if fast or not isinstance(start_iter, jax.Array):
        start_iter = as_index("start_iter", start_iter, 0 if fast else None)
    if seeds is not None and not fast:
        raise ValueError("seeds: expected None without fast=True, where the noise is that of rng")
    check_method(mask_scheduling_method)
    x = jnp.asarray(inputs).astype(jnp.int32)
    if not fast:
        return _as_theirs(
            x, rng, tokens_to_logits, mask_token_id, num_iter, start_iter, choice_temperature,
            mask_scheduling_method,
        )  # fmt: skip
    options: dict[str, Any] = {
        "rule": _rule(float(choice_temperature), mask_scheduling_method, x.shape[-1] == 1),
        "mask_token_id": int(mask_token_id),
        "num_steps": num_iter,
        "num_masked_at_start": (x == mask_token_id).sum(-1),
        "seeds": _seeds(rng, len(x)) if seeds is None else seeds,
        "backend": backend,
    }
    steps = [x] * min(start_iter, num_iter)
    for step in range(start_iter, num_iter):
        x, candidates, _ = decode_step(tokens_to_logits(x), x, step=step, **options)
        steps.append(candidates)
    return jnp.stack(steps, axis=1) if steps else jnp.tile(x[:, None], (1, 0, 1))


def schedule(ratio: Any, total_unknown: Any, method: str = "cosine") -> Any:
    """Their `mask_schedule.schedule`: the share of tokens that is masked, in [1e-6, 1], in jax.numpy.

    Args:
        ratio: share of the steps that are done, in [0, 1], any shape, may be traced.
        total_unknown: how many tokens there are to be masked, broadcast; of log and exp.
        method: uniform, cosine, log, exp or pow<x>.

    Raises:
        ValueError: another method.

    `maskgit.gamma` is the same on the host, correctly rounded.
    """
    import jax.numpy as jnp

    check_method(method)
    if method == "uniform":
        share = 1.0 - ratio
    elif method == "cosine":
        share = jnp.cos(math.pi / 2.0 * ratio)
    elif method == "log":
        share = -jnp.log2(ratio) / jnp.log2(total_unknown)
    elif method == "exp":
        share = 1 - jnp.exp2(-jnp.log2(total_unknown) * (1 - ratio))
    else:
        share = 1.0 - ratio ** float(method.removeprefix("pow"))
    return jnp.clip(share, 1e-6, 1.0)


def check_method(method: object) -> None:
    """ValueError unless `method` names one of their schedules."""
    if method in _SCHEDULES:
        return
    if not isinstance(method, str) or not method.startswith("pow"):
        raise ValueError(
            f"mask_scheduling_method: expected one of {', '.join(_SCHEDULES)} or pow<x>, got {method!r}"
        )
    check_schedule(method)


def _as_theirs(
    x: Any, rng: Any, tokens_to_logits: Any, mask_token_id: Any, num_iter: int, start_iter: Any,
    choice_temperature: Any, method: str,
) -> Any:  # fmt: skip
    """Every step's candidates, by the operations of the original in their order.

    Which are, for its bits: the ratio in float32 from an integer that is traced, the softmax before its
    logarithm, +inf for what is known, and the cut `confidence < sorted[k]`.
    """
    import jax
    import jax.numpy as jnp

    at_start = jnp.sum(x == mask_token_id, axis=-1)

    def step_of(state: Any) -> Any:
        step, ids, key, seen = state
        logits = tokens_to_logits(ids)
        key, draw = jax.random.split(key, 2)
        unknown = ids == mask_token_id
        drawn = jnp.where(unknown, jax.random.categorical(draw, logits), ids)
        seen = jax.lax.dynamic_update_slice(seen, drawn[:, None], (0, step, 0))
        done = 1.0 * (step + 1) / num_iter
        probs = jax.nn.softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(probs, drawn[..., None], -1)[..., 0]
        chosen = jnp.where(unknown, chosen, jnp.inf)
        stay = jnp.floor(at_start * schedule(done, at_start, method))[:, None]
        left = jnp.sum(unknown, axis=-1, keepdims=True)
        stay = jnp.maximum(1, jnp.minimum(left - 1, stay))
        key, choose = jax.random.split(key)
        noise = jax.random.gumbel(choose, chosen.shape)
        confidence = jnp.log(chosen) + choice_temperature * (1.0 - done) * noise
        cut = jnp.take_along_axis(jnp.sort(confidence, axis=-1), stay.astype(jnp.int32), axis=-1)
        return step + 1, jnp.where(confidence < cut, mask_token_id, drawn), key, seen

    seen = jnp.tile(x[:, None], (1, num_iter, 1))
    state = (jnp.array(start_iter), x, rng, seen)
    return jax.lax.while_loop(lambda state: state[0] < num_iter, step_of, state)[3]


@lru_cache(maxsize=256)
def _rule(temperature: float, method: str, is_single: bool) -> StepRule:
    """Their step, with this library's name of the schedule.

    `is_single`: of a sequence of one token theirs masks none, since it reads the cut behind the end of
    the sorted confidences, and gets NaN.
    """
    name = "linear" if method == "uniform" else method
    rule = replace(StepRule.preset("maskgit"), schedule=name, choice_temperature=temperature)
    return replace(rule, clamps=("commit_one",)) if is_single else rule


def _seeds(rng: Any, batch: int) -> Any:
    """(B, 2) words, the seeds of the sequences."""
    import jax

    return jax.random.bits(rng, (batch, 2), "uint32")
