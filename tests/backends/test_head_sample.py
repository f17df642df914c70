"""`decode_step_from_hidden` against the same step on full logits."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from helpers import BACKENDS, kind_for, native, native_seeds
from maskgit.kernels.head_sample import chunked

import maskgit
from maskgit import StepNoise, StepRule

MASK = 300
ALL = ["reference", *BACKENDS]
RULES = {
    "maskgit": StepRule.preset("maskgit"),
    "llada": dataclasses.replace(StepRule.preset("llada"), score_dtype="float32"),
    "titok": StepRule.preset("titok"),
    "entropy": StepRule(score="neg_entropy", filters=("top_k",), top_k=9, score_filtered=True),
    "threshold": StepRule.preset("threshold"),
    "slice": StepRule(vocab_slice=(20, 250), banned_ids=(30, 31)),
    "revise": StepRule(revise="held"),
    "random": dataclasses.replace(StepRule.preset("random"), sample_temperature=1.0),
    "dream-origin": dataclasses.replace(StepRule.preset("dream-origin"), sample_temperature=0.7),
    "given": StepRule(score="given"),
}


def problem(seed=0, batch=3, length=12, vocab=300, width=8):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (batch, length))
    return {
        "hidden": rng.normal(size=(batch, length, width)).astype(np.float32),
        "uncond": rng.normal(size=(batch, length, width)).astype(np.float32),
        "weight": rng.normal(size=(vocab, width)).astype(np.float32),
        "bias": rng.normal(size=vocab).astype(np.float32),
        "tokens": np.where(rng.random(tokens.shape) < 0.7, MASK, tokens),
        "seeds": rng.integers(0, 2**63, batch),
        "eligible": rng.random(tokens.shape) < 0.8,
        "scores": rng.normal(size=tokens.shape).astype(np.float32),
        "gumbel": rng.gumbel(size=(*tokens.shape, vocab)).astype(np.float32),
        "choice": rng.gumbel(size=tokens.shape).astype(np.float32),
    }


def both(p, rule, backend, guidance=None, bias=True, injected=False):
    """(from hidden states, from full logits), as NumPy arrays."""
    kind = kind_for(backend, "float32")
    x = {k: native(v, kind) for k, v in p.items() if k != "seeds"}
    start, stop = rule.vocab_slice or (0, 300)
    noise = StepNoise(x["gumbel"][..., start:stop], x["choice"]) if injected else None
    options = {
        "rule": rule, "mask_token_id": MASK, "step": 1, "num_steps": 4, "noise": noise,
        "seeds": None if injected else native_seeds(p["seeds"], kind), "eligible": x["eligible"],
        "scores": x["scores"] if rule.score == "given" else None, "backend": backend,
        "guidance_scale": guidance, "num_masked_at_start": x["tokens"].shape[1],
    }  # fmt: skip
    hidden = maskgit.decode_step_from_hidden(
        x["hidden"], x["weight"], x["tokens"], head_bias=x["bias"] if bias else None,
        uncond_hidden=None if guidance is None else x["uncond"], **options,
    )  # fmt: skip
    add = x["bias"] if bias else 0

    def logits(h):
        return h @ x["weight"].T + add

    full = maskgit.decode_step(
        logits(x["hidden"]), x["tokens"],
        uncond_logits=None if guidance is None else logits(x["uncond"]), **options,
    )  # fmt: skip
    return [np.asarray(a) for a in hidden], [np.asarray(a) for a in full]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", RULES)
def test_same_step_as_from_logits(name, backend, monkeypatch):
    rule = RULES[name]
    monkeypatch.setattr(chunked, "LOGITS_PER_CHUNK", 1500)  # chunks of five rows
    for seed, (guidance, bias, injected) in enumerate([(None, True, False), (2.5, True, True)]):
        hidden, full = both(problem(seed), rule, backend, guidance, bias, injected)
        np.testing.assert_array_equal(hidden[0], full[0])
        first = rule.score in ("random", "given") or rule.count == "bernoulli"
        if first:  # what stays masked is not drawn
            drawn = hidden[1] != MASK
            np.testing.assert_array_equal(hidden[1][drawn], full[1][drawn])
            assert ((hidden[0] != MASK) == drawn).all()
        else:
            np.testing.assert_array_equal(hidden[1], full[1])
            np.testing.assert_allclose(hidden[2], full[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    torch = pytest.importorskip("torch")
    p = problem(3)
    kind = getattr(torch, dtype)
    h, w, b = (torch.from_numpy(p[k]).to(kind) for k in ("hidden", "weight", "bias"))
    options = {
        "rule": "maskgit",
        "mask_token_id": MASK,
        "step": 0,
        "num_steps": 4,
        "seeds": torch.from_numpy(p["seeds"]),
    }
    tokens = torch.from_numpy(p["tokens"])
    out = maskgit.decode_step_from_hidden(h, w, tokens, head_bias=b, **options)
    full = maskgit.decode_step(torch.nn.functional.linear(h, w, b), tokens, **options)
    assert (out.next_tokens == full.next_tokens).float().mean() > 0.95


@pytest.mark.parametrize("backend", ["reference", "cpp", "torch"])
def test_a_dead_row_does_not_use_up_the_quota(backend):
    if backend not in ("reference", *BACKENDS):
        pytest.skip(f"{backend} cannot run here")
    torch = pytest.importorskip("torch")
    hidden, weight, tokens = torch.ones(1, 2, 3), torch.eye(3), torch.full((1, 2), 3)
    hidden[0, 0] = torch.nan
    rule = StepRule(score="given", count="quota", sample_temperature=0.0)
    options = {"rule": rule, "mask_token_id": 3, "step": 0, "num_steps": 2, "backend": backend}
    options["scores"] = torch.tensor([[2.0, 1.0]])
    out = maskgit.decode_step_from_hidden(hidden, weight, tokens, **options)
    full = maskgit.decode_step(hidden @ weight.T, tokens, **options)
    assert out.next_tokens.tolist() == full.next_tokens.tolist() == [[3, 0]]


def test_empty_batches_and_known_rows():
    p = problem()
    for tokens in (p["tokens"][:0], np.where(p["tokens"] == MASK, 1, p["tokens"])):
        out = maskgit.decode_step_from_hidden(
            p["hidden"][: len(tokens)], p["weight"], tokens, rule="llada", mask_token_id=MASK,
            step=0, num_steps=2,
        )  # fmt: skip
        np.testing.assert_array_equal(out.next_tokens, tokens)


def test_no_full_logits_and_no_head_for_other_rows():
    """512 rows of 40,000 columns are 80 MB of logits; the step may use a quarter of it."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1, 512, 4)).astype(np.float32)
    weight = rng.normal(size=(40_000, 4)).astype(np.float32)
    tokens = np.full((1, 512), 40_000)
    options = {"rule": "maskgit", "mask_token_id": 40_000, "step": 0, "num_steps": 4, "seeds": [1]}
    saved = chunked.LOGITS_PER_CHUNK
    chunked.LOGITS_PER_CHUNK = 1 << 21
    try:
        tracemalloc.start()
        maskgit.decode_step_from_hidden(hidden, weight, tokens, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        chunked.LOGITS_PER_CHUNK = saved
    assert peak < 20e6, f"{peak / 1e6:.0f} MB"


def test_bad_arguments():
    p = problem()
    good = {"rule": "llada", "mask_token_id": MASK, "step": 0, "num_steps": 2}
    bad = {
        "hidden: expected a torch": ({"hidden": [[1.0]]}, {}),
        r"hidden: expected shape \(B, N, D\)": ({"hidden": p["hidden"][0]}, {}),
        "hidden: expected dtype": ({"hidden": p["hidden"].astype(np.int64)}, {}),
        r"head_weight: expected shape \(V, 8\)": ({"weight": p["weight"][:, :5]}, {}),
        "head_weight: expected dtype float32": ({"weight": p["weight"].astype(np.float16)}, {}),
        r"head_bias: expected shape \(300,\)": ({}, {"head_bias": p["bias"][:4]}),
        "guidance_scale: expected together with uncond_hidden, got None": (
            {},
            {"uncond_hidden": p["uncond"]},
        ),
        "uncond_hidden: expected together with guidance_scale, got None": (
            {},
            {"guidance_scale": 2.0},
        ),
        "tokens: expected a numpy array like the others, got list": ({"tokens": [[1]]}, {}),
        "uncond_hidden: expected shape": (
            {},
            {"uncond_hidden": p["uncond"][:1], "guidance_scale": 2.0},
        ),
        "rule: vocab_slice": ({}, {"rule": StepRule(vocab_slice=(0, 999), sample_temperature=0.0)}),
        "backend: ": ({}, {"backend": "nothing"}),
        "seeds: expected": ({}, {"rule": "maskgit"}),
    }
    for message, (arrays, options) in bad.items():
        x = {**p, **arrays}
        with pytest.raises((ValueError, TypeError), match=message):
            maskgit.decode_step_from_hidden(
                x["hidden"], x["weight"], x["tokens"], **{**good, **options}
            )


def test_one_node_of_a_compiled_graph():
    torch = pytest.importorskip("torch")
    p = {k: torch.from_numpy(v) for k, v in problem().items()}

    def call(hidden, weight, tokens):
        return maskgit.decode_step_from_hidden(
            hidden, weight, tokens, rule="llada", mask_token_id=MASK, step=0, num_steps=2
        )

    args = p["hidden"], p["weight"], p["tokens"]
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*args)
    for a, b in zip(got, call(*args), strict=True):
        assert torch.equal(a, b)


