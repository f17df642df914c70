"""Layouts: the views share memory, and what is decoded through them is what copies decode."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS
from helpers import kind_for, make_case, native, native_seeds

import maskgit
from maskgit import StepNoise, StepRule, layouts

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
KINDS = [
    kind
    for kind, backend in (("numpy", "reference"), ("torch", "torch"), ("jax", "jax"))
    if backend in BACKENDS
]
RNG = np.random.default_rng(0)


def kind_of(backend, dtype="float32"):
    kind = {"torch": "torch", "jax": "jax"}.get(backend, "numpy")
    return "torch" if kind == "numpy" and dtype == "bfloat16" else kind


def shares(a, b):
    """Whether two arrays lie in the same memory; jax does not say."""
    if isinstance(a, np.ndarray):
        return np.shares_memory(a, b)
    if hasattr(a, "untyped_storage"):
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return True


def same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), name)
        assert x.dtype == y.dtype


# ---------------------------------------------------------------------------------------------
# views


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 7, 3, 4), (2, 7, 12)])
def test_v_major_is_a_view(kind, shape):
    x = native(RNG.normal(size=shape).astype(np.float32), kind)
    out = layouts.from_v_major(x)
    assert shares(x, out)
    wanted = np.moveaxis(np.asarray(x), 1, -1).reshape(2, 12, 7)
    np.testing.assert_array_equal(np.asarray(out), wanted)


def test_channels_last_is_a_view_too_and_a_crop_a_copy():
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 7, 3, 4).to(memory_format=torch.channels_last)
    out = layouts.from_v_major(x)
    assert shares(x, out)
    assert out.is_contiguous()
    crop = x[:, :, :, 1:]
    assert torch.equal(layouts.from_v_major(crop), crop.flatten(2).mT)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(b, "float32") for b in BACKENDS] + [(b, "bfloat16") for b in BACKENDS if b != "jax"],
)
def test_v_major_decodes_as_its_copy(name, dtype):
    kind = kind_of(name, dtype)
    logits = native(RNG.normal(size=(2, 40, 3, 4)).astype(np.float32), kind, dtype)
    view = layouts.from_v_major(logits)
    copied = view.contiguous() if kind == "torch" else native(np.asarray(view).copy(), kind)
    tokens = native(np.full((2, 12), 40), kind)
    a, b = (
        maskgit.decode_step(x, tokens, rule="amused", mask_token_id=40, step=1, num_steps=6,
                            seeds=[3, 4], backend=name)
        for x in (view, copied)
    )  # fmt: skip
    for one, other in zip(a[:2], b[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    # torch adds up a strided row in another order
    np.testing.assert_allclose(
        np.asarray(a.confidence), np.asarray(b.confidence), rtol=1e-6, atol=4e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_grids_factors_and_levels_are_views(kind):
    tokens = native(np.arange(24).reshape(2, 12), kind)
    grid = layouts.to_grid(tokens, 3, 4)
    assert shares(tokens, grid)
    np.testing.assert_array_equal(np.asarray(grid), np.arange(24).reshape(2, 3, 4))

    x = native(RNG.normal(size=(2, 5, 3, 7)).astype(np.float32), kind)
    flat = layouts.flatten_factors(x)
    assert tuple(flat.shape) == (2, 15, 7)
    assert shares(x, flat)
    back = layouts.unflatten_factors(flat, 3)
    np.testing.assert_array_equal(np.asarray(back), np.asarray(x))
    ids = native(np.arange(30).reshape(2, 5, 3), kind)
    assert tuple(layouts.flatten_factors(ids).shape) == (2, 15)
    np.testing.assert_array_equal(
        np.asarray(layouts.unflatten_factors(layouts.flatten_factors(ids), 3)), np.asarray(ids)
    )

    for axis, shape in ((1, (2, 3, 5)), (2, (2, 5, 3))):
        logits = native(RNG.normal(size=(*shape, 7)).astype(np.float32), kind)
        tokens = native(np.arange(30).reshape(shape), kind)
        level_logits, level_tokens = layouts.rvq_level(logits, tokens, 1, axis=axis)
        assert shares(logits, level_logits)
        assert shares(tokens, level_tokens)
        np.testing.assert_array_equal(
            np.asarray(level_logits), np.take(np.asarray(logits), 1, axis)
        )
        np.testing.assert_array_equal(
            np.asarray(level_tokens), np.take(np.asarray(tokens), 1, axis)
        )
        changed = np.asarray(layouts.with_level(tokens, 1, level_tokens * 0 - 1, axis=axis))
        assert (np.take(changed, 1, axis) == -1).all()
        for level in (0, 2):
            np.testing.assert_array_equal(
                np.take(changed, level, axis), np.take(np.asarray(tokens), level, axis)
            )
        np.testing.assert_array_equal(np.asarray(tokens), np.arange(30).reshape(shape))


@pytest.mark.parametrize("name", BACKENDS)
def test_one_level_decodes_as_its_copy(name):
    kind = kind_of(name)
    logits = RNG.normal(size=(2, 3, 8, 20)).astype(np.float32)
    tokens = np.where(RNG.random((2, 3, 8)) < 0.6, 20, 4)
    views = layouts.rvq_level(native(logits, kind), native(tokens, kind), 2)
    copies = native(logits[:, 2].copy(), kind), native(tokens[:, 2].copy(), kind)
    same(*(
        maskgit.decode_step(*x, rule="vampnet", mask_token_id=20, step=0, num_steps=4,
                            seeds=[3, 4], backend=name)
        for x in (views, copies)
    ))  # fmt: skip


# ---------------------------------------------------------------------------------------------
# pairs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pairs_of_factors(kind, dtype):
    slow, fast = (RNG.normal(size=(2, 5, size)).astype(dtype) for size in (6, 4))
    pair = np.asarray(layouts.pair_factors(native(slow, kind), native(fast, kind)))
    assert pair.shape == (2, 5, 24)
    assert pair.dtype == np.float32
    for a in range(6):
        for b in range(4):
            wanted = slow[..., a].astype(np.float32) + fast[..., b].astype(np.float32)
            np.testing.assert_array_equal(pair[..., a * 4 + b], wanted)
    a, b = layouts.split_pairs(native(pair.argmax(-1), kind), 4)
    np.testing.assert_array_equal(np.asarray(a), slow.argmax(-1))
    np.testing.assert_array_equal(np.asarray(b), fast.argmax(-1))
    a, b = layouts.split_pairs(native(np.array([[-1, 23]]), kind), 4)
    assert (np.asarray(a).tolist(), np.asarray(b).tolist()) == ([[-1, 5]], [[-1, 3]])


def test_the_probability_of_a_pair_is_the_product():
    slow, fast = (RNG.normal(size=(2, 5, 6)).astype(np.float32) for _ in range(2))
    noise = [RNG.gumbel(size=(2, 5, 6)).astype(np.float32) for _ in range(2)]
    rule = dataclasses.replace(StepRule(), score="prob")
    one = maskgit.sample_tokens(
        layouts.pair_factors(slow, fast), rule=rule, noise=StepNoise(layouts.pair_factors(*noise))
    )
    parts = [
        maskgit.sample_tokens(x, rule=rule, noise=StepNoise(g))
        for x, g in zip((slow, fast), noise, strict=True)
    ]
    for got, part in zip(layouts.split_pairs(one.candidate_tokens, 6), parts, strict=True):
        np.testing.assert_array_equal(got, part.candidate_tokens)
    np.testing.assert_allclose(one.confidence, parts[0].confidence * parts[1].confidence, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# shifted logits


def shifted(x):
    """The copy that is to be spared."""
    return np.concatenate([x[:, :1], x[:, :-1]], 1)


def shift_case(rule, dtype, **options):
    """Arguments of a decode step of this rule, with known tokens, in NumPy."""
    case = make_case(rule, dtype=dtype, vocab=64, length=17, seed=5, **options)
    rng = np.random.default_rng(9)
    extra = {"eligible": rng.random(case.tokens.shape) < 0.9}
    extra["positions"] = np.arange(17)[None] + np.array([[3], [40]])
    if rule.score == "given":
        extra["scores"] = rng.normal(size=case.tokens.shape).astype(np.float32)
    if rule.count == "given":
        extra["num_commit"] = np.array([3, 5])
    return case, extra


def check_shift(rule, backend, dtype, **options):
    case, extra = shift_case(rule, dtype, **options)
    kind = kind_of(backend, dtype)
    noise = None
    if case.token_gumbel is not None:
        noise = StepNoise(native(case.token_gumbel, kind), native(case.choice_gumbel, kind))
    same_for_both = {
        "rule": rule, "mask_token_id": case.mask_token_id, "step": case.step,
        "num_steps": case.num_steps, "seeds": native_seeds(case.seeds, kind), "noise": noise,
        "num_masked_at_start": native(case.num_masked_at_start, kind),
        "guidance_scale": case.guidance_scale, "backend": backend,
    } | {name: native(array, kind) for name, array in extra.items()}  # fmt: skip
    tokens = native(case.tokens, kind)
    logits = native(case.logits, kind, dtype)
    uncond = native(case.uncond_logits, kind, dtype)
    expected = maskgit.decode_step(
        native(shifted(case.logits), kind, dtype), tokens,
        uncond_logits=None if uncond is None else native(shifted(case.uncond_logits), kind, dtype),
        **same_for_both,
    )  # fmt: skip
    got = layouts.decode_shifted(logits, tokens, uncond_logits=uncond, **same_for_both)
    same(got, expected)


@pytest.mark.parametrize("name", StepRule.presets())
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, "float32") for b in BACKENDS if b != "jax"]
    + [(b, "bfloat16") for b in BACKENDS if b in ("cpp", "torch")],
)
def test_shifted_rows_decode_as_a_shifted_copy(name, backend, dtype):
    check_shift(StepRule.preset(name), backend, dtype)


@pytest.mark.parametrize("name", ["dream-entropy", "titok", "threshold"])
@pytest.mark.skipif("jax" not in BACKENDS, reason="jax is not installed")
def test_shifted_rows_in_jax(name):
    check_shift(StepRule.preset(name), "jax", "float32")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "jax"])
@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "dream-maskgit-plus", "sample_temperature": 0.7},
        {"preset": "maskgit", "sample_anneal": "linear", "score_temperature": None},
        {"preset": "llada", "skip_mask_token": True},
        {"preset": "llada2-edit", "edit_threshold": 0.1, "choice_temperature": 1.0},
        {"preset": "threshold", "score_dtype": "logits", "threshold": 0.2},
        {"preset": "dinfer-hierarchy", "score_dtype": "logits", "low_threshold": 0.1},
        {"preset": "muse", "greedy_last": True, "filters": ("top_k",), "top_k": 4},
    ],
    ids=lambda c: c["preset"],
)
@pytest.mark.parametrize("options", [{"noise": "injected"}, {"guidance": 2.0}, {"step": 7}])
def test_shifted_rows_of_other_rules(backend, changes, options):
    fields = {k: v for k, v in changes.items() if k != "preset"}
    rule = dataclasses.replace(StepRule.preset(changes["preset"]), **fields)
    check_shift(rule, backend, "bfloat16" if backend != "reference" else "float32", **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shifted_rows_without_a_finite_logit(backend):
    kind = kind_of(backend)
    logits = RNG.normal(size=(1, 5, 6)).astype(np.float32)
    logits[0, 2] = -np.inf  # predicts position 3
    tokens = np.full((1, 5), 6)
    options = {"rule": "llada", "mask_token_id": 6, "step": 0, "num_steps": 1, "backend": backend}
    same(
        layouts.decode_shifted(native(logits, kind), native(tokens, kind), **options),
        maskgit.decode_step(native(shifted(logits), kind), native(tokens, kind), **options),
    )
    with pytest.raises(ValueError, match="position 3"):
        layouts.decode_shifted(native(logits, kind), native(tokens, kind), check=True, **options)


def test_one_position_can_be_shifted():
    logits, tokens = RNG.normal(size=(2, 1, 6)).astype(np.float32), np.full((2, 1), 6)
    options = {"rule": "llada", "mask_token_id": 6, "step": 0, "num_steps": 1}
    same(
        layouts.decode_shifted(logits, tokens, **options),
        maskgit.decode_step(logits, tokens, **options),
    )


def test_the_logits_are_not_copied(monkeypatch):
    logits, tokens = RNG.normal(size=(2, 9, 6)).astype(np.float32), np.full((2, 9), 6)
    seen = []
    inner = layouts.steps.decode_step

    def watching(part, *args, **kwargs):
        seen.append(part)
        return inner(part, *args, **kwargs)

    monkeypatch.setattr(layouts.steps, "decode_step", watching)
    layouts.decode_shifted(logits, tokens, rule="llada", mask_token_id=6, step=0, num_steps=3)
    assert [part.shape[1] for part in seen] == [1, 8]
    assert all(np.shares_memory(part, logits) for part in seen)


# ---------------------------------------------------------------------------------------------
# spans

RULES = json.loads((GOLDEN / "rules.json").read_text())
SPANS = sorted(
    name for name, rule in RULES.items() if "layout" in rule and rule["layout"] == "spans"
)


def test_the_recordings_are_there():
    assert {"magnet", "magnet-product", "magnet-prompt"} <= set(SPANS)


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_spans_are_those_of_the_codebase_itself(name, backend):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        golden = {key: file[key] for key in file.files}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in RULES[name].items()}
    span, reduce = fields.pop("span"), fields.pop("reduce")
    fields.pop("layout")
    rule = dataclasses.replace(StepRule.preset(fields.pop("preset")), **fields)
    kind = kind_of(backend)
    for s in range(len(golden["step"])):
        out = layouts.decode_spans(
            native(golden["logits"][s], kind), native(golden["tokens"][s], kind),
            span=span, reduce=reduce, rule=rule,
            mask_token_id=json.loads(str(golden["meta"]))["mask_token_id"],
            step=int(golden["step"][s]), num_steps=int(golden["num_steps"][s]),
            num_masked_at_start=native(golden["num_masked_at_start"][s] // span, kind),
            noise=StepNoise(native(golden["token_gumbel"][s], kind)), backend=backend,
        )  # fmt: skip
        np.testing.assert_array_equal(np.asarray(out.next_tokens), golden["expected"][s], f"{s}")


@pytest.mark.parametrize(
    ("backend", "preset"),
    [
        (backend, preset)
        for backend in BACKENDS
        for preset in ["maskgit", "magnet", "titok", "random", "threshold"]
        if backend != "jax" or preset in ("magnet", "maskgit")  # a few programs are enough
    ],
)
def test_spans_of_one_position_are_a_plain_step(backend, preset):
    kind = kind_of(backend)
    case = make_case(StepRule.preset(preset), vocab=40, length=12, seed=3)
    options = {
        "rule": case.rule, "mask_token_id": case.mask_token_id, "step": 2, "num_steps": 8,
        "seeds": native_seeds(case.seeds, kind), "backend": backend,
        "num_masked_at_start": native(case.num_masked_at_start, kind),
        "eligible": native(RNG.random((2, 12)) < 0.8, kind),
    }  # fmt: skip
    arrays = native(case.logits, kind), native(case.tokens, kind)
    for reduce in ("max", "sum"):
        same(
            layouts.decode_spans(*arrays, span=1, reduce=reduce, **options),
            maskgit.decode_step(*arrays, **options),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_whole_spans_are_committed_and_known_tokens_stay(kind):
    logits = RNG.normal(size=(2, 12, 9)).astype(np.float32) * 3
    tokens = np.full((2, 12), 9)
    tokens[0, 4] = 2  # known inside a span
    tokens[1, 0:3] = [5, 6, 7]
    logits[0, 8] = np.nan  # nothing can be drawn here
    eligible = np.ones((2, 12), bool)
    eligible[1, 9:] = False
    out = layouts.decode_spans(
        native(logits, kind), native(tokens, kind), span=3, rule="llada", mask_token_id=9, step=0,
        num_steps=2, eligible=native(eligible, kind),
    )  # fmt: skip
    after, filled, confidence = (np.asarray(x) for x in out)
    masked = tokens == 9
    assert (after[~masked] == tokens[~masked]).all()
    assert np.isposinf(confidence[~masked]).all()
    assert np.isneginf(confidence[1, 9:]).all()
    assert (after[1, 9:] == 9).all()
    assert filled[0, 8] == after[0, 8] == 9
    best = np.where(masked & eligible, np.exp(logits - 0).max(-1) / np.exp(logits).sum(-1), -np.inf)
    score = np.nanmax(best.reshape(2, 4, 3), -1)
    for b, commits in ((0, 2), (1, 1)):  # four open spans and two
        wanted = np.zeros(4, bool)
        wanted[np.argsort(-score[b])[:commits]] = True
        drawable = masked[b] & eligible[b] & ~np.isnan(logits[b, :, 0])
        np.testing.assert_array_equal((after[b] != 9) & masked[b], np.repeat(wanted, 3) & drawable)
    groups = confidence[0].reshape(4, 3)
    assert (groups[[0, 3]] == groups[[0, 3], :1]).all()


def test_spans_refuse():
    logits, tokens = np.zeros((1, 6, 4), np.float32), np.full((1, 6), 4)
    options = {"mask_token_id": 4, "step": 0, "num_steps": 2}
    for changes, words in (
        ({"span": 4, "rule": "llada"}, "span: expected a divisor of the 6"),
        ({"span": 0, "rule": "llada"}, "span: expected an integer >= 1, got 0"),
        ({"span": 2, "rule": "llada", "reduce": "mean"}, "reduce: expected max or sum"),
        ({"span": 2, "rule": "llada2-edit"}, "keeps known tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            layouts.decode_spans(logits, tokens, **options, **changes)


# ---------------------------------------------------------------------------------------------
# ragged batches


@pytest.mark.parametrize("kind", ["list", *KINDS])
def test_pad_left(kind):
    prompts = [[5, 6, 7], [8], []]
    if kind != "list":
        prompts = [native(np.array(p, np.int32), kind) for p in prompts]
    batch = layouts.pad_left(prompts, 0, num_new=2, mask_token_id=9)
    assert np.asarray(batch.tokens).tolist() == [[5, 6, 7, 9, 9], [0, 0, 8, 9, 9], [0, 0, 0, 9, 9]]
    assert np.asarray(batch.eligible).astype(int).tolist() == [
        [1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
    ]
    assert np.asarray(batch.positions).tolist() == [
        [0, 1, 2, 3, 4],
        [0, 0, 0, 1, 2],
        [0, 0, 0, 0, 1],
    ]
    assert (
        type(batch.tokens)
        .__module__.split(".")[0]
        .startswith("numpy" if kind in ("list", "numpy") else kind)
    )


@pytest.mark.parametrize("rule", ["maskgit", "llada-fixed", "random", "mdlm"])
def test_a_padded_row_draws_what_it_draws_alone(rule):
    prompts, vocab, new, seeds = [[1, 2, 3, 4], [5, 6]], 20, 8, [11, 12]
    table = RNG.normal(size=(vocab + 1, 32, vocab)).astype(np.float32)

    def model(positions):
        return lambda tokens: table[tokens, positions]

    options = {"rule": rule, "mask_token_id": vocab, "num_steps": 4}
    batch = layouts.pad_left(prompts, 0, num_new=new, mask_token_id=vocab)
    together = maskgit.generate(
        model(batch.positions), batch.tokens, seeds=seeds, eligible=batch.eligible,
        positions=batch.positions, **options,
    ).tokens  # fmt: skip
    for i, prompt in enumerate(prompts):
        alone = np.array([prompt + [vocab] * new])
        out = maskgit.generate(
            model(np.arange(alone.shape[1])[None]), alone, seeds=seeds[i : i + 1], **options
        ).tokens
        np.testing.assert_array_equal(together[i, -alone.shape[1] :], out[0])


# ---------------------------------------------------------------------------------------------
# errors, documents

LOGITS, TOKENS = np.zeros((2, 6, 4), np.float32), np.zeros((2, 6), np.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: layouts.from_v_major([1]), TypeError, "logits: expected a torch, jax or NumPy"),
        (lambda: layouts.from_v_major(TOKENS), ValueError, r"\(B, V, N\) or \(B, V, H, W\)"),
        (lambda: layouts.to_grid(TOKENS, 4, 2), ValueError, r"shape \(B, 8\) for a grid of 4 x 2"),
        (lambda: layouts.flatten_factors(TOKENS), ValueError, r"\(B, N, F\)"),
        (lambda: layouts.unflatten_factors(TOKENS, 4), ValueError, r"N \* 4"),
        (lambda: layouts.pair_factors(LOGITS, LOGITS[:1]), ValueError, "fast: expected shape"),
        (lambda: layouts.pair_factors(TOKENS, LOGITS), ValueError, "slow: expected shape"),
        (lambda: layouts.pair_factors(LOGITS.astype(int), LOGITS), TypeError, "slow: expected float"),
        (lambda: layouts.split_pairs(TOKENS, 0), ValueError, "fast_size"),
        (lambda: layouts.split_pairs(LOGITS, 2), TypeError, "expected integers"),
        (lambda: layouts.rvq_level(LOGITS, TOKENS, 0), ValueError, r"\(B, Q, N, V\)"),
        (lambda: layouts.rvq_level(LOGITS[None], TOKENS[None], 2), ValueError, r"level: .* \[0, 2\)"),
        (lambda: layouts.rvq_level(LOGITS[None], TOKENS[None], 0, axis=3), ValueError, "axis"),
        (lambda: layouts.with_level(TOKENS[None], 0, TOKENS), ValueError, "level_tokens: expected shape"),
        (lambda: layouts.pad_left([], 0), ValueError, "at least one"),
        (lambda: layouts.pad_left([[1.5]], 0), TypeError, r"prompts\[0\]: expected integers"),
        (lambda: layouts.pad_left([[[1]]], 0), ValueError, r"prompts\[0\]: expected one dimension"),
        (lambda: layouts.pad_left([[1]], 0, num_new=2), ValueError, "mask_token_id"),
        (lambda: layouts.pad_left([[1]], 3, num_new=2, mask_token_id=3), ValueError, "pad_id"),
        (lambda: layouts.decode_shifted(LOGITS, TOKENS[:, :5], rule="llada", mask_token_id=4, step=0,
                                        num_steps=1), ValueError, "tokens: expected shape"),
        (lambda: layouts.decode_shifted(LOGITS, TOKENS, rule="llada", mask_token_id=4, step=0,
                                        num_steps=1, eligible=TOKENS[:1] > 0),
         ValueError, "eligible: expected shape"),
    ],
)  # fmt: skip
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_wrong_numbers_have_one_message():
    ids, logits = np.zeros((1, 6), int), np.zeros((1, 6, 4), np.float32)
    step = {"rule": "llada", "mask_token_id": 4, "step": 0, "num_steps": 2}
    for call, words in (
        (lambda: layouts.unflatten_factors(ids, "2"), "factors: expected an integer >= 1, got '2'"),
        (lambda: layouts.split_pairs(ids, 2.0), "fast_size: expected an integer >= 1, got 2.0"),
        (lambda: layouts.to_grid(ids, 2.0, 3), "height: expected an integer >= 0, got 2.0"),
        (lambda: layouts.pad_left([[1]], 0, num_new=None), "num_new: expected an integer >= 0"),
        (lambda: layouts.pad_left([[1]], None), "pad_id: expected an integer, got None"),
        (lambda: layouts.with_level(ids[:, None], 1.0, ids), "level: expected an integer, got 1.0"),
        (lambda: layouts.decode_spans(logits, ids, span=True, **step), "span: expected an integer"),
        (
            lambda: layouts.decode_spans(logits, ids, span=2, noise=5, **step),
            "noise: expected a St",
        ),
        (lambda: layouts.decode_shifted(logits, ids, noise=(1, 2), **step), "noise: expected a St"),
        (lambda: maskgit.audit_ties(logits, rule="llada", noise=5), "noise: expected a StepNoise"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_spans_draw_at_the_places_that_are_given(backend):
    """The last two spans of a row, at their places, draw what they draw in the whole row."""
    kind, rng = kind_for(backend, "float32"), np.random.default_rng(9)
    logits = rng.normal(size=(2, 12, 30)).astype(np.float32)
    tokens, places = np.full((2, 12), 30), np.tile(np.arange(12), (2, 1))
    rule = StepRule(count="quota", choice_temperature=2.0)

    def step(part, *, where=True):
        cut = [native(np.ascontiguousarray(a[:, part]), kind) for a in (logits, tokens, places)]
        out = layouts.decode_spans(
            cut[0], cut[1], span=3, rule=rule, mask_token_id=30, step=0, num_steps=1,
            seeds=native_seeds(np.arange(2), kind), positions=cut[2] if where else None,
            backend=backend,
        )  # fmt: skip
        return [np.asarray(x) for x in out]

    whole, piece = step(slice(None)), step(slice(6, None))
    for a, b in zip(whole, piece, strict=True):
        np.testing.assert_array_equal(a[:, 6:], b)
    assert (step(slice(6, None), where=False)[1] != piece[1]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["shifted", "spans"])
def test_numbers_in_place_of_the_rules(op, backend):
    kind, rng = kind_for(backend, "float32"), np.random.default_rng(4)
    logits = native(rng.normal(size=(2, 12, 30)).astype(np.float32) * 2, kind)
    tokens, seeds = native(np.full((2, 12), 30), kind), native_seeds(np.arange(2), kind)
    call = {"shifted": layouts.decode_shifted, "spans": layouts.decode_spans}[op]
    more = {"span": 3} if op == "spans" else {}
    rule = StepRule(count="threshold", threshold=0.9, score="prob")

    def step(rule, **numbers):
        out = call(
            logits, tokens, rule=rule, mask_token_id=30, step=0, num_steps=4, seeds=seeds,
            backend=backend, **more, **numbers,
        )  # fmt: skip
        return [np.asarray(x) for x in out]

    plain = step(rule)
    for given, changes in (
        ({"temperature": 0.2}, {"sample_temperature": 0.2}),
        ({"threshold": np.float32(0.125)}, {"threshold": 0.125}),
        ({"temperature": 3.0, "threshold": 0.0625}, {"sample_temperature": 3.0, "threshold": 0.0625}),
    ):  # fmt: skip
        got, want = step(rule, **given), step(dataclasses.replace(rule, **changes))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
        assert any((a != b).any() for a, b in zip(got, plain, strict=True))
