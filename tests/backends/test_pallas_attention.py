"""Attention on TPUs: in the simulator against float64, and through the TPU compiler."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("torch")  # whose error is the measure

import jax.numpy as jnp  # noqa: E402
from maskgit.benchmarks.compiler import tpu_compiler  # noqa: E402
from maskgit.kernels.attention import pallas_tpu  # noqa: E402
from test_attention import SIZES, check, problem, run  # noqa: E402

import maskgit  # noqa: E402


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    monkeypatch.setenv("MASKGIT_PALLAS_INTERPRET", "1")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_every_head_dimension(size, dtype):
    check(problem(size=size, queries=70, batch=1, heads=8), "pallas", dtype)


@pytest.mark.parametrize("shape", [(1, 1), (65, 64), (3, 130), (300, 257)])
def test_lengths_around_the_blocks(shape):
    check(problem(queries=shape[0], keys=shape[1]), "pallas")


def test_grouped_heads_and_odd_dimensions():
    check(problem(heads=6, groups=2), "pallas")
    check(problem(size=33, heads=3), "pallas", scale=0.3)


def test_padding():
    padding = np.zeros((4, 150), bool)
    padding[0, :100] = padding[1, 70:] = padding[3] = True
    arrays = problem(batch=4, queries=20, keys=150)
    arrays[1][padding] = arrays[2][padding] = np.nan
    check(arrays, "pallas", padding=padding)
    assert (run(arrays, "pallas", padding=padding)[1][3] == 0).all()


def test_large_scores_and_nothing():
    q, k, v = problem()
    check([q * 300, k * 300, v], "pallas")
    assert (run(problem(keys=0), "pallas")[1] == 0).all()
    padding = np.zeros((2, 33), bool)
    padding[0, 20:] = True
    for scale in (-3.0, 0.0):
        check([q, k, v], "pallas", scale=scale, padding=padding)


def test_what_does_not_fit_is_refused():
    q = jnp.zeros((1, 8, 64, 128), jnp.float32)
    k = jnp.zeros((1, 20_000, 1, 128), jnp.float32)
    assert not pallas_tpu.suits(q, jnp.zeros((1, 70_000, 64, 128), jnp.float32))
    assert not pallas_tpu.suits(q.astype(jnp.float16), k)
    with pytest.raises(ValueError, match="fit in VMEM"):
        pallas_tpu.attention_spec(q, jax.ShapeDtypeStruct((1, 70_000, 64, 128), q.dtype), False)
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        pallas_tpu.attention_spec(q.astype(jnp.float16), k, False)
    with pytest.raises(ValueError, match="it works on jax arrays"):
        maskgit.attention(*(np.zeros((1, 2, 1, 8), np.float32),) * 3, backend="pallas")


COMPILED = [
    ("tpu-v5e", 257, 16, 48), ("tpu-v5p", 1025, 16, 64), ("tpu-v6e", 257, 8, 96),
    ("tpu7x", 257, 8, 128), pytest.param("tpu-v6e", 1536, 4, 96, marks=pytest.mark.slow),
    pytest.param("tpu-v5e", 300, 16, 72, marks=pytest.mark.slow),
]  # fmt: skip
ALL = [
    pytest.param(target, length, 16, size, marks=pytest.mark.slow)
    for target in ("tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu7x")
    for length in (257, 1025, 1536)
    for size in SIZES
]


@pytest.mark.skipif(tpu_compiler.why_missing() is not None, reason=str(tpu_compiler.why_missing()))
@pytest.mark.parametrize(("target", "length", "heads", "size"), [*COMPILED, *ALL])
def test_the_compiler_accepts_it(target, length, heads, size):
    for dtype in ("bfloat16", "float32"):
        of = jax.ShapeDtypeStruct
        shape, mask = of((2, length, heads * size), dtype), of((2, length), bool)

        def call(q, k, v, padding=None):
            q, k, v = (a.reshape(2, length, heads, size) for a in (q, k, v))
            return pallas_tpu.attention(q, k, v, padding, 0.1).reshape(2, length, -1)

        for arrays in ((shape,) * 3, (shape, shape, shape, mask)):
            program = tpu_compiler.compiled(call, arrays, target)
            assert tpu_compiler.memory(program)["temporary_bytes"] < 1 << 20
            assert 'custom_call_target="tpu_custom_call"' in program.as_text()
