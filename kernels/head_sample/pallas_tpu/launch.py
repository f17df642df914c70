"""`decode_step_from_hidden` on TPUs: what the fused head is compiled for, and its launch.

Rows that take part are put first, by one sort of B x N flags and a gather of hidden rows; their number is
a scalar in SMEM, and blocks of rows behind it are skipped, W's tiles and all.  Then the head's kernel
(head.py) and the decode step's commit.  Extra memory: the gathered rows and 12 bytes a row.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...common.philox import LEAF
from ...common.simulation import interpret_params
from ...decode_step import dispatch
from ...decode_step.inputs import StepInputs, complete
from ...decode_step.pallas_tpu import launch as step_kernels
from ...decode_step.pallas_tpu.tiles import LANES
from ...decode_step.rule.plan import Arguments, CommitPlan, RowPlan, StepPlan
from .. import chunked
from .head import STATS, HeadSpec, head_kernel

TILE_BYTES = 4 << 20  # of W in VMEM, twice
MOST_ROWS = 512
MOST_DEPTH = 4096
WORDS = 4  # of a row: position, two key words, whether it takes part


def fuses(x: StepInputs, plan: StepPlan, hidden: Any, weight: Any) -> bool:
    """Whether the fused head can do what the rule asks for."""
    kind = str(hidden.dtype)
    row = plan.row
    if kind not in ("float32", "bfloat16") or row.score_banned or row.holds:
        return False
    return not row.filters and x.token_gumbel is None and not row.greedy_on_probs


def decode_step(
    x: StepInputs, plan: StepPlan, hidden: Any, weight: Any, bias: Any, backend: str
) -> tuple[tuple[Any, Any, Any], Any]:
    """What chunked.py's function of that name does; nothing waits for the device."""
    x = complete(x, plan)
    wanted = x.eligible
    if chunked.chooses_first(plan):
        wanted = wanted & (x.tokens == x.mask_token_id) & chunked.chosen(x, plan, hidden, backend)
    weight, bias = chunked.codebook(plan, weight, bias)
    drawn, score, _ = _sample(
        x._replace(mask_token_id=0), hidden, weight, bias, wanted, dispatch.arguments_of(plan, "pallas"),
        plan.row, plan.commit, int(x.mask_token_id),
    )  # fmt: skip
    scores = x.scores if plan.row.score == "given" else score
    out = dispatch.call(
        "decode_step", x._replace(drawn=drawn, scores=scores), plan, hidden, backend
    )
    return out, wanted & (drawn < 0)


@functools.partial(jax.jit, static_argnames=("row", "commit", "mask_token_id"))
def _sample(
    x: StepInputs, hidden: Any, weight: Any, bias: Any, wanted: Any, numbers: Arguments, row: RowPlan,
    commit: CommitPlan, mask_token_id: int,
) -> tuple[Any, Any, Any]:  # fmt: skip
    x = x._replace(mask_token_id=mask_token_id)
    plan = StepPlan(row, commit, numbers.unpacked(jnp.float32))
    return sample_rows(x, hidden, weight, bias, wanted, plan)


