"""Properties of the contract on every backend: random shapes, strides, NaN, infinities, empties."""

import dataclasses
import math

import numpy as np
import pytest
from helpers import FREE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import maskgit
from maskgit import StepNoise, StepRule

BACKENDS = [name for name, reason in maskgit.available_backends().items() if reason is None]
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def few(backend):
    """jax compiles every shape anew: fewer examples."""
    return settings(QUICK, max_examples=6) if backend == "jax" else QUICK


@st.composite
def problems(draw):
    batch, length = draw(st.integers(0, 4)), draw(st.integers(0, 9))
    vocab = draw(st.sampled_from([1, 2, 17, 127, 128, 129, 300, 2049]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 3e4]))
    logits = (rng.normal(0, 1, (batch, length, vocab)) * scale).astype(np.float32)
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    odd = rng.choice([np.nan, np.inf, -np.inf], logits.shape)
    logits = np.where(rng.random(logits.shape) < share, odd, logits).astype(np.float32)
    known = rng.random((batch, length)) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    tokens = np.where(known, rng.integers(0, vocab, (batch, length)), vocab)
    rule = draw(st.sampled_from(FREE))
    steps = draw(st.integers(1, 6))
    return {
        "logits": logits,
        "tokens": tokens,
        "rule": rule,
        "step": draw(st.integers(0, steps - 1)),
        "num_steps": steps,
        "num_masked_at_start": np.minimum((~known).sum(1) + 1, length),
        "seeds": rng.integers(0, 2**63, batch),
        "mask_token_id": vocab,
    }


def run(problem, backend, **changes):
    return maskgit.decode_step(**{**problem, "backend": backend, **changes})


