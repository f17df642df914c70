"""Decode steps on a mesh of chips: the tokens of one device, and what the chips tell each other.

The mesh is 8 devices that XLA makes of the host; the programs for real slices come from the TPU compiler.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from helpers import make_case, native_seeds, to_dtype  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from maskgit.benchmarks.compiler import tpu_compiler  # noqa: E402
from test_contract import spoil  # noqa: E402

import maskgit  # noqa: E402
from maskgit import StepNoise, StepRule  # noqa: E402

PRESETS = (
    "maskgit", "llada", "dream-maskgit-plus", "dream-margin", "dream-entropy", "titok", "muse", "random",
    "vampnet", "threshold", "dream-origin",
)  # fmt: skip
ITEM = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "f16": 2, "s64": 8}


@pytest.fixture(scope="module", params=["1x8", "2x4", "8x1"])
def mesh(request: pytest.FixtureRequest) -> Mesh:
    data, model = map(int, request.param.split("x"))
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return Mesh(np.array(jax.devices()[:8]).reshape(data, model), ("data", "model"))


def step_of(case: Any, mesh: Mesh | None) -> tuple[np.ndarray, ...]:
    """A jax decode step, on the mesh if there is one."""

    def put(array: Any, spec: P) -> Any:
        if array is None or mesh is None:
            return None if array is None else jnp.asarray(array)
        return jax.device_put(jnp.asarray(array), NamedSharding(mesh, spec))

    rows, columns = P("data"), P("data", None, "model")
    logits = put(
        case.logits.astype(case.dtype if case.dtype != "bfloat16" else jnp.bfloat16), columns
    )
    uncond = None
    if case.uncond_logits is not None:
        uncond = put(case.uncond_logits.astype(logits.dtype), columns)
    noise = None
    if case.token_gumbel is not None or case.choice_gumbel is not None:
        noise = StepNoise(put(case.token_gumbel, columns), put(case.choice_gumbel, rows))
    seeds = None if case.seeds is None else put(native_seeds(case.seeds, "jax"), rows)
    out = maskgit.decode_step(
        logits, put(case.tokens.astype(np.int32), rows), rule=case.rule,
        mask_token_id=case.mask_token_id, step=case.step, num_steps=case.num_steps, seeds=seeds,
        num_masked_at_start=put(case.num_masked_at_start, P("data")), noise=noise,
        uncond_logits=uncond, guidance_scale=case.guidance_scale, backend="jax",
    )  # fmt: skip
    return tuple(np.asarray(a) for a in out)


def agree(case: Any, mesh: Mesh) -> None:
    alone = step_of(case, None)
    with maskgit.sharded(mesh):
        together = step_of(case, mesh)
    np.testing.assert_array_equal(together[0], alone[0])
    np.testing.assert_array_equal(together[1], alone[1])
    np.testing.assert_allclose(together[2], alone[2], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("preset", [
    p if p in ("maskgit", "llada", "dream-margin") else pytest.param(p, marks=pytest.mark.slow)
    for p in PRESETS
])  # fmt: skip
def test_the_tokens_are_those_of_one_device(mesh: Mesh, preset: str) -> None:
    rule = StepRule.preset(preset)
    for step, dtype, noise in (
        (1, "float32", "seeds"),
        (3, "bfloat16", "seeds"),
        (3, "float32", "injected"),
    ):
        guidance = 2.5 if step == 3 else None
        agree(
            make_case(rule, batch=8, length=6, vocab=2048, step=step, dtype=dtype, noise=noise,
                      guidance=guidance, seed=step), mesh,
        )  # fmt: skip


def test_many_rows_are_the_same_bit_for_bit(mesh: Mesh) -> None:
    case = make_case(
        StepRule.preset("maskgit"), batch=8, length=256, vocab=1024, masked=1.0, step=2
    )
    agree(case, mesh)


def test_odd_entries(mesh: Mesh) -> None:
    case = make_case(StepRule.preset("maskgit"), batch=8, length=20, vocab=1024)
    agree(spoil(case, 3), mesh)


def test_padded_columns_are_never_drawn(mesh: Mesh) -> None:
    """A vocabulary that does not divide, padded, with its real columns named by the rule."""
    rule = dataclasses.replace(StepRule.preset("maskgit"), vocab_slice=(0, 1000))
    case = make_case(rule, batch=8, length=10, vocab=1024, masked=1.0)
    case.logits[..., 1000:] = 50.0
    agree(case, mesh)
    with maskgit.sharded(mesh):
        _, candidates, _ = step_of(case, mesh)
    assert candidates.max() < 1000


def test_generation_is_sharded_as_its_steps_are(mesh: Mesh) -> None:
    rng = np.random.default_rng(0)
    table = jnp.asarray(to_dtype(rng.normal(size=(1025, 1024)) * 3, "float32"))
    tokens = jnp.full((8, 12), 1024, jnp.int32)
    seeds = jnp.asarray(native_seeds(np.arange(8), "jax"))

    def run(table: Any, tokens: Any, seeds: Any) -> Any:
        def forward(x: Any) -> Any:
            return table[x] + 0.3 * table[jnp.roll(x, 1, 1)]

        return maskgit.generate(
            forward,
            tokens,
            rule="maskgit",
            mask_token_id=1024,
            num_steps=4,
            seeds=seeds,
            backend="jax",
        ).tokens

    alone = np.asarray(jax.jit(run)(table, tokens, seeds))
    with maskgit.sharded(mesh):
        args = (
            jax.device_put(table, NamedSharding(mesh, P(None, "model"))),
            jax.device_put(tokens, NamedSharding(mesh, P("data"))),
            jax.device_put(seeds, NamedSharding(mesh, P("data"))),
        )
        np.testing.assert_array_equal(np.asarray(jax.jit(run)(*args)), alone)


def collectives(text: str) -> list[tuple[str, int]]:
    """(operation, bytes of its results on a chip) of a compiled program."""
    found = []
    for line in text.splitlines():
        match = re.search(
            r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
            r"(?:-start)?\(", line,
        )  # fmt: skip
        if match:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(
                ITEM.get(kind, 4) * int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
                for kind, dims in shapes
            )
            found.append((match[2], size))
    return found


def compiled_step(devices: np.ndarray, batch: int, length: int, vocab: int, preset: str) -> Any:
    mesh = Mesh(devices, ("data", "model"))
    rule = StepRule.preset(preset)

    def step(logits: Any, tokens: Any, seeds: Any) -> Any:
        return maskgit.decode_step(
            logits, tokens, rule=rule, mask_token_id=vocab - 1, step=3, num_steps=8, seeds=seeds,
            num_masked_at_start=tokens.shape[1], backend="jax",
        )  # fmt: skip

    def of(shape: tuple[int, ...], kind: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))

    with maskgit.sharded(mesh):
        return jax.jit(step).lower(
            of((batch, length, vocab), jnp.bfloat16, P("data", None, "model")),
            of((batch, length), jnp.int32, P("data")), of((batch, 2), jnp.uint32, P("data")),
        ).compile()  # fmt: skip


def check_traffic(program: Any, rows: int) -> None:
    """Only reductions of a number a row, at most 64 bytes a row sent by each chip."""
    found = collectives(program.as_text())
    assert found
    assert {name for name, _ in found} == {"all-reduce"}
    assert all(size <= 4 * rows * 8 for _, size in found)
    sent = 2 * sum(size for _, size in found)  # a ring sends each result at most twice
    assert sent <= 64 * rows


@pytest.mark.parametrize("preset", ["maskgit", "llada", "dream-entropy", "dream-margin"])
def test_chips_exchange_a_few_numbers_a_row(preset: str) -> None:
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    program = compiled_step(np.array(jax.devices()[:8]).reshape(1, 8), 4, 32, 4096, preset)
    check_traffic(program, 4 * 32)


@pytest.mark.parametrize(("slice_", "shape"), [("v5e:4x4", (2, 8)), ("v5p:4x4x4", (8, 8))])
def test_the_tpu_compiler_makes_the_same_exchanges(slice_: str, shape: tuple[int, int]) -> None:
    if tpu_compiler.why_missing() is not None:
        pytest.skip(str(tpu_compiler.why_missing()))
    devices = np.array(tpu_compiler.topology(slice_).devices)[: shape[0] * shape[1]].reshape(shape)
    program = compiled_step(devices, 4 * shape[0], 32, 126_976, "maskgit")
    check_traffic(program, 4 * 32)


def test_what_cannot_be_sharded_is_named(mesh: Mesh) -> None:
    with (
        pytest.raises(ValueError, match="expected an axis 'rows'"),
        maskgit.sharded(mesh, batch="rows"),
    ):
        pass
    case = make_case(StepRule.preset("maskgit"), batch=8, length=4, vocab=1000)
    wrong = [(case, "a vocabulary that is a multiple of")] if mesh.shape["model"] > 1 else []
    filtered = StepRule(filters=("top_k",), top_k=3)
    if mesh.shape["model"] > 1:
        wrong.append((make_case(filtered, batch=8, length=4, vocab=1024), "no filters"))
    if mesh.shape["data"] > 1:
        odd = make_case(StepRule.preset("maskgit"), batch=3, length=4, vocab=1024)
        wrong.append((odd, "a multiple of the"))
    for bad, words in wrong:
        with maskgit.sharded(mesh), pytest.raises(ValueError, match=words):
            maskgit.decode_step(
                jnp.asarray(bad.logits), jnp.asarray(bad.tokens), rule=bad.rule, mask_token_id=-1,
                step=0, num_steps=4, seeds=native_seeds(bad.seeds, "jax"),
            )  # fmt: skip
    with maskgit.sharded(mesh), pytest.raises(ValueError, match="'jax' or 'auto' on a mesh"):
        maskgit.decode_step(
            jnp.asarray(case.logits), jnp.asarray(case.tokens), rule=case.rule, mask_token_id=-1,
            step=0, num_steps=4, seeds=native_seeds(case.seeds, "jax"), backend="reference",
        )  # fmt: skip
    made = jax.make_mesh((2, 4), ("data", "model"))
    if made.axis_types[0].name != "Auto":
        with pytest.raises(ValueError, match="axes of type Auto"), maskgit.sharded(made):
            pass
    with pytest.raises(ValueError, match="expected two axes"), maskgit.sharded(mesh, batch="model"):
        pass
    with pytest.raises(TypeError, match=r"expected a jax\.sharding\.Mesh"), maskgit.sharded(None):
        pass


@pytest.mark.parametrize("changes", [
    {"vocab_slice": (5, 1000)}, {"vocab_slice": (128, 1000)},
    {"vocab_slice": (0, 500), "revise": "held", "score": "margin"},
    {"vocab_slice": (0, 100), "filters": ("top_k",), "top_k": 7},
])  # fmt: skip
def test_any_slice_where_the_vocabulary_is_whole(mesh: Mesh, changes: Any) -> None:
    """Sequences alone are dealt out: rules that need whole rows, and slices from any column."""
    rule = dataclasses.replace(StepRule.preset("maskgit"), **changes)
    for noise, guidance in (("seeds", None), ("injected", 2.0)):
        case = make_case(
            rule, batch=8, length=6, vocab=1001, masked=0.8, noise=noise, guidance=guidance
        )
        alone = step_of(case, None)
        for axes in ({"vocab": None}, {"batch": "model", "vocab": None}):
            with maskgit.sharded(mesh, **axes):
                together = step_of(case, None)
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
            np.testing.assert_array_equal(together[1], alone[1])


def test_other_arrays_are_left_alone(mesh: Mesh) -> None:
    case = make_case(StepRule.preset("maskgit"), batch=2, length=4, vocab=50)
    options = {"rule": "maskgit", "mask_token_id": case.mask_token_id, "step": 0, "num_steps": 4}
    alone = maskgit.decode_step(case.logits, case.tokens, seeds=case.seeds, **options)
    with maskgit.sharded(mesh):
        inside = maskgit.decode_step(case.logits, case.tokens, seeds=case.seeds, **options)
    np.testing.assert_array_equal(alone.next_tokens, inside.next_tokens)
