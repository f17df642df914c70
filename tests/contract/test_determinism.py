"""A token depends on its own sequence's seed, position, step and logits, and on nothing else."""

import dataclasses

import numpy as np
import pytest

import maskgit
from maskgit import StepRule

torch = pytest.importorskip("torch")
cpp = pytest.importorskip("maskgit._C", reason="the C++ extension was not built")


def inputs(batch=7, length=33, vocab=517, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (batch, length, vocab)).astype(np.float32)
    tokens = np.where(
        rng.random((batch, length)) < 0.7, vocab, rng.integers(0, vocab, (batch, length))
    )
    return logits, tokens, rng.integers(0, 2**62, batch)


def step(logits, tokens, seeds, rule="maskgit", **changes):
    start = logits.shape[1]
    options = {"mask_token_id": logits.shape[2], "step": 2, "num_steps": 8, **changes}
    options.setdefault("num_masked_at_start", start)
    return maskgit.decode_step(logits, tokens, rule=rule, seeds=seeds, **options)


def same(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def test_shuffled_split_and_alone(backend):
    logits, tokens, seeds = inputs()
    whole = step(logits, tokens, seeds, backend=backend)
    order = np.random.default_rng(1).permutation(len(seeds))
    shuffled = step(logits[order], tokens[order], seeds[order], backend=backend)
    assert same([x[order] for x in whole], shuffled)
    for rows in (slice(0, 3), slice(3, 7), slice(4, 5)):
        part = step(logits[rows], tokens[rows], seeds[rows], backend=backend)
        assert same([x[rows] for x in whole], part)


def test_threads(monkeypatch):
    logits, tokens, seeds = inputs(vocab=5003)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(step(logits, tokens, seeds, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_a_forked_child_can_use_the_core():
    import multiprocessing

    logits, tokens, seeds = inputs(vocab=5003)
    here = step(logits, tokens, seeds, backend="cpp")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        there = pool.apply(step, (logits, tokens, seeds), {"backend": "cpp"})
    assert same(here, there)


def test_rows_gathered_from_anywhere(backend):
    logits, _, seeds = inputs()
    rule = dataclasses.replace(StepRule.preset("maskgit"), choice_temperature=0.0)
    whole = maskgit.sample_tokens(logits, rule=rule, seeds=seeds, step=4, backend=backend)
    rows = [(0, 5), (6, 32), (3, 0)]
    gathered = maskgit.sample_tokens(
        np.stack([logits[b, n] for b, n in rows]),
        rule=rule,
        seeds=np.array([seeds[b] for b, _ in rows]),
        positions=np.array([n for _, n in rows]),
        step=4,
        backend=backend,
    )
    for i, (b, n) in enumerate(rows):
        assert all(np.array_equal(x[b, n], y[i]) for x, y in zip(whole, gathered, strict=True))


@pytest.mark.parametrize("isa", cpp.supported_implementations())
@pytest.mark.parametrize("vocab", [1, 17, 128, 1000, 2048, 2049, 4999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_agrees_with_the_reference(isa, vocab, dtype):
    rng = np.random.default_rng(vocab)
    logits = torch.from_numpy(rng.normal(0, 3, (2, 9, vocab)).astype(np.float32)).to(dtype)
    tokens = torch.full((2, 9), vocab)
    seeds = torch.tensor([3, 4])
    options = {"mask_token_id": vocab, "step": 1, "num_steps": 4, "seeds": seeds}
    options["num_masked_at_start"] = 9
    try:
        cpp.set_implementation(isa)
        got = maskgit.decode_step(logits, tokens, rule="maskgit", backend="cpp", **options)
    finally:
        cpp.set_implementation("")
    want = maskgit.decode_step(logits, tokens, rule="maskgit", backend="reference", **options)
    assert torch.equal(got.candidate_tokens, want.candidate_tokens)
    torch.testing.assert_close(got.confidence, want.confidence, rtol=1e-5, atol=2e-5)
    assert torch.equal(got.next_tokens, want.next_tokens)


@pytest.mark.parametrize("isa", cpp.supported_implementations())
@pytest.mark.parametrize("rise", [30.0, 60.0, 88.5, 120.0, 500.0, 1e5, -60.0])
@pytest.mark.parametrize("vocab", [1024, 4096])
def test_rows_whose_first_leaf_is_far_from_the_maximum(isa, rise, vocab):
    """A plain draw takes its reference from the first leaf; the rest may be anywhere above it."""
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 2, (1, 40, vocab)).astype(np.float32)
    logits[:, :, 128:] += np.float32(rise)
    logits[:, 5, 700], logits[:, 6, 700], logits[:, 7, :128] = np.nan, np.inf, -np.inf
    options = {"rule": "maskgit", "seeds": np.array([9])}
    try:
        cpp.set_implementation(isa)
        got = maskgit.sample_tokens(logits, backend="cpp", **options)
    finally:
        cpp.set_implementation("")
    want = maskgit.sample_tokens(logits, backend="reference", **options)
    assert (got.candidate_tokens == want.candidate_tokens).all()
    np.testing.assert_allclose(got.confidence, want.confidence, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got.log_z, want.log_z, rtol=1e-5, atol=1e-5)


GUARDED = """
import ctypes, mmap, sys
import numpy as np
import maskgit
from maskgit import StepNoise, _C
page = mmap.PAGESIZE
size = 8 * page
memory = mmap.mmap(-1, size + page)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(base + size), ctypes.c_size_t(page), 0) == 0
rng = np.random.default_rng(0)
for isa in _C.supported_implementations():
    _C.set_implementation(isa)
    for dtype in (np.float32, np.float16):
        for vocab in (1, 5, 127, 128, 129, 1024, 2047, 2048, 2049, 4096):
            rows = 3
            if rows * vocab * np.dtype(dtype).itemsize > size:
                rows = 1
            raw = np.frombuffer(memory, np.uint8, size)
            logits = raw[size - rows * vocab * np.dtype(dtype).itemsize:].view(dtype)
            logits = logits.reshape(1, rows, vocab)
            logits[:] = rng.normal(size=logits.shape).astype(dtype) * 3
            logits[0, :, vocab // 2] = logits[0, :, -1] = 9.0
            for rule in ("maskgit", "llada", "dream-maskgit-plus", "dream-margin", "dream-entropy"):
                got = maskgit.sample_tokens(logits, rule=rule, seeds=[3], backend="cpp")
                want = maskgit.sample_tokens(logits, rule=rule, seeds=[3], backend="reference")
                assert (got.candidate_tokens == want.candidate_tokens).all(), (isa, vocab, rule)
print("ok")
"""


def test_nothing_is_read_past_the_logits():
    """The logits end where an unreadable page begins."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", GUARDED], capture_output=True, text=True, check=False
    )
    assert done.stdout == "ok\n", (done.returncode, done.stderr)


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("maskgit", "the child"),
        ("maskgit", "the parent"),
        ("maskgit.kernels.decode_step.cpu.launch", "the parent"),
    ],
)
def test_a_child_forked_after_torch_used_its_threads(what, where):
    """The child's first call must not wait for OpenMP threads that only the parent has."""
    import subprocess
    import sys

    imported = {"the parent": f"import {what}", "the child": ""}[where]
    code = f"""
import os, torch, numpy as np
torch.set_num_threads(2)
torch.randn(1000, 1000).sum()
{imported}
logits = np.zeros((1, 64, 5000), np.float32)
child = os.fork()
if not child:
    import {what}
    import maskgit
    maskgit.sample_tokens(logits, rule="llada", backend="cpp")
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 0


def test_instruction_set_by_environment(monkeypatch):
    import subprocess
    import sys

    code = "from maskgit import _C; print(_C.active_implementation())"
    for isa in cpp.supported_implementations():
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"MASKGIT_CPU_ISA": isa, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == isa
