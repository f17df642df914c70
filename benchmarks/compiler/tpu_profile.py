"""What the TPU compiler makes of the kernels, beside the same work in plain jax.numpy (tpu_compiler.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from maskgit.kernels.attention import pallas_tpu as attention
from maskgit.kernels.common.simulation import compiling
from maskgit.kernels.decode_step.inputs import StepInputs, complete
from maskgit.kernels.decode_step.pallas_tpu import launch as pallas_tpu
from maskgit.kernels.decode_step.plain import jax_ref
from maskgit.kernels.decode_step.rule.plan import resolve
from maskgit.kernels.head_sample.pallas_tpu import launch as head

from maskgit import StepRule

from ..shapes import ITEM_SIZES, Shape, parse_shape
from .tpu_compiler import (
    BYTES_PER_CYCLE,
    MATRIX_UNITS,
    compiled,
    kernel_schedules,
    memory,
    xla_cycles,
)  # fmt: skip

STEP, NUM_STEPS = 3, 8  # the step that is compiled


def step_arrays(shape: Shape, dtype: str) -> tuple[Any, ...]:
    """Shapes of logits, tokens, seeds, scores and num_commit."""
    size = (shape.batch, shape.length)
    of = jax.ShapeDtypeStruct
    return (
        of((*size, shape.vocab), dtype), of(size, jnp.int32), of((shape.batch, 2), jnp.uint32),
        of(size, jnp.float32), of((shape.batch,), jnp.int32),
    )  # fmt: skip


def step_inputs(rule: StepRule, arrays: tuple[Any, ...], mask_token_id: int) -> StepInputs:
    """What a backend gets of one step, as `decode_step` was called."""
    logits, tokens, seeds, scores, num_commit = arrays
    needs_scores = rule.score == "given" or rule.remask == "conf"
    return StepInputs(
        logits, tokens, None, None, seeds if rule.needs_seeds else None, None, None, None, None, 0.0,
        mask_token_id, scores=scores if needs_scores else None,
        num_commit=num_commit if rule.count == "given" else None,
    )  # fmt: skip


def fused_step(rule: StepRule, shape: Shape, dtype: str) -> Callable[..., Any]:
    """One decode step by the kernels."""
    plan = resolve(rule, STEP, NUM_STEPS, (shape.batch, shape.length), dtype)

    def step(*arrays: Any) -> Any:
        return pallas_tpu.decode_step(step_inputs(rule, arrays, shape.vocab - 1), plan, dtype)

    return step


def kernels(rule: StepRule, shape: Shape, dtype: str) -> list[tuple[Any, Callable[..., Any], Any]]:
    """(what it is compiled for, function of arrays, their shapes) of both kernels of a step."""
    plan = resolve(rule, STEP, NUM_STEPS, (shape.batch, shape.length), dtype)
    arrays = step_arrays(shape, dtype)
    x, mask = step_inputs(rule, arrays, shape.vocab - 1), shape.vocab - 1

    def draw(*arrays: Any) -> Any:
        return pallas_tpu.draw(step_inputs(rule, arrays, mask), plan, dtype, has_log_z=False)

    def commit(*arrays: Any) -> Any:
        _, tokens, _, scores, _ = arrays
        drawn = step_inputs(rule, arrays, mask)._replace(logits=None, drawn=tokens, scores=scores)
        return pallas_tpu.decode_step(drawn, plan, dtype)

    rows = pallas_tpu.row_spec(x, plan, dtype, has_log_z=False)
    counts = pallas_tpu.commit_spec(x, plan, dtype)
    given = (x.seeds is None, x.scores is None, x.num_commit is None)
    return [(("rows", rows, given), draw, arrays), (("commit", counts, given), commit, arrays)]


def plain_step(rule: StepRule, shape: Shape, dtype: str) -> Callable[..., Any]:
    """The same step in jax.numpy; for MaskGIT's rule as the original writes it."""
    plan = resolve(rule, STEP, NUM_STEPS, (shape.batch, shape.length), dtype)
    mask = shape.vocab - 1

    def step(*arrays: Any) -> Any:
        x = complete(step_inputs(rule, arrays, mask), plan)
        return jax_ref.decode_step(x, plan, dtype)

    def original(logits: Any, tokens: Any, seeds: Any, *_: Any) -> Any:
        draw, choose = jax.random.split(jax.random.wrap_key_data(seeds[0]))
        unknown = tokens == mask
        drawn = jnp.where(unknown, jax.random.categorical(draw, logits), tokens)
        probs = jax.nn.softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(probs, drawn[..., None], -1)[..., 0]
        chosen = jnp.where(unknown, chosen, jnp.inf)
        noise = jax.random.gumbel(choose, chosen.shape)
        confidence = jnp.log(chosen) + plan.numbers.choice_temperature * noise
        left = jnp.maximum(
            1, jnp.minimum(unknown.sum(-1, keepdims=True) - 1, int(plan.numbers.table[-1]))
        )
        cut = jnp.take_along_axis(jnp.sort(confidence, axis=-1), left, axis=-1)
        return jnp.where(confidence < cut, mask, drawn), drawn, confidence

    return original if rule.name == "maskgit" else step


