"""The decode step under pytest-benchmark, for its statistics, storage and comparisons:

    pytest benchmarks/bench_decode_step.py --benchmark-enable --benchmark-autosave

One group per (mode, shape, dtype), one id per provider.  A provider whose result is wrong fails.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pytest_benchmark")

from maskgit.benchmarks import decode_step, gate  # noqa: E402
from maskgit.benchmarks.providers import MODES, make_inputs, providers  # noqa: E402
from maskgit.benchmarks.shapes import parse_shape  # noqa: E402

CASES = [
    pytest.param(mode, shape, dtype, provider, id=f"{mode}-{shape}-{dtype}-{provider.name}")
    for mode, shape, dtype in itertools.product(
        MODES, ("maskgit-256-one", "maskgit-512", "llada-block-one"), ("float32", "bfloat16")
    )
    for provider in providers(mode, decode_step.default_backends())
]


@lru_cache(maxsize=1)
def _inputs(name: str, dtype: str) -> Any:
    shape = parse_shape(name)
    return make_inputs(shape, dtype, decode_step._num_copies(shape.num_bytes(dtype)))


@pytest.mark.parametrize(("mode", "name", "dtype", "provider"), CASES)
def test_decode_step(benchmark: Any, mode: str, name: str, dtype: str, provider: Any) -> None:
    shape, inputs = parse_shape(name), _inputs(name, dtype)
    verdict = gate.check(provider, mode, inputs[0])
    assert verdict.passed, verdict.detail
    calls = itertools.cycle([provider.prepare(x) for x in inputs])
    benchmark.group = f"{mode} {shape} {dtype}"
    size = shape.num_bytes(dtype)
    benchmark.extra_info.update(dtype=dtype, logits_bytes=size, input_copies=len(inputs))
    benchmark.extra_info.update(near_ties=verdict.near_ties, **_versions())
    benchmark.pedantic(lambda call: call(), setup=lambda: ((next(calls),), {}), rounds=20)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["gb_per_s"] = size / benchmark.stats.stats.median / 1e9


@lru_cache(maxsize=1)
def _versions() -> dict[str, Any]:
    stamp = decode_step.environment()
    return {"cpu": stamp["cpu"], "threads": stamp["torch_threads"], "packages": stamp["packages"]}
