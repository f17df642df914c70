"""A call imports and starts what its arrays and its backend need: no other framework, no device.

In fresh processes, one for each kind of arrays, all public functions in each.
"""

import subprocess
import sys
import types

import pytest

import maskgit

CALLS = """
import sys, warnings
import numpy as np
import maskgit
from maskgit.kernels.common.backends import BACKENDS

def calls(backends, tokens, logits, hidden, weight, attend):
    '''Every public function, by name and as auto, and what is refused.'''
    options = dict(rule="llada", mask_token_id=9)
    step = dict(step=0, num_steps=2)
    for backend in ("auto", *backends):
        maskgit.decode_step(logits, tokens, **options, **step, backend=backend)
        maskgit.sample_tokens(logits, rule="llada", backend=backend)
        maskgit.commit_tokens(tokens * 0, logits[..., 0], tokens, **options, **step, backend=backend)
        maskgit.decode_step_from_hidden(hidden, weight, tokens, **options, **step, backend=backend)
        maskgit.generate(lambda t: logits, tokens, **options, num_steps=2, backend=backend)
    maskgit.attention(attend, attend, attend)
    maskgit.audit_ties(logits, tokens, **options, **step)
    maskgit.gamma(0.5, "cosine", 4)
    maskgit.plan_masked_counts(4, 2, rule="maskgit")
    for name in BACKENDS:  # a name is checked without its framework
        if name in ("triton", "torch", "jax", "pallas") and name not in backends:
            continue
        for call in (
            lambda: maskgit.attention(attend, attend, attend, backend=name),
            lambda: maskgit.sample_tokens(logits, rule="llada", backend=name),
        ):
            try:
                call()
            except ValueError as error:
                assert "backend: " in str(error), error
    for name in ("abacus", "Torch"):
        try:
            maskgit.decode_step(logits, tokens, **options, **step, backend=name)
        except ValueError as error:
            assert "backend: expected" in str(error)
        else:
            raise AssertionError(name)

def numbers(shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)

ARRAYS = (np.full((2, 4), 9), numbers((2, 4, 9)), numbers((2, 4, 8)), numbers((9, 8)),
          numbers((2, 4, 2, 8)))

def loaded(*names):
    return sorted(set(names) & set(sys.modules))
"""

NUMPY = """
calls(("cpp", "reference"), *ARRAYS)
from maskgit.adapters.registry import _check_options
_check_options({"backend": "cpp"})
assert not loaded("torch", "jax", "jaxlib", "triton"), loaded("torch", "jax", "jaxlib", "triton")
"""

TORCH = """
import os, torch
if "TRITON_INTERPRET" in os.environ: del os.environ["TRITON_INTERPRET"]
arrays = tuple(torch.from_numpy(a) for a in ARRAYS)
calls(("cpp", "torch", "reference"), *arrays)
try:
    maskgit.sample_tokens(arrays[1], rule="llada", backend="triton")
except ValueError as error:
    assert "cannot run" in str(error) and "available: cpp, torch, reference" in str(error), error
import maskgit.adapters
from maskgit.adapters.registry import _check_options
for name in ("auto", "cpp", "torch"):
    _check_options({"backend": name})
from maskgit.__main__ import main
for line in ("generate --per-class 1 --steps 1 --out x.png", "edit test:0 --outpaint left --out y.png",
             "audit --logits l.npy --rule llada",
             "bench decode-step --shape 2x8 --samples 1 --seconds 0.01 --no-memory",
             "generate --backend abacus"):
    np.save("l.npy", ARRAYS[1])
    sys.argv = ["maskgit", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert end.code == (2 if "abacus" in line else 0), (line, end.code)
from maskgit.report.environment import facts
facts()
assert not loaded("jax", "jaxlib"), loaded("jax", "jaxlib")
import jax  # and where somebody has imported it, it is not started
calls(("cpp", "torch", "reference"), *arrays)
from jax._src import xla_bridge
assert not xla_bridge._backends, list(xla_bridge._backends)
"""

JAX = """
import jax.numpy as jnp
arrays = tuple(jnp.asarray(a) for a in ARRAYS)
calls(("jax", "reference"), *arrays)
assert not loaded("torch", "triton"), loaded("torch", "triton")
"""

KINDS = {"numpy": NUMPY, "torch": TORCH, "jax": JAX}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_is_imported_or_started(kind, tmp_path):
    if kind in ("torch", "jax"):
        pytest.importorskip(kind)
    code = CALLS + KINDS[kind]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_all_public_functions_are_called():
    functions = {n for n in maskgit.__all__ if isinstance(getattr(maskgit, n), types.FunctionType)}
    # one asks for all backends by its nature, one takes a mesh of jax's
    for name in functions - {"available_backends", "sharded"}:
        assert f"maskgit.{name}(" in CALLS, name


def test_env_is_quiet(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "maskgit", "env"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""
    assert "backends.reference" in done.stdout