@pytest.mark.parametrize("backend", BACKENDS)
def test_contract_on_anything(backend):
    @few(backend)
    @given(problem=problems())
    def check(problem):
        logits, tokens, mask = problem["logits"], problem["tokens"], problem["mask_token_id"]
        before = logits.copy(), tokens.copy()
        out = run(problem, backend)
        nxt, cand, conf = (np.asarray(x) for x in out)
        np.testing.assert_array_equal(before[0], logits)
        np.testing.assert_array_equal(before[1], tokens)
        assert nxt.shape == cand.shape == conf.shape == tokens.shape
        known, dead = tokens != mask, ~np.isfinite(logits).any(axis=2)
        assert (nxt[known] == tokens[known]).all()
        assert (cand[known] == tokens[known]).all()
        assert np.isposinf(conf[known]).all()
        assert (cand[~known & dead] == mask).all()
        assert np.isneginf(conf[~known & dead]).all()
        alive = ~known & ~dead
        assert ((cand[alive] >= 0) & (cand[alive] < mask)).all()
        assert ((nxt[~known] == cand[~known]) | (nxt[~known] == mask)).all()
        assert not np.isnan(conf).any()
        chosen = np.take_along_axis(logits, np.minimum(cand, logits.shape[2] - 1)[..., None], 2)
        assert not np.isnan(chosen[alive]).any()
        assert not np.isneginf(chosen[alive]).any()

    check()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_agrees_with_the_reference_on_anything(backend):
    @few(backend)
    @given(problem=problems())
    def check(problem):
        if not problem["tokens"].size:
            return
        want = run(problem, "reference")
        got = run(problem, backend)
        # Ties of equal logits are common here (scale 0) and must be broken alike; near ties of
        # different logits do not occur at this size in 1 of 10^5 positions.
        same = np.asarray(got.candidate_tokens) == want.candidate_tokens
        assert same.mean() > 0.99
        close = np.isclose(
            np.asarray(got.confidence), want.confidence, rtol=2e-3, atol=2e-3, equal_nan=False
        )
        assert close[same].all()

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_counts_and_permutation(backend):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(3, 20, 50)).astype(np.float32)
    tokens = np.full((3, 20), 50)
    tokens[1, :13] = 7
    rule = dataclasses.replace(StepRule.preset("llada"), score_dtype="float32")
    options = {"rule": rule, "mask_token_id": 50, "step": 0, "num_steps": 3, "backend": backend}
    out = maskgit.decode_step(logits, tokens, **options)
    committed = (np.asarray(out.next_tokens) != 50) & (tokens == 50)
    assert committed.sum(1).tolist() == [7, 3, 7]
    order = rng.permutation(20)
    moved = maskgit.decode_step(logits[:, order], tokens[:, order], **options)
    assert (np.asarray(moved.next_tokens) == np.asarray(out.next_tokens)[:, order]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", ["strict", "inclusive", "exact"])
def test_the_three_cut_rules_on_ties(backend, cut):
    """Confidences 3 2 2 2 1 (by logit), two to stay masked: the cut falls among the twos."""
    logits = np.zeros((1, 5, 4), np.float32)
    logits[0, :, 1] = [3, 2, 2, 2, 1]
    rule = StepRule(
        count="quota", cut=cut, sample_temperature=0.0, score="logit", score_dtype="float32"
    )
    out = maskgit.decode_step(
        logits, np.full((1, 5), 9), rule=rule, mask_token_id=9, step=0, num_steps=2,
        num_masked_at_start=5, backend=backend,
    )  # fmt: skip
    committed = np.flatnonzero(np.asarray(out.next_tokens)[0] != 9).tolist()
    # quota 3 of 5: two stay masked
    expected = {"strict": [0, 1, 2, 3], "inclusive": [0], "exact": [0, 1, 2]}
    assert committed == expected[cut]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_equal_logits_give_the_lowest_index(backend, dtype):
    torch = pytest.importorskip("torch")
    for vocab, first in ((5, 3), (129, 128), (3000, 2047), (3000, 2048)):
        logits = torch.zeros(1, 1, vocab, dtype=getattr(torch, dtype))
        logits[0, 0, first:] = 2.0
        for rule in ("llada", "dream-maskgit-plus"):
            out = maskgit.sample_tokens(logits, rule=rule, backend=backend)
            assert int(out.candidate_tokens) == first
        noise = StepNoise(token_gumbel=torch.zeros(1, 1, vocab))
        out = maskgit.sample_tokens(logits, rule="maskgit", noise=noise, backend=backend)
        assert int(out.candidate_tokens) == first


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_and_factor(backend):
    """Confidences by construction: two columns with p and 1 - p."""
    p = np.array([[0.99, 0.95, 0.91, 0.7, 0.6]])
    logits = np.stack([np.log(p), np.log1p(-p)], axis=-1).astype(np.float32)
    tokens = np.full((1, 5), 2)
    options = {"mask_token_id": 2, "step": 0, "num_steps": 5, "backend": backend}

    def committed(rule, **changes):
        out = maskgit.decode_step(
            logits, tokens, rule=dataclasses.replace(StepRule.preset(rule), **changes), **options
        )
        return (np.asarray(out.next_tokens)[0] != 2).tolist()

    assert committed("threshold") == [True, True, True, False, False]
    assert committed("threshold", threshold=0.999) == [True, False, False, False, False]
    assert committed("threshold", threshold=0.5) == [True] * 5
    # bounds 1 - f/(n + 1): n = 2: 1 - f/3, n = 3: 1 - f/4, n = 4: 1 - f/5, n = 5: 1 - f/6
    assert committed("factor", factor=0.14) == [True, False, False, False, False]
    assert committed("factor", factor=0.4) == [True, True, True, False, False]
    # a failure at the last index commits it all the same, as upstream does
    assert committed("factor", factor=2.0) == [True] * 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_slices_bans_and_strides(backend):
    rng = np.random.default_rng(5)
    base = rng.normal(size=(2, 6, 2025 + 7)).astype(np.float32)
    logits, uncond = base[:, :, 3:-4], base[:, ::-1, 3:-4]
    tokens = np.full((2, 6), 2024)
    rule = dataclasses.replace(
        StepRule.preset("maskgit"), vocab_slice=(100, 1124), banned_ids=(5, 100, 700)
    )
    options = {"mask_token_id": 2024, "step": 1, "num_steps": 4, "seeds": [1, 2]}
    options |= {"num_masked_at_start": 6, "backend": backend}
    got = maskgit.decode_step(
        logits, tokens, rule=rule, uncond_logits=uncond, guidance_scale=2.5, **options
    )
    mixed = uncond + 2.5 * (logits - uncond)
    mixed[:, :, [100, 700]] = -np.inf
    mixed = np.ascontiguousarray(mixed[:, :, 100:1124])
    plain = dataclasses.replace(StepRule.preset("maskgit"))
    want = maskgit.decode_step(mixed, tokens, rule=plain, **{**options, "backend": "reference"})
    shifted = np.where(np.asarray(want.candidate_tokens) == 2024, 2024, want.candidate_tokens + 100)
    assert (np.asarray(got.candidate_tokens) == shifted).all()
    np.testing.assert_allclose(np.asarray(got.confidence), want.confidence, rtol=1e-4, atol=1e-4)
    assert ((np.asarray(got.next_tokens) == 2024) == (want.next_tokens == 2024)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_floats_filters_of_one_and_half_precision_ties(backend):
    top = float(np.finfo(np.float32).max)
    logits = np.array([[[top, -np.inf], [np.inf, top], [-np.inf, top]]], np.float32)
    out = maskgit.sample_tokens(logits, rule="llada", backend=backend)
    assert np.asarray(out.candidate_tokens).tolist() == [[0, 0, 1]]
    rule = StepRule(filters=("top_p", "temperature"), top_p=1.0, sample_temperature=1e4)
    spread = np.full((1, 64, 20), -800.0, np.float32)
    spread[..., 0] = 0
    tokens = maskgit.sample_tokens(spread, rule=rule, seeds=[1], backend=backend).candidate_tokens
    assert len(set(np.asarray(tokens).ravel().tolist())) > 5
    flat = np.zeros((1, 1, 2**20), np.float16)  # every probability rounds to the same subnormal
    flat[0, 0, 777_777] = 0.025
    out = maskgit.sample_tokens(flat, rule="dream-maskgit-plus", backend=backend)
    assert int(np.asarray(out.candidate_tokens)[0, 0]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_without_a_usable_value_falls_back_to_argmax(backend):
    logits = np.array([[[0.0, 3.0, 1.0]] * 3], np.float32)
    gumbel = np.array([[[np.nan] * 3, [-np.inf] * 3, [-np.inf, np.nan, 0.0]]], np.float32)
    out = maskgit.sample_tokens(
        logits, rule="maskgit", noise=StepNoise(token_gumbel=gumbel), backend=backend
    )
    assert np.asarray(out.candidate_tokens).tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_eligible_are_left_alone(backend):
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(2, 8, 11)).astype(np.float32)
    tokens = np.full((2, 8), 11)
    window = np.zeros((2, 8), bool)
    window[0, :4] = window[1, 2:6] = True
    out = maskgit.decode_step(
        logits, tokens, rule="llada", mask_token_id=11, step=1, num_steps=2, eligible=window,
        num_masked_at_start=4, backend=backend,
    )  # fmt: skip
    assert (np.asarray(out.candidate_tokens)[~window] == 11).all()
    assert np.isneginf(np.asarray(out.confidence)[~window]).all()
    assert ((np.asarray(out.next_tokens) != 11).sum(1) == 2).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_rows_raise_when_asked(backend, monkeypatch):
    logits = np.zeros((2, 3, 4), np.float32)
    logits[1, 2] = [np.nan, -np.inf, np.inf, np.nan]
    tokens = np.full((2, 3), 4)
    options = {"rule": "llada", "mask_token_id": 4, "step": 0, "num_steps": 1, "backend": backend}
    out = maskgit.decode_step(logits, tokens, **options)
    assert np.asarray(out.next_tokens)[1, 2] == 4
    with pytest.raises(ValueError, match=r"logits: .* row \(sequence 1, position 2\)"):
        maskgit.decode_step(logits, tokens, check=True, **options)
    monkeypatch.setenv("MASKGIT_CHECK", "1")
    with pytest.raises(ValueError, match=r"row \(sequence 1, position 2\)"):
        maskgit.sample_tokens(logits, rule="llada", backend=backend)


def test_offsets_beyond_32_bits():
    """2.2 billion logits, of which two rows at the far end are read; the rest is never touched."""
    length, vocab = 17_000, 126_464
    assert length * vocab > 2**31
    logits = np.zeros((1, length, vocab), np.float16)
    rng = np.random.default_rng(0)
    logits[0, -2:] = rng.normal(size=(2, vocab)).astype(np.float16)
    tokens = np.zeros((1, length), np.int64)
    tokens[0, -2:] = vocab
    for backend in ("cpp", "reference") if "cpp" in BACKENDS else ("reference",):
        tail = logits[:, -2:]
        far = logits if backend == "cpp" else tail
        out = maskgit.decode_step(
            far, tokens if backend == "cpp" else tokens[:, -2:], rule="llada",
            mask_token_id=vocab, step=0, num_steps=1, backend=backend,
        )  # fmt: skip
        assert np.asarray(out.next_tokens)[0, -2:].tolist() == tail[0].argmax(1).tolist()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("cpp", "torch")])
