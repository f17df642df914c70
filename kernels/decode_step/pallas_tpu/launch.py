"""The decode step on TPUs: what each kernel is compiled for, its blocks, and its two launches.

    rows      (rows.py)    one read of the logits: candidates, scores, log Z
    commit    (commit.py)  counts, selection and re-masking of whole sequences

Nothing else runs for most rules: both kernels read tokens, seeds and counts as they were given, and
what passes between them is 8 bytes a row.  A block of rows is at most 4 MB where that holds 8 rows (16
of 16-bit logits), and there are two of them in VMEM; blocks are taken from (B, N, V) as it lies.
Numbers that change from step to step are scalars in SMEM, so that steps share a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...common.philox import LEAF
from ...common.simulation import interpret_params, is_simulating
from ..inputs import StepInputs
from ..rule.plan import RowPlan, StepPlan
from .commit import CommitSpec, Scalars, commit_kernel
from .rows import SEQUENCES, rows_kernel
from .tiles import LANES, RowSpec

BLOCK_BYTES = 4 << 20
MOST_BLOCK_BYTES = 24 << 20  # two of these fit in the 64 MB of the smaller chips
MOST_ROWS = 512
FEW = 4  # rows of a sequence that make a block
MANY = 1 << 13  # columns of rows that are worth a step of their own for a few of them
MOST_POSITIONS = 1 << 15  # of a sequence: eight of them in VMEM, fifteen fields of each
_NEEDS_NO_Z = ("logit", "random", "given")


def decode_step(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence), each (B, N); `dtype` is that of the logits."""
    drawn, score = x.drawn, x.scores
    if drawn is None:
        drawn, score, _ = draw(x, plan, dtype, has_log_z=False)
    return _commit(x, drawn, score, plan, dtype)


