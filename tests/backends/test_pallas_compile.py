"""The TPU kernels, compiled by the real TPU compiler for chips that are not here, and what it says.

What always runs is a sample; `make test-all` compiles every kernel of every preset, at every named shape,
in float32 and bfloat16, for four chips.  Presets that lead to the same kernel are compiled once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from maskgit.benchmarks.compiler import tpu_compiler
from maskgit.benchmarks.shapes import SHAPES, parse_shape

from maskgit import StepRule

if tpu_compiler.why_missing() is not None:
    pytest.skip(str(tpu_compiler.why_missing()), allow_module_level=True)

tpu_compiler.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from maskgit.benchmarks.compiler import tpu_profile  # noqa: E402

TARGETS = ("tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu7x")
SAMPLE = [
    ("tpu-v5e", "maskgit", "maskgit-256", "bfloat16"),
    ("tpu-v5e", "titok", "titok-l-32", "float32"),
    ("tpu-v5e", "dream-entropy", "dream-block", "bfloat16"),
    ("tpu-v5e", "sdar", "sdar-block", "float32"),
    ("tpu-v5p", "maskgit", "soundstorm", "float32"),
    ("tpu-v5p", "muse-critic", "muse-256", "bfloat16"),
    ("tpu-v6e", "llada", "llada-block", "bfloat16"),
    ("tpu-v6e", "dinfer-hierarchy", "llada2-block", "bfloat16"),
    ("tpu7x", "mdlm", "mdlm", "bfloat16"),
    ("tpu7x", "maskgit", "magvit-v2", "bfloat16"),
]


@pytest.mark.parametrize(("target", "rule", "shape", "dtype"), SAMPLE)
def test_the_compiler_accepts_it(target: str, rule: str, shape: str, dtype: str) -> None:
    size, step_rule = SHAPES[shape], StepRule.preset(rule)
    step = tpu_profile.fused_step(step_rule, size, dtype)
    program = tpu_compiler.compiled(step, tpu_profile.step_arrays(size, dtype), target)
    assert tpu_compiler.memory(program)["temporary_bytes"] < 1 << 20
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    for word in ("callback", "outfeed", "sort("):
        assert word not in text


@pytest.mark.parametrize("shape", ["1x4x151936", "2x8x32000"])
@pytest.mark.parametrize("target", TARGETS)
def test_packed_rows_lie_in_memory_already(target: str, shape: str) -> None:
    """The view by leaves of 4 or 8 rows costs no copy of the logits."""
    rule, size = StepRule.preset("maskgit"), parse_shape(shape)
    step = tpu_profile.fused_step(rule, size, "bfloat16")
    arrays = tpu_profile.step_arrays(size, "bfloat16")
    text = tpu_compiler.compiled(step, arrays, target).as_text()
    view = f"bf16[{size.batch},{size.vocab // 128},{size.length},128]"
    lines = [line.split(" = ")[1] for line in text.splitlines() if " = " + view in line]
    assert len(lines) == 1
    assert " bitcast(" in lines[0]


@pytest.mark.parametrize(("target", "shape", "dtype"), [
    ("tpu-v5e", "1x1x1024", "bfloat16"), ("tpu-v6e", "8x2x126464", "float32"),
    ("tpu7x", "3x3x1000", "float32"), ("tpu-v5p", "16x5x32000", "bfloat16"),
    ("tpu-v5e", "64x7x126464", "float32"), ("tpu-v5e", "9x1x64", "float32"),
    ("tpu7x", "8x32768x128", "float32"),
])  # fmt: skip
def test_few_and_many_positions(target: str, shape: str, dtype: str) -> None:
    """Sequences shorter than a register is high, and the longest; rows of many columns uncopied."""
    rule, size = StepRule.preset("maskgit"), parse_shape(shape)
    step = tpu_profile.fused_step(rule, size, dtype)
    program = tpu_compiler.compiled(step, tpu_profile.step_arrays(size, dtype), target)
    assert tpu_compiler.memory(program)["temporary_bytes"] < 1 << 20
    if size.vocab >= 1 << 13:
        assert program.cost_analysis()["bytes accessed"] < 1.05 * size.num_bytes(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_of_every_preset(target: str, shape: str, dtype: str) -> None:
    size, seen = SHAPES[shape], set()
    for name in StepRule.presets():
        rule = StepRule.preset(name)
        for key, kernel, arrays in tpu_profile.kernels(rule, size, dtype):
            if key not in seen:
                seen.add(key)
                tpu_compiler.compiled(kernel, arrays, target)
    assert len(seen) > 20


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("filters", [
    {"filters": ("top_k", "temperature", "top_p"), "top_k": 40, "top_p": 0.9},
    {"filters": ("typical_p", "min_p"), "typical_p": 0.9, "min_p": 0.01, "score_filtered": True},
])  # fmt: skip
def test_filters(target: str, filters: dict[str, Any]) -> None:
    rule, size = StepRule(**filters), parse_shape("2x64x5000")
    step = tpu_profile.fused_step(rule, size, "bfloat16")
    tpu_compiler.compiled(step, tpu_profile.step_arrays(size, "bfloat16"), target)


def test_cycles_of_the_schedule() -> None:
    """MaskGIT's step on a v5e: the figures of docs/tpu.md, from the compiler's final schedule."""
    command = [
        sys.executable,
        "-c",
        "from maskgit.__main__ import main; main()",
        "profile",
        "--target",
        "tpu-v5e",
        "--json",
        "--op",
        "decode-step",
    ]
    shapes = ["maskgit-256", "amused-256", "sdar-block"]
    for shape in shapes:
        command += ["--shape", shape]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["from"] == "from the compiler's schedule, not a run"
    fused = {f["shape"]: f for f in report["kernels"] if f["version"] == "fused"}
    plain = {f["shape"]: f for f in report["kernels"] if f["version"] == "plain jnp"}
    assert set(fused) == set(plain) == set(shapes)
    for facts in fused.values():
        assert facts["bytes_per_logit_byte"] <= 1.05
        assert facts["temporary_bytes"] < 1 << 20
    assert fused["maskgit-256"]["cycles"] <= 113_000  # a tenth of XLA's 1.13 M in float32
    for shape in ("amused-256", "sdar-block"):  # V of 8192 and above
        assert fused[shape]["compute_per_memory"] <= 1.5
        assert plain[shape]["cycles"] >= 9 * fused[shape]["cycles"]


def test_trip_counts_are_read_from_the_schedule() -> None:
    """A kernel with a known number of additions: the parser counts its loops as often as they run."""
    code = """