def estimated_bytes(function: Callable[..., Any], arrays: Any) -> int:
    """What the kernels of a function say that they read and write."""
    with compiling():
        traced = jax.make_jaxpr(function)(*arrays)
    calls = [e for e in traced.eqns if e.primitive.name == "pallas_call"]
    return sum(call.params["cost_estimate"].bytes_accessed for call in calls)


def fused_facts(
    rule: StepRule, shape: Shape, dtype: str, target: str, folder: Path
) -> dict[str, Any]:
    """Bytes, temporaries and cycles of the fused step for one device of the target."""
    arrays = step_arrays(shape, dtype)
    clear(folder)
    program = compiled(fused_step(rule, shape, dtype), arrays, target)
    x = step_inputs(rule, arrays, shape.vocab - 1)
    plan = resolve(rule, STEP, NUM_STEPS, (shape.batch, shape.length), dtype)
    spec = pallas_tpu.row_spec(x, plan, dtype, has_log_z=False)
    commit = pallas_tpu.commit_spec(x, plan, dtype)
    logits, width = shape.num_bytes(dtype), spec.rows * spec.width * ITEM_SIZES[dtype]
    facts: dict[str, Any] = {"version": "fused"} | memory(program)
    moved = estimated_bytes(fused_step(rule, shape, dtype), arrays)
    facts |= {"block_bytes": 2 * width, "bytes_per_logit_byte": round(moved / logits, 4)}
    grid = pallas_tpu.grid_of(shape.batch, shape.length, spec)
    rows = kernel_schedules(folder, "maskgit_rows", grid, walks_again=spec.quick)
    commits = kernel_schedules(folder, "maskgit_commit", -(-shape.batch // commit.rows), False)
    facts["xla_cycles"] = xla_cycles(program)
    facts["cycles"] = added(rows[0].cycles + commits[0].cycles, facts["xla_cycles"])
    facts |= {
        "rows_cycles": rows[0].cycles, "cycles_per_step": rows[0].cycles_per_step,
        "bundles": rows[0].bundles, "commit_cycles": commits[0].cycles, "busiest": rows[0].busiest,
        "busy": rows[0].busy,
    }  # fmt: skip
    if target in BYTES_PER_CYCLE:
        facts["memory_cycles"] = round(logits / BYTES_PER_CYCLE[target])
        facts["compute_per_memory"] = round(rows[0].cycles / facts["memory_cycles"], 3)
    return facts


def plain_facts(rule: StepRule, shape: Shape, dtype: str, target: str) -> dict[str, Any]:
    """The same of the step in jax.numpy, by XLA's own estimate."""
    program = compiled(plain_step(rule, shape, dtype), step_arrays(shape, dtype), target)
    moved = program.cost_analysis()["bytes accessed"] / shape.num_bytes(dtype)
    facts: dict[str, Any] = {"version": "plain jnp"} | memory(program)
    return facts | {"bytes_per_logit_byte": round(moved, 2), "cycles": xla_cycles(program)}


def step_facts(
    rule: StepRule, shape: Shape, dtype: str, target: str, folder: Path
) -> list[dict[str, Any]]:
    """Both; the plain step in a process of its own, where no schedules are written: gigabytes of them."""
    labels = {"op": "decode-step", "rule": rule.name, "shape": shape.name, "dtype": dtype}
    labels["target"] = target
    fused = labels | fused_facts(rule, shape, dtype, target, folder)
    sizes = f"{shape.batch}x{shape.length}x{shape.vocab}"
    environment = {k: v for k, v in os.environ.items() if k != "LIBTPU_INIT_ARGS"}
    command = [
        sys.executable,
        "-m",
        "maskgit.benchmarks.compiler.tpu_profile",
        rule.name,
        sizes,
        dtype,
        target,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        what = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"shape: the plain step at {shape} does not compile for {target}: {what}")
    plain = labels | json.loads(done.stdout)
    if plain["cycles"] is not None and fused["cycles"] is not None:
        fused["fewer_cycles_than_plain"] = round(plain["cycles"] / fused["cycles"], 2)
    return [fused, plain]


def head_arrays(rows: int, width: int, vocab: int, dtype: str) -> tuple[Any, ...]:
    """Shapes of hidden (1, rows, D), W, bias, tokens and seeds."""
    of = jax.ShapeDtypeStruct
    return (
        of((1, rows, width), dtype), of((vocab, width), dtype), of((vocab,), dtype),
        of((1, rows), jnp.int32), of((1, 2), jnp.uint32),
    )  # fmt: skip


def fused_head(rule: StepRule, rows: int, vocab: int, dtype: str) -> Callable[..., Any]:
    """Candidates, scores and log Z from hidden rows by the fused head."""
    plan = resolve(rule, STEP, NUM_STEPS, (1, rows), dtype)

    def draw(hidden: Any, weight: Any, bias: Any, tokens: Any, seeds: Any) -> Any:
        x = StepInputs(
            None, tokens, None, None, seeds, None, None, None, None, 0.0, vocab - 1
        )  # fmt: skip
        x = complete(x, plan)
        return head.sample_rows(x, hidden, weight, bias, x.eligible, plan)

    return draw


def head_facts(
    rule: StepRule, rows: int, width: int, vocab: int, dtype: str, target: str, folder: Path
) -> list[dict[str, Any]]:
    """Of the fused head: cycles, temporaries, and the product's own cycles."""
    arrays = head_arrays(rows, width, vocab, dtype)
    clear(folder)
    program = compiled(fused_head(rule, rows, vocab, dtype), arrays, target)
    x = StepInputs(None, arrays[3], None, None, arrays[4], None, None, None, None, 0.0, vocab - 1)
    plan = resolve(rule, STEP, NUM_STEPS, (1, rows), dtype)
    spec = head.head_spec(x, plan, arrays[0], arrays[1], True)
    steps = -(-rows // spec.rows) * -(-vocab // spec.tile) * (width // spec.depth)
    labels = {"op": "head", "rule": rule.name, "shape": f"{rows}x{width}x{vocab}", "dtype": dtype}
    labels["target"] = target
    schedule = kernel_schedules(folder, "maskgit_head", steps, walks_again=False)[0]
    facts: dict[str, Any] = labels | {"version": "fused"} | memory(program)
    facts |= {
        "cycles": added(schedule.cycles, xla_cycles(program)), "cycles_per_step": schedule.cycles_per_step,
        "busiest": schedule.busiest, "busy": schedule.busy, "bundles": schedule.bundles,
    }  # fmt: skip
    if target in BYTES_PER_CYCLE:
        moved = vocab * width * ITEM_SIZES[dtype] * -(-rows // spec.rows)
        facts["memory_cycles"] = round(moved / BYTES_PER_CYCLE[target])
        facts["compute_per_memory"] = round(schedule.cycles / facts["memory_cycles"], 3)
        if dtype == "bfloat16":  # units of 128 x 128, a row each a cycle
            facts["product_cycles"] = round(
                rows * width * vocab / (MATRIX_UNITS[target] * 128 * 128)
            )
    return [facts]


def attention_facts(
    length: int, size: int, dtype: str, target: str, folder: Path
) -> list[dict[str, Any]]:
    """Of attention in 64 sequences of 768 units: cycles, and the share of the matrix units' peak."""
    batch, heads = 64, max(1, 768 // size)
    of = jax.ShapeDtypeStruct
    flat, whole = of((batch, length, heads * size), dtype), of((batch, length, heads, size), dtype)

    def call(*arrays: Any) -> Any:
        q, k, v = (a.reshape(whole.shape) for a in arrays)
        return attention.attention(q, k, v, None, size**-0.5).reshape(flat.shape)

    clear(folder)
    program = compiled(call, (flat,) * 3, target)
    spec = attention.attention_spec(whole, whole, False)
    steps = batch * heads // spec.heads * -(-length // spec.rows)
    schedule = kernel_schedules(folder, "maskgit_attention", steps, walks_again=False)[0]
    moved = 4 * batch * length * heads * size * ITEM_SIZES[dtype]
    facts: dict[str, Any] = {"op": "attention", "rule": "-", "dtype": dtype, "target": target}
    facts |= {"shape": f"{batch}x{length}x{heads}x{size}", "version": "fused"} | memory(program)
    facts |= {
        "cycles": schedule.cycles, "cycles_per_step": schedule.cycles_per_step,
        "bundles": schedule.bundles, "busiest": schedule.busiest, "busy": schedule.busy,
    }  # fmt: skip
    if target in BYTES_PER_CYCLE:
        facts["memory_cycles"] = round(moved / BYTES_PER_CYCLE[target])
        facts["compute_per_memory"] = round(schedule.cycles / facts["memory_cycles"], 3)
        product = 2 * batch * heads * length**2 * size / (MATRIX_UNITS[target] * 128 * 128)
        facts["peak_share"] = round(product / schedule.cycles, 3)
    return [facts]


def added(kernels: int, others: int | None) -> int | None:
    """Cycles in all, None where part of them is not known."""
    return None if others is None else kernels + others


def clear(folder: Path) -> None:
    """Forget what the compiler has written so far."""
    for old in folder.iterdir():
        old.unlink()


def calls(
    ops: list[str], rules: list[StepRule], shapes: list[Shape], dtypes: list[str], width: int,
    head_sizes: list[int],
) -> list[Callable[[str, Path], list[dict[str, Any]]]]:  # fmt: skip
    """What `maskgit profile` reports: functions of (target, folder of schedules)."""
    made: list[Callable[[str, Path], list[dict[str, Any]]]] = []
    for dtype in dtypes:
        for size in head_sizes if "attention" in ops else []:
            made.append(partial(attention_facts, 257, size, dtype))
        for shape in shapes:
            for rule in rules:
                if "decode-step" in ops:
                    made.append(partial(step_facts, rule, shape, dtype))
                if "head" in ops and head_fuses(rule):
                    sizes = (rule, shape.rows, width, shape.vocab, dtype)
                    made.append(partial(head_facts, *sizes))
    return made


def head_fuses(rule: StepRule) -> bool:
    """Whether the fused head serves a rule."""
    of = jax.ShapeDtypeStruct
    x = step_inputs(rule, step_arrays(parse_shape("1x1x128"), "bfloat16"), 127)
    plan = resolve(rule, STEP, NUM_STEPS, (1, 1), "bfloat16")
    return head.fuses(x, plan, of((1, 1, 128), "bfloat16"), None)


if __name__ == "__main__":
    name, size, kind, chip = sys.argv[1:]
    print(json.dumps(plain_facts(StepRule.preset(name), parse_shape(size), kind, chip)))
