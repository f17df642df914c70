"""The torch.library ops: schema and fakes by opcheck, no graph break, clear errors."""

from pathlib import Path

import numpy as np
import pytest

import maskgit
from maskgit import StepNoise, StepRule

torch = pytest.importorskip("torch")


def example(batch=2, length=6, vocab=19, dtype=torch.float32):
    torch.manual_seed(0)
    logits = torch.randn(batch, length, vocab, dtype=dtype)
    tokens = torch.full((batch, length), vocab)
    tokens[0, 1] = 3
    return logits, tokens, torch.arange(batch)


@pytest.mark.parametrize("rule", ["maskgit", "llada-fp64", "dream-entropy"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_opcheck(rule, backend):
    from maskgit.kernels.decode_step.ops import decode_step_op, sample_tokens_op

    logits, tokens, seeds = example()
    encoded = StepRule.preset(rule).encoded
    torch.library.opcheck(
        decode_step_op.overload,
        (
            logits,
            tokens,
            encoded,
            19,
            1,
            4,
            torch.full((len(tokens),), 6),
            seeds,
            *[None] * 10,
            backend,
            False,
        ),
    )
    torch.library.opcheck(
        sample_tokens_op.overload, (logits, encoded, seeds, None, 0, None, None, backend, False)
    )


def test_compiles_without_a_graph_break():
    rule = StepRule.preset("maskgit")

    def one_step(logits, tokens, seeds):
        return maskgit.decode_step(
            logits * 2, tokens, rule=rule, mask_token_id=19, step=1, num_steps=4, seeds=seeds,
            num_masked_at_start=6,
        )  # fmt: skip

    def stats(logits, seeds):
        return maskgit.sample_tokens(logits, rule=rule, seeds=seeds)

    logits, tokens, seeds = example()
    compiled = torch.compile(one_step, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        logits, tokens, seeds = example(batch)
        for a, b in zip(
            compiled(logits, tokens, seeds), one_step(logits, tokens, seeds), strict=True
        ):
            assert torch.equal(a, b)
    compiled = torch.compile(stats, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits, seeds), stats(logits, seeds), strict=True):
        assert torch.equal(a, b)


def test_inputs_that_require_grad_raise():
    logits, tokens, seeds = example()
    logits.requires_grad_()
    with pytest.raises(ValueError, match="logits: decoding has no gradient"):
        maskgit.decode_step(
            logits, tokens, rule="maskgit", mask_token_id=19, step=0, num_steps=2, seeds=seeds
        )


def test_results_are_like_the_inputs(backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, tokens, seeds = example(dtype=dtype)
        tokens = tokens.to(torch.int32)
        out = maskgit.decode_step(
            logits, tokens, rule="maskgit", mask_token_id=19, step=0, num_steps=2, seeds=seeds,
            backend=backend,
        )  # fmt: skip
        assert all(isinstance(x, torch.Tensor) for x in out)
        assert out.next_tokens.dtype == out.candidate_tokens.dtype == torch.int32
        assert out.confidence.dtype == torch.float32


def test_numpy_torch_and_jax_give_the_same(backend):
    jax = pytest.importorskip("jax")
    logits, tokens, seeds = example()
    forms = [
        (logits, tokens, seeds),
        (logits.numpy(), tokens.numpy(), seeds.numpy()),
        (jax.numpy.asarray(logits.numpy()), jax.numpy.asarray(tokens.numpy()), seeds.numpy()),
    ]
    results = [
        maskgit.decode_step(
            a, b, rule="maskgit", mask_token_id=19, step=0, num_steps=2, seeds=s, backend=backend
        )
        for a, b, s in forms
    ]
    assert isinstance(results[1].next_tokens, np.ndarray)
    assert isinstance(results[2].next_tokens, jax.Array)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert np.array_equal(np.asarray(x), np.asarray(y))


def test_jit_in_jax_gives_the_same():
    jax = pytest.importorskip("jax")
    logits, tokens, seeds = (jax.numpy.asarray(x.numpy()) for x in example())

    def one_step(logits, tokens, seeds):
        return maskgit.decode_step(
            logits, tokens, rule="maskgit", mask_token_id=19, step=1, num_steps=4, seeds=seeds,
            num_masked_at_start=6,
        )  # fmt: skip

    eager, jitted = one_step(logits, tokens, seeds), jax.jit(one_step)(logits, tokens, seeds)
    assert np.array_equal(eager.next_tokens, jitted.next_tokens)
    assert np.array_equal(eager.candidate_tokens, jitted.candidate_tokens)
    np.testing.assert_allclose(eager.confidence, jitted.confidence, rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), 2)
    assert maskgit.decode_step(
        logits,
        tokens,
        rule="maskgit",
        mask_token_id=19,
        step=1,
        num_steps=4,
        seeds=keys,
        num_masked_at_start=6,
    ).next_tokens.shape == (2, 6)


def test_device_mix_names_the_argument():
    logits, tokens, seeds = example()
    with pytest.raises(
        TypeError, match="tokens: expected a torch array like the others, got ndarray"
    ):
        maskgit.decode_step(
            logits, tokens.numpy(), rule="llada", mask_token_id=19,
            step=0, num_steps=2,
        )  # fmt: skip
    with pytest.raises(
        ValueError, match="tokens: expected on device cpu like the others, got meta"
    ):
        maskgit.decode_step(
            logits, tokens.to("meta"), rule="llada", mask_token_id=19, step=0, num_steps=2
        )
    noise = StepNoise(token_gumbel=torch.zeros(2, 6, 19, device="meta"))
    with pytest.raises(ValueError, match=r"noise.token_gumbel: expected on device cpu"):
        maskgit.decode_step(
            logits, tokens, rule="amused", mask_token_id=19, step=0, num_steps=2, seeds=seeds,
            noise=noise,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "most"), [(0.0, 1), (1.0, 2), (0.7, 3)])
def test_the_plain_backend_makes_few_arrays_of_the_size_of_the_logits(temperature, most, dtype):
    """One softmax for greedy tokens; a difference and its exponential, and a division, for drawn ones."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            views = (
                "view",
                "unsafe_view",
                "_reshape_alias",
                "split",
                "detach",
                "alias",
                "unflatten",
            )
            if isinstance(out, torch.Tensor) and out.numel() >= size:
                name = func.__name__.split(".")[0]
                names.extend([name] if name not in views else [])
            return out

    size, names = 8 * 4096, []
    logits = torch.randn(1, 8, 4096).to(dtype)
    rule = StepRule(sample_temperature=temperature, score_temperature=temperature or 1.0)
    with Counter():
        maskgit.sample_tokens(logits, rule=rule, seeds=[1], backend="torch")
    assert len(names) <= most, names


def calls_of_ours(call):
    """How many functions of the package a call goes through, once it has been made before."""
    import cProfile
    import pstats

    call(), call()
    profile = cProfile.Profile()
    profile.runcall(call)
    root = str(Path(maskgit.__file__).parents[1])
    stats = pstats.Stats(profile).stats.items()
    outside = (".venv", "site-packages")
    return sum(
        times
        for (file, *_), (times, *_) in stats
        if ("maskgit" in file or file.startswith(root)) and not any(o in file for o in outside)
    )


def test_a_step_is_looked_at_once():
    """Each argument costs a few calls, and facts about it that are known none."""
    if maskgit.available_backends()["cpp"] is not None:
        pytest.skip("the C++ extension was not built")
    logits, tokens, seeds = example()
    counts = torch.full((len(tokens),), 6)

    def step():
        return maskgit.decode_step(
            logits, tokens, rule="maskgit", mask_token_id=19, step=1, num_steps=4,
            num_masked_at_start=counts, seeds=seeds, backend="cpp",
        )  # fmt: skip

    from maskgit.kernels.decode_step import door

    step()
    before = door._check_facts.cache_info().misses
    step()
    assert door._check_facts.cache_info().misses == before
    assert calls_of_ours(step) <= 130  # more where other frameworks are loaded too
    assert calls_of_ours(lambda: maskgit.sample_tokens(logits, rule="llada", backend="cpp")) <= 100