import sys
from maskgit.benchmarks.compiler import tpu_compiler as t
with t.schedules() as folder:
    import jax, jax.numpy as jnp
    from jax.experimental import pallas as pl
    def kernel(x, y):
        def body(i, c):
            return c * 1.5 + x[...]
        y[...] = jax.lax.fori_loop(0, int(sys.argv[1]), body, x[...])
    def f(x):
        spec = pl.BlockSpec((8, 128), lambda i: (i, 0))
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, grid=(6,), in_specs=[spec], out_specs=spec, out_shape=out, name="counted")(x)
    t.compiled(f, (jax.ShapeDtypeStruct((48, 128), jnp.float32),), "tpu-v5e")
    print(t.kernel_schedules(folder, "counted", 6, False)[0].cycles)
"""
    few, many = (
        int(subprocess.run([sys.executable, "-c", code, n], capture_output=True, text=True, check=True).stdout)
        for n in ("100", "300")
    )  # fmt: skip
    per_trip = (many - few) / (6 * 200)
    assert 1 <= per_trip <= 12


def test_a_whole_generation_is_one_program() -> None:
    """MaskGIT in JAX, 3 steps, for a v5e: attention, head and commit as kernels, nothing on the host."""
    import dataclasses

    from maskgit.models.transformer_jax import shapes
    from maskgit.pipelines import images_jax
    from maskgit.pipelines.recipes import preset

    config = preset("maskgit-official")
    config = dataclasses.replace(
        config, transformer=dataclasses.replace(config.transformer, num_layers=2)
    )
    of = jax.ShapeDtypeStruct
    params = {n: of(s, jnp.bfloat16) for n, s in shapes(config.transformer).items()}

    def run(params: Any, classes: Any, seeds: Any) -> Any:
        weights = images_jax.Weights(params, config)
        return images_jax.generate(weights, classes, seeds=seeds, num_steps=3, backend="pallas")

    arrays = (params, of((8,), jnp.int32), of((8, 2), jnp.uint32))
    text = tpu_compiler.compiled(run, arrays, "tpu-v5e").as_text()
    assert text.count("maskgit_attention") >= 6
    assert text.count("maskgit_head") >= 3
    assert text.count("maskgit_commit") >= 3
    for word in ("callback", "outfeed", "infeed", "send("):
        assert word not in text
    logits = f"[{8 * 256},{config.transformer.codebook_size}]"
    assert logits not in text