def test_jax_traces():
    jax = pytest.importorskip("jax")
    p = problem()
    x = {k: native(v, "jax") for k, v in p.items() if k != "seeds"}
    words = native_seeds(p["seeds"], "jax")

    @jax.jit
    def call(hidden, weight, tokens, seeds):
        return maskgit.decode_step_from_hidden(
            hidden, weight, tokens, rule="maskgit", mask_token_id=MASK, step=1, num_steps=4,
            seeds=seeds, num_masked_at_start=tokens.shape[1], backend="jax",
        )  # fmt: skip

    got = call(x["hidden"], x["weight"], x["tokens"], words)
    want = maskgit.decode_step_from_hidden(
        p["hidden"], p["weight"], p["tokens"], rule="maskgit", mask_token_id=MASK, step=1,
        num_steps=4, seeds=p["seeds"], num_masked_at_start=p["tokens"].shape[1], backend="reference",
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(got.next_tokens), want.next_tokens)


def options_for(rule, p, kind):
    """What a step by any rule needs besides its arrays."""
    options = {"rule": rule, "mask_token_id": MASK, "step": 0, "num_steps": 4}
    options["seeds"] = native_seeds(p["seeds"], kind)
    if rule.score == "given":
        options["scores"] = native(p["scores"], kind)
    if rule.count == "given":
        options["num_commit"] = 2
    return options


