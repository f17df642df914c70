"""Replays what other codebases' own sampling code did, step by step, on every backend.

tests/golden/*.npz were recorded by tests/golden/record/ with the codebases' own functions, a stub
model and recorded noise; record/common.py describes the format, rules.json says which rule each follows.
"""

import json

import numpy as np
import pytest
from conftest import BACKENDS
from helpers import GOLDEN, golden_rule, native

import maskgit
from maskgit import StepNoise

RULES = json.loads((GOLDEN / "rules.json").read_text())
FILES = [  # those in another layout are replayed by tests/sampling/test_layouts.py
    path for path in sorted(GOLDEN.glob("*.npz")) if "layout" not in RULES[path.stem]
]


def replay(golden, meta, rule, s, backend):
    """(next_tokens, candidate_tokens) of step s."""
    kind = {"torch": "torch", "triton": "torch", "jax": "jax", "pallas": "jax"}.get(
        backend, "numpy"
    )
    if backend == "cpp in jax":
        kind, backend = "jax", "cpp"
    dtype = meta["dtype"]
    if kind == "numpy" and dtype == "bfloat16":
        kind = "torch"

    def array(name, to=None):
        return native(golden[name][s], kind, to) if name in golden else None

    names = ("token_gumbel", "choice_gumbel")
    scale = meta["guidance_scale"]
    out = maskgit.decode_step(
        array("logits", dtype),
        array("tokens", "int32"),
        rule=rule,
        mask_token_id=meta["mask_token_id"],
        step=int(golden["step"][s]),
        num_steps=int(golden["num_steps"][s]),
        num_masked_at_start=array("num_masked_at_start"),
        noise=StepNoise(*(array(name, "float32") for name in names)),
        uncond_logits=array("uncond_logits", dtype),
        guidance_scale=scale[s] if isinstance(scale, list) else scale,
        eligible=array("eligible"),
        scores=array("scores", "float32") if rule.score == "given" else None,
        num_commit=array("num_commit") if rule.count == "given" else None,
        backend=backend,
    )
    return np.asarray(out.next_tokens), np.asarray(out.candidate_tokens)


def meta_of(path):
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["meta"]))


def first_of_each_function():
    """One recording of each function of each codebase."""
    found = {}
    for path in FILES:
        meta = meta_of(path)
        found.setdefault((meta["codebase"], meta["function"]), path.stem)
    return set(found.values())


CASES = [
    pytest.param(
        path,
        backend,
        id=f"{backend}-{path.stem}",
        marks=[pytest.mark.slow] if backend == "jax" and path.stem not in QUICK else [],
    )
    for QUICK in [first_of_each_function()]
    for path in FILES
    for backend in BACKENDS
]


@pytest.mark.parametrize(("path", "backend"), CASES)
def test_tokens_are_those_of_the_codebase_itself(path, backend):
    with np.load(path, allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    meta = json.loads(str(golden["meta"]))
    for s in range(len(golden["step"])):
        next_tokens, candidates = replay(golden, meta, golden_rule(path.stem), s, backend)
        np.testing.assert_array_equal(next_tokens, golden["expected"][s], f"after step {s}")
        if "candidates" in golden:
            np.testing.assert_array_equal(candidates, golden["candidates"][s], f"in step {s}")