@pytest.mark.parametrize("vocab", [64, 128, 256, 1024, 2176, 4096])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bfloat16_rows_with_odd_values(backend, vocab, temperature):
    """Signs, zeros of both signs, NaN of both signs, infinities, the largest and the smallest numbers."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(vocab)
    odd = [
        0x0000,
        0x8000,
        0x7FC0,
        0xFFC0,
        0x7F80,
        0xFF80,
        0x7F7F,
        0xFF7F,
        0x0001,
        0x8001,
        0x7F81,
        0xFF81,
    ]
    rows = []
    for shift in (0.0, -40.0, 40.0, -300.0):
        base = torch.from_numpy(rng.normal(size=(24, vocab)) * 3 + shift).bfloat16()
        bits = base.view(torch.int16).numpy().view(np.uint16).copy()
        for i in range(1, 24):
            some = rng.choice(odd, rng.integers(1, 4))
            where = rng.integers(0, vocab, rng.integers(1, 5))
            bits[i, where] = rng.choice(some, where.size)
        bits[1, 5::7] = 0x8000
        bits[2] |= 0x8000
        bits[3] |= 0x8000
        bits[3, vocab // 2 :] = rng.choice([0x0000, 0x8000], vocab - vocab // 2)
        bits[4, :-1] = 0xFFC0
        bits[5] = rng.choice([0x7FC0, 0xFFC0, 0xFF80], vocab)
        bits[6, vocab // 2 :] = 0x43FA  # 500: far above what stands in the first leaf
        rows.append(bits)
    bits = np.concatenate(rows)[None]
    logits = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    rule = StepRule(score="prob", sample_temperature=temperature)
    got = maskgit.sample_tokens(logits, rule=rule, seeds=torch.tensor([7]), backend=backend)
    want = maskgit.sample_tokens(
        logits.float().numpy(), rule=rule, seeds=np.array([7]), backend="reference"
    )
    np.testing.assert_array_equal(got.candidate_tokens.numpy(), want.candidate_tokens)
    np.testing.assert_allclose(got.confidence.numpy(), want.confidence, rtol=3e-6, atol=1e-30)
    np.testing.assert_allclose(got.log_z.numpy(), want.log_z, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [64, 1024, 2176, 5000])
def test_certain_tokens_have_probability_one(backend, vocab):
    """Rules compare such probabilities for equality; so they are exact, wherever the logits lie."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 3, (1, 40, vocab)).astype(np.float32)
    height = (rng.uniform(-2e3, 2e3, 40) + 200).astype(np.float32)
    twins = rng.permuted(np.tile(np.arange(vocab), (40, 1)), axis=1)[:, :2]
    logits += (height - 200)[:, None]
    logits[0, np.arange(40), twins[:, 0]] = height + 100
    logits[0, np.arange(20, 40), twins[20:, 1]] = height[20:] + 100
    rule = dataclasses.replace(StepRule.preset("llada"), score_dtype="float32")
    for temperature in (0.0, 1.0):
        given = dataclasses.replace(rule, score="prob", sample_temperature=temperature)
        out = maskgit.sample_tokens(logits, rule=given, seeds=np.arange(1), backend=backend)
        exact = np.where(np.arange(40) < 20, 1.0, 0.5)
        if temperature == 0:
            np.testing.assert_array_equal(out.confidence[0], exact)
        np.testing.assert_allclose(out.confidence[0], exact, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_far_from_zero_and_small_temperatures(backend, dtype):
    rng = np.random.default_rng(5)
    for vocab, offset, temperature in ((3000, 64000, 1.0), (3000, -64000, 0.9), (256, 3, 1e-5)):
        near = rng.normal(0, 100 if dtype == "float16" else 3, (1, 30, vocab))
        logits = np.clip(near + offset, -65504, 65504).astype(dtype)
        rule = dataclasses.replace(StepRule.preset("maskgit"), sample_temperature=temperature)
        given = {"rule": rule, "seeds": np.arange(1)}
        ours = maskgit.sample_tokens(logits, backend=backend, **given)
        judge = maskgit.sample_tokens(logits, backend="reference", **given)
        assert (ours.candidate_tokens == judge.candidate_tokens).mean() > 0.9
        same = ours.candidate_tokens == judge.candidate_tokens
        np.testing.assert_allclose(
            ours.confidence[same], judge.confidence[same], rtol=1e-6, atol=2e-6
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_plain_maximum_is_the_first_of_equals(dtype: str) -> None:
    """It is taken span by span on a CPU: ties within and between spans, tails, NaN, infinities."""
    torch = pytest.importorskip("torch")
    from maskgit.kernels.decode_step.plain.torch_ref import _largest

    generator = torch.Generator().manual_seed(5)
    kind = getattr(torch, dtype)
    for vocab in (1, 63, 1023, 1024, 1025, 1087, 8191, 8192, 8193, 8447, 2**17 + 1):
        rows = torch.randint(-3, 3, (2, 4, vocab), generator=generator).to(kind)
        rows[0, 0] = -math.inf
        rows[0, 1, -1] = math.inf
        rows[0, 2, vocab // 2] = math.nan
        rows[0, 3] = 7.0
        rows[1, 0, -1] = 9.0
        for view in (rows, rows.transpose(0, 1), rows[..., ::2]):
            found, wanted = _largest(view), view.max(-1)
            assert torch.equal(found.indices, wanted.indices), vocab
            assert torch.equal(found.values.nan_to_num(5.5), wanted.values.nan_to_num(5.5)), vocab