def sample_tokens(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(candidate or -1, score, log_z), each (B, N); (-1, -inf, -inf) where not eligible."""
    return draw(x, plan, dtype, has_log_z=True)


def draw(x: StepInputs, plan: StepPlan, dtype: str, has_log_z: bool) -> tuple[Any, Any, Any]:
    """Candidates, scores and, if asked for, log Z by the rows kernel."""
    batch, length, vocab = x.logits.shape
    nothing = jnp.full((batch, length), -jnp.inf)
    if batch * length == 0:
        return jnp.full((batch, length), -1, jnp.int32), nothing, nothing
    spec = row_spec(x, plan, dtype, has_log_z)
    fields = {"tokens": x.tokens, "eligible": x.eligible, "positions": x.positions}
    keys = "none" if x.seeds is None or spec.draw != "race" else "scalars"
    shape = (batch, length)
    if _are_listed(batch, length, vocab):
        shape = (1, batch * length)
        if fields["positions"] is None:
            fields["positions"] = jnp.broadcast_to(
                jnp.arange(length, dtype=jnp.int32), (batch, length)
            )
        if keys == "scalars":
            keys = "fields"
            for i in (0, 1):
                fields[f"key{i}"] = jnp.broadcast_to(x.seeds[:, i : i + 1], (batch, length))
    fields = {n: as_int32(f).reshape(shape) for n, f in fields.items() if f is not None}
    arrays = [
        a.reshape(*shape, vocab)
        for a in (x.logits, x.uncond_logits, x.token_gumbel)
        if a is not None
    ]
    seeds = as_int32(x.seeds) if keys == "scalars" else None
    out = sample_rows(arrays, fields, seeds, keys, numbers(x, plan), spec, has_log_z)
    return (*(a.reshape(batch, length) for a in out), nothing)[:3]


def block_rows(length: int, row_bytes: int, dtype: str) -> int:
    """Rows of a block: what fits into 4 MB, and no more than there are; from 128 on, in 128s."""
    least = 8 if dtype == "float32" else 16
    if least * row_bytes > MOST_BLOCK_BYTES:
        raise ValueError(
            f"logits: expected rows of at most {MOST_BLOCK_BYTES // least >> 10} KB with backend "
            f"'pallas', got {row_bytes >> 10} KB"
        )
    most = max(least, min(MOST_ROWS, BLOCK_BYTES // row_bytes))
    wanted = min(most, length)
    if wanted > LANES // 2 and most >= LANES:
        return -(-wanted // LANES) * LANES if wanted < most else most // LANES * LANES
    size = FEW if length == FEW else least
    while size < wanted and 2 * size <= most:
        size *= 2
    return size


def _are_listed(batch: int, length: int, vocab: int) -> bool:
    """Whether short sequences of short rows are taken as one list of rows, which copies the logits."""
    return length < SEQUENCES < batch and vocab < MANY


def row_spec(x: StepInputs, plan: StepPlan, dtype: str, has_log_z: bool) -> RowSpec:
    """What the rows kernel is compiled for."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"logits: expected float32 or bfloat16 with backend 'pallas', got {dtype}")
    batch, length, vocab = x.logits.shape
    noise = x.token_gumbel is not None
    guided, mask = x.uncond_logits is not None, word_of(x.mask_token_id)
    spec = rule_spec(plan.row, noise, guided, dtype, has_log_z, mask)
    size = (4 if dtype == "float32" else 2) * (1 + (spec.guide > 0)) + 4 * noise
    listed = _are_listed(batch, length, vocab)
    whole = -(-vocab // LEAF) * LEAF
    rows = block_rows(batch * length if listed else length, whole * size, dtype)
    packed = length in (FEW, 8) and not listed and vocab % LEAF == 0
    banned, score_banned = (
        tuple(i for i in ids if i < vocab) for ids in (spec.banned, spec.score_banned)
    )
    return dataclasses.replace(
        spec, rows=length if packed else rows, packed=packed, vocab=vocab, banned=banned,
        score_banned=score_banned,
    )  # fmt: skip


def word_of(token_id: int) -> int:
    """The low 32 bits of a token id, as the int32 that the kernels compare."""
    return int(np.uint32(token_id & 0xFFFFFFFF).view(np.int32))


@lru_cache(maxsize=1024)
def rule_spec(
    row: RowPlan, noise: bool, guided: bool, dtype: str, has_log_z: bool, mask_token_id: int
) -> RowSpec:
    """What of a RowSpec follows from the plan; rows and vocab are to be filled in."""
    draw = "greedy_probs" if row.greedy_on_probs else "greedy"
    if row.draws:
        draw = "noise" if noise else "race"
    apart = (row.filters and not row.score_filtered) or row.score_banned
    return RowSpec(
        rows=0,
        vocab=0,
        vocab_start=row.vocab_start,
        dtype=dtype,
        guide=row.guide if guided else 0,
        banned=row.banned_columns(mask_token_id),
        filters=tuple((name, float(value), divides) for name, value, divides in row.filters),
        below=row.nucleus_below,
        draw=draw,
        score=row.score,
        score_filtered=row.score_filtered,
        score_banned=row.score_banned,
        needs_z=has_log_z or row.score not in _NEEDS_NO_Z,
        rounding="float32" if row.is_wide else row.score_dtype,
        shared=draw == "race" and row.same_temperature and not apart,
        held=row.holds,
        touches_known=row.touches_known,
        mask_token_id=mask_token_id,
    )


def numbers(x: StepInputs, plan: StepPlan) -> tuple[jax.Array, jax.Array]:
    """(step, the other numbers of tiles.Numbers)."""
    n = plan.numbers
    scalars = [x.guidance_scale, n.sample_temperature, n.draw_scale, n.score_scale, n.filter_scale]
    return _integers(plan), _floats(*scalars)


def _integers(plan: StepPlan, *others: Any) -> jax.Array:
    """[[step, ...]] int32."""
    return jnp.stack([step_word(plan), *(jnp.asarray(n, jnp.int32) for n in others)])[None]


def _floats(*numbers: Any) -> jax.Array:
    return jnp.stack([jnp.asarray(n, jnp.float32) for n in numbers])[None]


def step_word(plan: StepPlan) -> jax.Array:
    """The step's 32 bits as an int32."""
    return jax.lax.bitcast_convert_type(jnp.asarray(plan.numbers.step, jnp.uint32), jnp.int32)


def as_int32(x: jax.Array) -> jax.Array:
    """The low 32 bits."""
    if x.dtype == jnp.int32 or x.dtype == jnp.bool_:
        return x.astype(jnp.int32)
    return x.astype(jnp.uint32).view(jnp.int32)


def grid_of(batch: int, length: int, spec: RowSpec) -> int:
    """Steps of the rows kernel's grid."""
    return -(-batch // SEQUENCES) * min(batch, SEQUENCES) * -(-length // spec.rows)


def sample_rows(
    arrays: list[Any], fields: dict[str, Any], seeds: Any, keys: str, numbers: tuple[Any, Any],
    spec: RowSpec, has_log_z: bool,
) -> Any:  # fmt: skip
    """The rows kernel on (B, N, V) logits, unconditional logits and noise: two or three results."""
    batch, length, vocab = arrays[0].shape
    blocks, together = -(-length // spec.rows), min(batch, SEQUENCES)
    width = -(-blocks * spec.rows // LANES) * LANES
    kinds = [jnp.int32, jnp.float32, jnp.float32][: 2 + has_log_z]
    last = batch - 1

    def of_rows(group: Any, sequence: Any, block: Any) -> Any:
        return jnp.minimum(group * SEQUENCES + sequence, last), block, 0

    def of_sequences(group: Any, sequence: Any, block: Any) -> Any:
        return group, 0

    rows = pl.BlockSpec((None, spec.rows, spec.width), of_rows)
    if spec.packed:
        arrays = [a.reshape(batch, length, -1, LEAF).swapaxes(1, 2) for a in arrays]
        shape: tuple[int, ...] = (spec.width // LEAF, spec.rows, LEAF)
        if is_simulating():
            arrays, shape = (
                [a.reshape(batch, -1, LEAF) for a in arrays],
                (shape[0] * shape[1], LEAF),
            )
        rows = pl.BlockSpec((None, *shape), lambda *i: (of_rows(*i)[0], *[0] * len(shape)))
    field = pl.BlockSpec((together, width), of_sequences)
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    of_key = pl.BlockSpec((together, 2), of_sequences, memory_space=pltpu.SMEM)
    block = sum(spec.rows * spec.width * a.dtype.itemsize for a in arrays)
    return pl.pallas_call(
        functools.partial(
            rows_kernel, spec=spec, names=tuple(fields), batch=batch, length=length,
            has_noise=len(arrays) > 1 + (spec.guide > 0), keys=keys,
        ),
        grid=(-(-batch // SEQUENCES), together, blocks),
        in_specs=[
            scalar, scalar, *[of_key] * (seeds is not None), *[field] * len(fields),
            *[rows] * len(arrays),
        ],
        out_specs=[field] * len(kinds),
        out_shape=[jax.ShapeDtypeStruct((batch, length), kind) for kind in kinds],
        scratch_shapes=[pltpu.VMEM((16, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem(block),
        ),
        cost_estimate=pl.CostEstimate(
            flops=8 * batch * length * vocab,
            transcendentals=batch * length * vocab,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays)
            + 4 * batch * length * (len(fields) + len(kinds)),
        ),
        interpret=interpret_params(),
        name="maskgit_rows",
    )(*numbers, *[a for a in (seeds,) if a is not None], *fields.values(), *arrays)  # fmt: skip


def _vmem(block: int) -> int | None:
    """VMEM for two blocks and what is spilled; the chip's default where that is enough."""
    return None if block <= BLOCK_BYTES else 2 * block + (8 << 20)


def commit_spec(x: StepInputs, plan: StepPlan, dtype: str) -> CommitSpec:
    """What the commit kernel is compiled for at this step."""
    how, (batch, length) = plan.commit, x.tokens.shape
    noise = "given" if x.choice_gumbel is not None else "stream"
    return CommitSpec(
        rows=_sequences(batch, length),
        length=length,
        mask_token_id=word_of(x.mask_token_id),
        count=how.count,
        cut=how.cut,
        fraction_of_mean=how.count_rows == "mean",
        limit_is_given=how.count_rows == "first",
        clamps=how.clamps,
        looks_up=_looks_up(plan),
        least_is_quota=how.least_is_quota,
        source=how.source,
        noise=noise if how.uses_noise else "none",
        adds_noise=how.adds_noise,
        threshold_strict=how.threshold_strict,
        has_slack=how.has_slack,
        factor_tail=how.factor_tail,
        revise=how.revises,
        touches_known=how.touches_known,
        edits=how.edits,
        remasks=how.remasks,
        remasks_by_score=how.remasks_by_score,
        skip_mask_token=how.skips_mask,
        compared_in=how.compared_in if how.has_slack else "",
    )


def _sequences(batch: int, length: int) -> int:
    """Sequences of a block: 8 or a few times 8, all at once where there are fewer."""
    most = max(8, min(64, (1 << 15) // max(length, 1) // 8 * 8))
    return batch if batch <= most else most


def _commit(
    x: StepInputs, drawn: Any, score: Any, plan: StepPlan, dtype: str
) -> tuple[Any, Any, Any]:
    """Counts in a few XLA operations on (B,) arrays, the rest by the commit kernel."""
    n, (batch, length) = plan.numbers, x.tokens.shape
    kind = x.tokens.dtype
    if length > MOST_POSITIONS:
        raise ValueError(
            f"tokens: backend 'pallas' expected at most {MOST_POSITIONS} positions, got {length}"
        )
    if batch * length == 0:
        return x.tokens, x.tokens, jnp.zeros((batch, length), jnp.float32)
    spec = commit_spec(x, plan, dtype)
    drawn = drawn.astype(jnp.int32)
    needs_scores = spec.source == "given" or spec.remasks_by_score
    streams = spec.noise == "stream"
    given = {
        "tokens": x.tokens,
        "drawn": drawn,
        "eligible": x.eligible,
        "positions": x.positions if streams else None,
        "start": x.num_masked_at_start[:, None]
        if spec.looks_up and x.num_masked_at_start is not None
        else None,
        "num_commit": None if x.num_commit is None else x.num_commit[:, None],
        "seeds": x.seeds if streams else None,
        "table": n.table[None] if spec.looks_up else None,
    }
    given = {n: as_int32(jnp.asarray(a)) for n, a in given.items() if a is not None}
    for name, array, is_read in (
        ("score", score, spec.source == "drawn"), ("scores", x.scores, needs_scores),
        ("gumbel", x.choice_gumbel, spec.noise == "given"),
    ):  # fmt: skip
        if is_read:
            given[name] = array.astype(jnp.float32)
    scalars = _floats(*(getattr(n, name) for name in Scalars._fields))
    numbers = [_integers(plan, *_of_batch(x, drawn, plan)), scalars]
    if spec.count == "factor":
        numbers.append(jnp.asarray(n.bounds[:length], jnp.float32)[None])
    out = commit_rows(given, numbers, spec)
    return out[0].astype(kind), out[1].astype(kind), out[2]


def _looks_up(plan: StepPlan) -> bool:
    """Whether each sequence looks its count up by its own number of masked positions."""
    each = not plan.commit.base_is_positions and plan.commit.count_rows in ("each", "mean")
    return bool(plan.numbers.table.size) and each


def commit_rows(given: dict[str, Any], numbers: list[Any], spec: CommitSpec) -> Any:
    """The commit kernel on fields of Inputs by name: next tokens, candidates, confidence, (B, N).

    numbers: integers, scalars and, for count "factor", a bound for each rank; in SMEM.
    """
    batch, length = given["tokens"].shape
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    shape = (spec.rows, spec.width)
    block = pl.BlockSpec(shape, lambda i: (i, 0))

    def spec_of(name: str, array: Any) -> pl.BlockSpec:
        if name == "table":
            return pl.BlockSpec(array.shape, lambda i: (0, 0))
        if name in ("start", "num_commit", "seeds"):
            return pl.BlockSpec((spec.rows, array.shape[1]), lambda i: (i, 0))
        return block

    compared = batch * spec.width * (spec.width if spec.needs_ranks else 1)
    outputs = [jnp.int32, jnp.int32, jnp.float32]
    return pl.pallas_call(
        functools.partial(commit_kernel, spec=spec, names=tuple(given)),
        grid=(-(-batch // spec.rows),),
        in_specs=[*[scalar] * len(numbers), *(spec_of(n, a) for n, a in given.items())],
        out_specs=[block] * 3,
        out_shape=[jax.ShapeDtypeStruct((batch, length), kind) for kind in outputs],
        scratch_shapes=[
            pltpu.VMEM(shape if spec.rows > 1 else (spec.width // LANES, LANES), jnp.int32),
            pltpu.VMEM(shape, jnp.int32),
            pltpu.VMEM(shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=_vmem(4 * max(spec.rows, 8) * spec.width * (len(given) + 6)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * compared,
            transcendentals=2 * batch * length,
            bytes_accessed=4 * (sum(a.size for a in given.values()) + 3 * batch * length),
        ),
        interpret=interpret_params(),
        name="maskgit_commit",
    )(*numbers, *given.values())


def _of_batch(x: StepInputs, drawn: jax.Array, plan: StepPlan) -> tuple[Any, Any]:
    """(target, upper limit) of the count where these are the same for all sequences."""
    how, rows, table = plan.commit, plan.commit.count_rows, plan.numbers.table
    if how.base_is_positions and rows != "first" and table.size:
        return table[-1], 0
    if rows == "each":
        return 1, 0
    mask = word_of(x.mask_token_id)
    takes_part = as_int32(x.tokens) == mask
    if how.touches_known:
        takes_part = takes_part | True
    if x.eligible is not None:
        takes_part = takes_part & x.eligible
    competes = takes_part if how.revises else takes_part & (as_int32(x.tokens) == mask)
    if how.skips_mask:
        competes = competes & (drawn != mask)
    if rows == "mean":
        if how.count != "fraction":
            return 1, 0
        return jnp.asarray(plan.numbers.shares)[competes.sum()], 0
    start = x.num_masked_at_start
    start = takes_part.sum(1) if start is None else start
    start = start[0] if rows == "first" else start.sum()
    limit = competes[0].sum()
    if how.count == "given" or not table.size:
        return 1, limit
    table = jnp.asarray(table, dtype=jnp.int32)
    return table[-1] if how.base_is_positions else table[start.clip(0, table.size - 1)], limit