@pytest.mark.parametrize("backend", ["auto", *ALL])
def test_parameters_of_a_module(backend):
    torch = pytest.importorskip("torch")
    head, hidden, tokens = torch.nn.Linear(8, 300), torch.randn(2, 6, 8), torch.full((2, 6), MASK)
    options = {"rule": "llada", "mask_token_id": MASK, "num_steps": 4, "backend": backend}
    given = {"head_weight": head.weight, "head_bias": head.bias}
    out = maskgit.decode_step_from_hidden(hidden, tokens=tokens, step=0, **given, **options)
    with torch.no_grad():
        want = maskgit.decode_step(head(hidden), tokens, step=0, **options)
    assert torch.equal(out.next_tokens, want.next_tokens)
    assert not out.confidence.requires_grad
    done = maskgit.generate(lambda t: hidden, tokens, record=True, **given, **options)
    assert (done.tokens < MASK).all()
    wants_grad = hidden.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"^hidden: decoding has no gradient"):
        maskgit.decode_step_from_hidden(wants_grad, tokens=tokens, step=0, **given, **options)


FIRST = ["mdlm", "bd3lm", "md4", "random", "dream-origin", "halton", "remdm-cap"]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", FIRST)
def test_a_row_that_is_not_drawn_is_not_dead(name, backend, monkeypatch):
    kind, rule, p = kind_for(backend, "float32"), StepRule.preset(name), problem(4)
    weight, tokens = native(p["weight"], kind), native(p["tokens"], kind)
    options = options_for(rule, p, kind) | {"backend": backend}

    def step(hidden, **more):
        hidden = native(hidden, kind)
        return maskgit.decode_step_from_hidden(hidden, weight, tokens, **options, **more)

    out = step(p["hidden"], check=True)
    drawn = (np.asarray(out.next_tokens) != MASK) & (p["tokens"] == MASK)
    assert drawn.any()
    if rule.count == "bernoulli":  # what is not drawn may be anything
        monkeypatch.setenv("MASKGIT_CHECK", "1")
        step(np.where(drawn[..., None], p["hidden"], np.nan).astype(np.float32))
    b, n = np.argwhere(drawn)[-1]
    hidden = p["hidden"].copy()
    hidden[b, n] = np.nan
    with pytest.raises(ValueError, match=rf"hidden: .* in row \(sequence {b}, position {n}\)"):
        step(hidden, check=True)


@pytest.mark.parametrize("name", FIRST)
def test_the_loop_with_checks_on(name, monkeypatch):
    monkeypatch.setenv("MASKGIT_CHECK", "1")
    rule, p = StepRule.preset(name), problem(5)
    given = {"num_commit": [3] * 4} if rule.count == "given" else {}
    given |= {"scores": p["scores"]} if rule.score == "given" else {}
    for record in (False, True):
        maskgit.generate(
            lambda t: p["hidden"], np.full_like(p["tokens"], MASK), head_weight=p["weight"],
            rule=rule, mask_token_id=MASK, num_steps=4, seeds=p["seeds"], record=record, **given,
        )  # fmt: skip


