"""The one door of a decode step: every argument is looked at here, once, before it reaches a backend.

What can be said of arrays without their values (library, device, shape, dtype) stands in one table, and
is said once for arrays that are alike: `_check_facts` is remembered.  What hangs on values is looked at on
the host alone, where nothing has to be waited for.  Every message names the argument, what was expected
and what was got.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..common.arrays import (
    Facts,
    as_scalar,
    check_integer,
    check_integers,
    check_no_grad,
    check_same_kind,
    check_shape,
    dtype_name,
    facts,
    is_on_host,
    kind_of,
    library_of,
    place_of,
    to_kind,
    to_numpy,
)
from .inputs import StepInputs
from .rule.plan import StepPlan, resolve
from .rule.rule import StepRule

LOGIT_DTYPES = ("float16", "bfloat16", "float32", "float64")  # the last is rounded to float32
_INTEGERS, _FLOATING = ("int", "uint"), ("float", "bfloat")
# field of StepInputs -> (name in messages, shape in sizes B, N and W columns, what the dtype starts with)
_ARRAYS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "drawn": ("candidate_tokens", "BN", _INTEGERS),
    "tokens": ("tokens", "BN", _INTEGERS),
    "eligible": ("eligible", "BN", ("bool",)),
    "scores": ("scores", "BN", _FLOATING),
    "positions": ("positions", "BN", _INTEGERS),
    "token_gumbel": ("noise.token_gumbel", "BNW", _FLOATING),
    "choice_gumbel": ("noise.choice_gumbel", "BN", _FLOATING),
    "seeds": ("seeds", "B", _INTEGERS),
    "num_masked_at_start": ("num_masked_at_start", "B", _INTEGERS),
    "num_commit": ("num_commit", "B", _INTEGERS),
}
_COUNTS = ("num_masked_at_start", "num_commit")
_WORDS = {_INTEGERS: "integers", _FLOATING: "floating numbers", ("bool",): "dtype bool"}


class TracedStep(NamedTuple):
    """Steps whose plans differ in their numbers alone; `index` (traced) says which of them it is."""

    steps: tuple[int, ...]
    index: Any


def plan_of(
    rule: StepRule, mask_token_id: int, step: Any, num_steps: int, model: Any,
    dtype: str | None = None,
) -> StepPlan:  # fmt: skip
    """The rule at this step, once the numbers are integers."""
    if isinstance(step, TracedStep):
        plans = [plan_of(rule, mask_token_id, s, num_steps, model, dtype) for s in step.steps]
        return StepPlan(plans[0].row, plans[0].commit, plans, step.index)
    check_integer("mask_token_id", mask_token_id)
    check_integer("step", step)
    check_integer("num_steps", num_steps)
    return resolve(rule, step, num_steps, tuple(model.shape[:2]), dtype or dtype_name(model))


def admit(
    model: Any,
    vocab: int | None,
    rule: StepRule,
    plan: StepPlan,
    mask_token_id: int,
    given: dict[str, Any],
    **rest: Any,
) -> StepInputs:
    """The inputs of a step as they are given; `check_values` is left to do.

    Args:
        model: (B, N, ...), logits, hidden states or scores: the others must be of its library and on
            its device.
        vocab: V; None for candidates in place of logits.
        given: arrays by their fields in `StepInputs`; without "tokens" rows are drawn, none is committed.
        rest: other fields, which are not looked at here.

    `inputs.complete` makes of them what a backend needs that does not derive it from the tokens.
    """
    for name in _COUNTS:
        if given.get(name) is not None:
            given[name] = _as_counts(name, given[name], model)
    arrays = tuple([(name, facts(x)) for name, x in given.items() if x is not None])
    _check_facts(facts(model), vocab, rule, int(mask_token_id), "tokens" in given, arrays)
    if given.get("seeds") is None:
        _check_seedless(model, vocab, rule, plan, given)
    if not plan.row.draws:
        given["token_gumbel"] = None
    if rule.count_base == "block" and "tokens" in given and given["num_masked_at_start"] is None:
        tokens = given["tokens"]  # of which the whole is counted
        batch, length = tokens.shape
        whole = library_of(tokens).full((batch,), length, **place_of(tokens))
        given["num_masked_at_start"] = whole
    return StepInputs(mask_token_id=mask_token_id, **given, **rest)


_LAST_ID = 2**63 - 1
_SIGNLESS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@lru_cache(maxsize=4096)
def _check_facts(
    model: Facts,
    vocab: int | None,
    rule: StepRule,
    mask_token_id: int,
    commits: bool,
    arrays: tuple[tuple[str, Facts], ...],
) -> None:
    """What can be said of arrays without their values."""
    named = dict(arrays)
    if commits:
        if vocab is None:
            check_same_kind("candidate_tokens", named.get("drawn"), model)
        else:
            _check_exactly("scores", "score", named, rule)
        check_same_kind("tokens", named.get("tokens"), model)
        _check_exactly("num_commit", "count", named, rule)
    start, stop = rule.vocab_slice or (0, vocab or 0)
    if vocab is not None and stop > vocab:
        raise ValueError(
            f"rule: vocab_slice {rule.vocab_slice} expected within V = {vocab} columns"
        )
    _check_arrays(model, stop - start, vocab is None, arrays)
    if commits:
        _check_ids_fit(named["tokens"], vocab, mask_token_id)


def _check_arrays(
    model: Facts, width: int, is_commit: bool, arrays: tuple[tuple[str, Facts], ...]
) -> None:
    """Each array against its line in the table."""
    batch, length = model.shape[:2]
    sizes = {"B": batch, "N": length, "W": width}
    for field, array in arrays:
        name, shape, dtypes = _ARRAYS[field]
        name = "choice_gumbel" if is_commit and field == "choice_gumbel" else name
        if not (field in _COUNTS and array.kind == "numpy"):  # which go with any other
            check_same_kind(name, array, model)
        check_no_grad(name, array)
        if field == "seeds":
            _check_seeds(array, batch)
            continue
        check_shape(name, array, tuple(sizes[letter] for letter in shape))
        if not dtype_name(array).startswith(dtypes):
            words = (
                f"{_WORDS[dtypes]}, got" if dtypes == ("bool",) else f"{_WORDS[dtypes]}, got dtype"
            )
            raise TypeError(f"{name}: expected {words} {dtype_name(array)}")


def _check_exactly(name: str, field: str, named: dict[str, Facts], rule: StepRule) -> None:
    """Scores and counts from outside are there exactly where the rule asks for them."""
    value = getattr(rule, field)
    if (name in named) != (value == "given"):
        what = "scores" if name == "scores" else "numbers"
        got = f"{what} with {field}={value!r}" if name in named else "None"
        raise ValueError(f"{name}: expected exactly where the rule has {field}='given', got {got}")


def _check_seeds(seeds: Facts, batch: int) -> None:
    """(B,) integers, (B, 2) words, or (B,) keys."""
    is_keys = dtype_name(seeds).startswith("key")
    if not is_keys:
        check_integers("seeds", seeds)
    legal = ((batch,),) if is_keys else ((batch,), (batch, 2))
    if tuple(seeds.shape) not in legal:
        wanted = " or ".join(str(shape) for shape in legal)
        raise ValueError(f"seeds: expected shape {wanted}, got {tuple(seeds.shape)}")


def _check_ids_fit(tokens: Facts, vocab: int | None, mask_token_id: int) -> None:
    """The dtype of the tokens holds every id that may be written into them."""
    most = int(np.iinfo(np.dtype(dtype_name(tokens))).max)
    if vocab is None and mask_token_id > most:
        raise ValueError(
            f"mask_token_id: expected an id that {dtype_name(tokens)} holds, got {mask_token_id}"
        )
    if vocab is not None and max(vocab - 1, mask_token_id) > most:
        raise TypeError(
            f"tokens: expected a dtype that holds ids up to {max(vocab - 1, mask_token_id)}, "
            f"got {dtype_name(tokens)}"
        )


def _check_seedless(
    model: Any, vocab: int | None, rule: StepRule, plan: StepPlan, given: dict[str, Any]
) -> None:
    """ValueError where a step needs random numbers, and neither seeds nor noise are given."""
    draws = vocab is not None and plan.row.draws and given.get("token_gumbel") is None
    ranks = "tokens" in given and plan.commit.uses_noise and given.get("choice_gumbel") is None
    if draws or ranks:
        what = "draws its candidates" if draws else "adds noise to its confidences"
        raise ValueError(
            f"seeds: expected ({model.shape[0]},) integers because rule {rule.name!r} {what} at this "
            "step, got None"
        )


def check_values(
    x: StepInputs, vocab: int | None, rule: StepRule, plan: StepPlan, step: Any
) -> None:
    """What hangs on values: ids, positions and counts that are on the host."""
    positions, tokens = _on_host(x.positions), _on_host(x.tokens)
    if positions is not None and positions.size:
        least, most = positions.min(), positions.max()
        if least < 0 or most >= 2**32:
            raise ValueError(f"positions: expected values in [0, 2^32), got {least} to {most}")
    if x.tokens is None:
        return
    if tokens is not None and vocab is not None:
        check_token_ids(tokens, vocab, x.mask_token_id)
    if x.drawn is not None:
        _check_candidates(_on_host(x.drawn), np.iinfo(np.dtype(dtype_name(x.tokens))).max)
    length = x.tokens.shape[1]
    for name in _COUNTS:
        counts = _on_host(getattr(x, name))
        counts = [] if counts is None else counts.tolist()  # few: faster than to ask NumPy
        if counts and not 0 <= min(counts) <= max(counts) <= length:
            bad = next(count for count in counts if not 0 <= count <= length)
            raise ValueError(
                f"{name}: expected counts between 0 and the {length} positions, got {bad}"
            )
    _check_start(rule, plan, x, step, tokens)


def _on_host(x: Any) -> Any:
    """Its values as a NumPy array, where they need not be waited for."""
    if x is None or type(x) is np.ndarray:
        return x
    return to_numpy(x) if is_on_host(x) else None


def check_token_ids(tokens: Any, vocab: int, mask_token_id: int) -> None:
    """ValueError for an id outside the vocabulary, which is V columns or up to the mask id."""
    ids = to_numpy(tokens)
    top = max(vocab, mask_token_id + 1) if mask_token_id >= 0 else _LAST_ID
    if not ids.size:
        return
    # seen without their sign negative ids are the largest
    if mask_token_id >= 0 and ids.view(_SIGNLESS[ids.itemsize]).max() < top:
        return
    bad = ids[((ids < 0) | (ids >= top)) & (ids != mask_token_id)]
    if bad.size:
        raise ValueError(
            f"tokens: expected ids in [0, {top}) or the mask token {mask_token_id}, got {int(bad[0])}"
        )


def _check_candidates(ids: Any, most: int) -> None:
    if ids is not None and ids.size and not -1 <= ids.min() <= ids.max() <= most:
        raise ValueError(
            f"candidate_tokens: expected ids in [0, {most}], or -1 for none, "
            f"got {int(ids.min())} to {int(ids.max())}"
        )


def _check_start(rule: StepRule, plan: StepPlan, x: StepInputs, step: Any, tokens: Any) -> None:
    """ValueError where a count from the start of the loop is missing, or cannot be right.

    With a block's eligible positions the masks that earlier blocks left are there too, uncounted.
    """
    looks_up = plan.commit.count in ("masked", "quota") or plan.commit.least_is_quota
    if not looks_up or plan.commit.count == "all" or rule.count_base == "positions":
        return
    last = step.steps[-1] if isinstance(step, TracedStep) else step
    # where known positions take part the base is all that do, the same at every step
    if x.num_masked_at_start is None and last > 0 and not rule.touches_known:
        raise ValueError(
            "num_masked_at_start: expected the (B,) numbers of positions masked before step 0, from "
            f"which rule {rule.name!r} counts at step {last}, got None"
        )
    start = _on_host(x.num_masked_at_start)
    if start is None or tokens is None:
        return
    if x.eligible is not None and rule.block_scope == "prefix":
        return
    starts = start.tolist()
    if not starts or min(starts) >= tokens.shape[1]:  # no more than there are
        return
    masked = tokens == x.mask_token_id
    eligible = _on_host(x.eligible)
    if x.eligible is not None and eligible is None:  # of a traced program
        return
    now = (masked if eligible is None else masked & eligible).sum(1).tolist()
    for b, (count, least) in enumerate(zip(starts, now, strict=True)):
        if count < least:
            raise ValueError(
                f"num_masked_at_start: expected at least the {least} positions that are masked now in "
                f"sequence {b}, got {count}"
            )


def _as_counts(name: str, given: Any, model: Any) -> Any:
    """Numbers of positions, or one for all sequences, as an array; beside tensors as one."""
    if kind_of(given) not in (None, "numpy"):
        return given
    try:
        array = np.asarray(given)
    except ValueError:  # ragged
        array = np.empty(0, object)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {given!r}")
    array = np.full(model.shape[0], array, np.int64) if array.ndim == 0 else array
    return to_kind(array, "torch", model.device) if kind_of(model) == "torch" else array


def columns(logits: Any, rule: StepRule) -> Any:
    """The columns of `logits` that the rule may draw from, as a view."""
    if logits is None or rule.vocab_slice is None:
        return logits
    return logits[..., rule.vocab_slice[0] : rule.vocab_slice[1]]


def check_logits(logits: Any) -> tuple[int, ...]:
    """The shape (B, N, V) of `logits`, once they are an array of a legal rank, width and dtype."""
    return _check_logits(facts(logits))


@lru_cache(maxsize=1024)
def _check_logits(logits: Facts) -> tuple[int, ...]:
    if logits.kind is None:
        raise TypeError(f"logits: expected a torch, jax or NumPy array, got {logits.type.__name__}")
    if len(logits.shape) != 3 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape (B, N, V) with V >= 1, got {tuple(logits.shape)}")
    if dtype_name(logits) not in LOGIT_DTYPES:
        raise TypeError(
            f"logits: expected dtype {', '.join(LOGIT_DTYPES)}, got {dtype_name(logits)}"
        )
    check_no_grad("logits", logits)
    return tuple(logits.shape)


def check_scores(scores: Any) -> None:
    """(B, N) floating scores, the model of `admit` where there are no logits."""
    if kind_of(scores) is None:
        raise TypeError(
            f"scores: expected a torch, jax or NumPy array, got {type(scores).__name__}"
        )
    if len(scores.shape) != 2:
        raise ValueError(f"scores: expected shape (B, N), got {tuple(scores.shape)}")
    if not dtype_name(scores).startswith(_FLOATING):
        raise TypeError(f"scores: expected floating numbers, got dtype {dtype_name(scores)}")
    check_no_grad("scores", scores)


def check_beside(tokens: Any, rule: StepRule, eligible: Any = None, **scores: Any) -> None:
    """What a loop is given beside its tokens (B, N), before its first step: `eligible`, perhaps `scores`."""
    given = {"eligible": eligible, **scores}
    if scores:
        there = {name: facts(x) for name, x in scores.items() if x is not None}
        _check_exactly("scores", "score", there, rule)
    arrays = tuple([(name, facts(x)) for name, x in given.items() if x is not None])
    _check_arrays(facts(tokens), 0, False, arrays)


def check_guidance(
    logits: Any, uncond_logits: Any, guidance_scale: Any,
    name: str = "uncond_logits", like: str = "logits",
) -> Any:  # fmt: skip
    """The scale as `as_scalar` gives it, 0 without; unconditional logits (or hidden states) must fit."""
    if (uncond_logits is None) != (guidance_scale is None):
        names = (name, "guidance_scale")
        given, missing = names if guidance_scale is None else names[::-1]
        raise ValueError(f"{missing}: expected together with {given}, got None")
    if uncond_logits is None:
        return 0.0
    check_same_kind(name, uncond_logits, logits)
    check_no_grad(name, uncond_logits)
    check_shape(name, uncond_logits, tuple(logits.shape))
    if dtype_name(uncond_logits) != dtype_name(logits):
        raise TypeError(
            f"{name}: expected dtype {dtype_name(logits)} like {like}, "
            f"got {dtype_name(uncond_logits)}"
        )
    return as_scalar("guidance_scale", guidance_scale)


def raise_on_dead_rows(dead: Any, name: str = "logits") -> None:
    """ValueError naming the first row without a finite logit."""
    if dead.any():
        b, n = np.argwhere(dead)[0]
        raise ValueError(
            f"{name}: expected a finite logit in every row, got none in row (sequence {b}, position {n})"
        )