def head_spec(x: StepInputs, plan: StepPlan, hidden: Any, weight: Any, has_bias: bool) -> HeadSpec:
    """What the head's kernel is compiled for."""
    dtype, vocab = str(hidden.dtype), weight.shape[0]
    row = step_kernels.rule_spec(plan.row, False, False, dtype, True, int(x.mask_token_id))
    width, size = hidden.shape[-1], jnp.dtype(dtype).itemsize
    rows = min(MOST_ROWS, -(-hidden.shape[0] * hidden.shape[1] // LANES) * LANES)
    depth = width
    if width > MOST_DEPTH and width % LANES == 0:
        depth = next(d for d in range(MOST_DEPTH, 0, -LANES) if width % d == 0)
    tile = 1024
    while tile > 2 * LEAF and tile * depth * size > TILE_BYTES:
        tile //= 2
    tile = min(tile, -(-vocab // (2 * LEAF)) * 2 * LEAF)
    banned = tuple(i for i in row.banned if i < vocab)
    row = dataclasses.replace(row, vocab=vocab, rows=rows, banned=banned, shared=False)
    return HeadSpec(rows, tile, depth, has_bias, row)


def sample_rows(
    x: StepInputs, hidden: Any, weight: Any, bias: Any, wanted: Any, plan: StepPlan
) -> tuple[Any, Any, Any]:
    """(candidates or -1, scores, log Z), (B, N), of the wanted rows of hidden (B, N, D)."""
    batch, length, width = hidden.shape
    count = batch * length
    if count == 0:
        nothing = jnp.full((batch, length), -jnp.inf)
        return jnp.full((batch, length), -1, jnp.int32), nothing, nothing
    spec = head_spec(x, plan, hidden, weight, bias is not None)
    live = wanted.reshape(count)
    order = jnp.argsort(~live, stable=True)  # those that take part first
    blocks = -(-count // spec.rows)
    padded = jnp.pad(order, (0, blocks * spec.rows - count))
    key = [jnp.zeros(count, jnp.int32)] * 2
    if x.seeds is not None:
        words = step_kernels.as_int32(x.seeds)
        key = [jnp.repeat(words[:, i], length) for i in (0, 1)]
    fields = [step_kernels.as_int32(x.positions).reshape(count), *key, live.astype(jnp.int32)]
    words = jnp.stack(fields)[:, padded].reshape(WORDS, blocks, spec.rows).swapaxes(0, 1)
    rows = hidden.reshape(count, width)[padded]
    integers = jnp.stack([step_kernels.step_word(plan), live.sum(dtype=jnp.int32)])[None]
    _, scalars = step_kernels.numbers(x._replace(guidance_scale=0.0), plan)
    out = head_rows(rows, weight, bias, words, integers, scalars, spec)
    place = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
    drawn, score, log_z = (a.reshape(-1)[place].reshape(batch, length) for a in out)
    return (
        jnp.where(wanted, drawn, -1),
        jnp.where(wanted, score, -jnp.inf),
        jnp.where(wanted, log_z, -jnp.inf),
    )


def head_rows(
    rows: Any, weight: Any, bias: Any, words: Any, integers: Any, scalars: Any, spec: HeadSpec
) -> Any:
    """The head's kernel on rows (blocks x rows, D): three results (blocks, 1, rows)."""
    blocks, _, _ = words.shape
    vocab, width = weight.shape
    tiles, depths = -(-vocab // spec.tile), width // spec.depth

    def skipped(step: Any, block: Any, live: Any) -> Any:
        """The number of a block, or what was last loaded where there are no such rows."""
        return jnp.where(block * spec.rows < live[0, 1], step, 0)

    def of_rows(block: Any, tile: Any, depth: Any, live: Any) -> Any:
        return jnp.where(block * spec.rows < live[0, 1], block, 0), skipped(depth, block, live)

    def of_weight(block: Any, tile: Any, depth: Any, live: Any) -> Any:
        return skipped(tile, block, live), skipped(depth, block, live)

    def of_bias(block: Any, tile: Any, depth: Any, live: Any) -> Any:
        return 0, skipped(tile, block, live)

    lanes = pl.BlockSpec((1, WORDS, spec.rows), lambda block, *_: (block, 0, 0))
    result = pl.BlockSpec((1, 1, spec.rows), lambda block, *_: (block, 0, 0))
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    kinds = (jnp.int32, jnp.float32, jnp.float32)
    size, count = weight.dtype.itemsize, blocks * spec.rows
    in_specs = [
        scalar, lanes, pl.BlockSpec((spec.rows, spec.depth), of_rows),
        pl.BlockSpec((spec.tile, spec.depth), of_weight),
    ]  # fmt: skip
    arguments = [scalars, words, rows, weight]
    if bias is not None:
        in_specs.append(pl.BlockSpec((1, spec.tile), of_bias))
        arguments.append(bias[None])
    return pl.pallas_call(
        functools.partial(head_kernel, spec=spec, tiles=tiles, depths=depths),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, tiles, depths),
            in_specs=in_specs,
            out_specs=[result] * 3,
            scratch_shapes=[
                pltpu.VMEM((spec.tile, spec.rows), jnp.float32),
                pltpu.VMEM((STATS, spec.rows), jnp.float32),
                pltpu.VMEM((LEAF, spec.rows), jnp.float32),
                pltpu.VMEM((16, LANES), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((blocks, 1, spec.rows), kind) for kind in kinds],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=48 << 20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * vocab * width,
            transcendentals=count * vocab,
            bytes_accessed=blocks * vocab * width * size
            + count * width * size * (tiles if depths > 1 else 1)
            + 4 * count * (WORDS + 3),
        ),
        interpret=interpret_params(),
        name="maskgit_head",
    )(integers, *arguments)