@pytest.fixture
def products(monkeypatch):
    """The shapes (rows, V) of the products that the head forms."""
    shapes, product = [], chunked._product

    def counted(rows, weight, bias):
        shapes.append((rows.shape[0], weight.shape[0]))
        return product(rows, weight, bias)

    monkeypatch.setattr(chunked, "_product", counted)
    return shapes


@pytest.mark.parametrize("backend", [b for b in ALL if b != "triton"])  # whose head is fused
def test_only_rows_that_take_part_go_through_the_head(backend, products):
    kind = kind_for(backend, "float32")
    p = problem(6, batch=1, length=64)
    tokens = np.full((1, 64), 3)
    tokens[0, [4, 9, 20, 21, 63]] = MASK
    arrays = [native(a, kind) for a in (p["hidden"], p["weight"], tokens)]
    for name, wanted in (("llada", 5), ("maskgit", 5), ("bd3lm", 2)):
        products.clear()
        options = options_for(StepRule.preset(name), p, kind) | {"backend": backend}
        maskgit.decode_step_from_hidden(*arrays, **options)
        if kind == "jax":  # up to a power of two
            wanted = 1 << (wanted - 1).bit_length()
        assert [rows for rows, _ in products] == [wanted]


def test_few_programs_on_jax_and_all_rows_in_a_trace(products):
    jax = pytest.importorskip("jax")
    p = problem(7, batch=1, length=40)
    hidden, weight = native(p["hidden"], "jax"), native(p["weight"], "jax")

    def step(hidden, tokens):
        options = {"rule": "llada", "mask_token_id": MASK, "step": 0, "num_steps": 2}
        return maskgit.decode_step_from_hidden(hidden, weight, tokens, backend="jax", **options)

    for masked in range(1, 41):
        tokens = np.full((1, 40), 3)
        tokens[0, :masked] = MASK
        step(hidden, native(tokens, "jax"))
    assert {rows for rows, _ in products} == {1, 2, 4, 8, 16, 32, 40}
    products.clear()
    traced = jax.jit(step)(hidden, native(tokens, "jax"))
    assert [rows for rows, _ in products] == [40]
    for a, b in zip(traced, step(hidden, native(tokens, "jax")), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_product_is_larger_than_the_limit(backend, products):
    kind, rng = kind_for(backend, "float32"), np.random.default_rng(8)
    vocab, length = 1 << 13, 1200  # 9.8 million logits
    hidden = native(rng.normal(size=(1, length, 2)).astype(np.float32), kind)
    weight = native(rng.normal(size=(vocab, 2)).astype(np.float32), kind)
    maskgit.decode_step_from_hidden(
        hidden, weight, native(np.full((1, length), vocab), kind), rule="llada",
        mask_token_id=vocab, step=0, num_steps=2, backend=backend,
    )  # fmt: skip
    assert sum(rows for rows, _ in products) >= length
    assert max(rows * v for rows, v in products) <= 2**23


def test_rows_that_may_not_be_counted_take_no_numbers_from_the_host(monkeypatch):
    """As on an accelerator: a copy of a row's number, or of a count, would break the capture of a graph."""
    torch = pytest.importorskip("torch")
    given = problem()
    names = ("hidden", "weight", "tokens", "seeds")
    hidden, weight, tokens, seeds = (torch.from_numpy(given[name]) for name in names)
    options = {"mask_token_id": MASK, "step": 1, "num_steps": 4, "seeds": seeds, "backend": "torch"}
    options["rule"] = dataclasses.replace(StepRule.preset("maskgit"), count="given")
    want = maskgit.decode_step_from_hidden(hidden, weight, tokens, num_commit=2, **options)
    monkeypatch.setattr(chunked, "_row_numbers", lambda wanted: None)
    monkeypatch.setattr(chunked, "LOGITS_PER_CHUNK", 1500)
    seen, call = [], chunked.dispatch.call

    def watched(name, x, *more):
        seen.extend([x.num_masked_at_start, x.positions] if name == "sample_tokens" else [])
        return call(name, x, *more)

    monkeypatch.setattr(chunked.dispatch, "call", watched)
    monkeypatch.setattr(torch, "as_tensor", None)
    got = maskgit.decode_step_from_hidden(hidden, weight, tokens, num_commit=2, **options)
    assert torch.equal(got.next_tokens, want.next_tokens)
    torch.testing.assert_close(got.confidence, want.confidence)
    assert len(seen) > 4
    assert all(isinstance(array, torch.Tensor) for array in seen)
