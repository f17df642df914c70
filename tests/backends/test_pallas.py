"""The TPU kernels in jax's simulator of TPU memories, against the float64 reference.

Every run looks for races, starts from memory full of NaN and raises at a read outside an array.  A
case is seconds, so that all presets and fields are slow tests; what always runs is a sample.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import maskgit.kernels.decode_step.pallas_tpu.launch as pallas_tpu  # noqa: E402
import maskgit.kernels.decode_step.pallas_tpu.tiles as pallas_tiles  # noqa: E402
import ml_dtypes  # noqa: E402
from helpers import (  # noqa: E402
    CORE,
    FREE,
    Case,
    check,
    compare,
    compare_stats,
    golden_rule,
    make_case,
    native_seeds,
    run,
    run_stats,
    to_dtype,
)
from maskgit.kernels.common.simulation import compiling  # noqa: E402
from maskgit.kernels.decode_step.inputs import StepInputs  # noqa: E402
from maskgit.kernels.decode_step.rule.plan import resolve  # noqa: E402
from test_contract import FIELDS, FORMS, SIZED, _guidance, check_guided_logits, spoil  # noqa: E402
from test_golden import FILES, first_of_each_function, meta_of, replay  # noqa: E402

import maskgit  # noqa: E402
from maskgit import StepRule  # noqa: E402

DTYPES = ("float32", "bfloat16")


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    monkeypatch.setenv("MASKGIT_PALLAS_INTERPRET", "1")


def sampled(names: Any, always: tuple[str, ...]) -> list[Any]:
    """The names as parameters, all but a few of them slow."""
    return [n if n in always else pytest.param(n, marks=pytest.mark.slow) for n in names]


def test_asked_for_by_name_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASKGIT_PALLAS_INTERPRET")
    with pytest.raises(ValueError, match="jax finds no TPU"):
        run(make_case(StepRule.preset("maskgit")), "pallas")


def test_float16_and_rows_too_long_are_refused() -> None:
    case = make_case(StepRule.preset("maskgit"), dtype="float16")
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        run(case, "pallas")
    with pytest.raises(ValueError, match="rows of at most"):
        pallas_tpu.block_rows(100, 64 << 20, "float32")
    case = make_case(StepRule.preset("maskgit"), batch=1, length=(1 << 15) + 1, vocab=4)
    with pytest.raises(
        ValueError, match="tokens: backend 'pallas' expected at most 32768 positions"
    ):
        run(case, "pallas")


@pytest.mark.parametrize("mask", [2**31, 2**32 - 1])
def test_unsigned_tokens_hold_any_mask_id(mask: int) -> None:
    for preset in ("maskgit", "dream-maskgit-plus"):
        case = make_case(StepRule.preset(preset), vocab=100, length=5, mask_token_id=mask)
        tokens = jnp.asarray(case.tokens.astype(np.uint32))
        out = maskgit.decode_step(
            jnp.asarray(case.logits), tokens, rule=case.rule, mask_token_id=mask, step=case.step,
            num_steps=case.num_steps, seeds=native_seeds(case.seeds, "jax"), backend="pallas",
            num_masked_at_start=jnp.asarray(case.num_masked_at_start),
        )  # fmt: skip
        expected = run(case, "reference")
        assert out.next_tokens.dtype == jnp.uint32
        np.testing.assert_array_equal(np.asarray(out.next_tokens), expected[0])


@pytest.mark.parametrize("preset", sampled(FREE, ("maskgit", "titok", "dream-entropy")))
def test_every_preset(preset: str) -> None:
    rule = StepRule.preset(preset)
    for step, dtype, noise in (
        (0, "bfloat16", "seeds"), (3, "float32", "seeds"), (3, "bfloat16", "injected"),
        (7, "float32", "injected"),
    ):  # fmt: skip
        guidance = 2.5 if step == 3 else None
        case = make_case(rule, seed=step, dtype=dtype, noise=noise, step=step, guidance=guidance)
        check(case, "pallas")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FIELDS)
def test_every_field(name: str, dtype: str) -> None:
    rule = StepRule(name=name, **FIELDS[name])
    mask = 20 if "ban-mask" in name else None
    case = make_case(rule, seed=1, dtype=dtype, step=1, mask_token_id=mask)
    check(dataclasses.replace(case, **_guidance(case)), "pallas")
    if rule.score != "random" and not rule.ban_mask_token:
        case = dataclasses.replace(case, choice_gumbel=None)
        compare_stats(case, run_stats(case, "pallas"), wide=False)


@pytest.mark.parametrize("form", sampled(FORMS, ("weighted",)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_guided_logits_are_rounded_as_torch_rounds_them(dtype: str, form: str) -> None:
    check_guided_logits("pallas", form, dtype)


@pytest.mark.parametrize("name", ["all-filters", "top-p-below", "filtered-margin"])
def test_filters(name: str) -> None:
    check(make_case(StepRule(name=name, **FIELDS[name]), seed=4, step=1), "pallas")


@pytest.mark.parametrize("vocab", sampled(map(str, (1, 2, 17, 127, 128, 129, 1000, 1025, 2049, 5000)), ("129", "2049")))  # fmt: skip
def test_every_vocabulary_size(vocab: str) -> None:
    names = ("maskgit",) if vocab in ("129", "2049") else SIZED
    for name in names:
        for dtype in DTYPES:
            case = make_case(SIZED[name], vocab=int(vocab), length=9, dtype=dtype, seed=int(vocab))
            check(case, "pallas")


@pytest.mark.parametrize("shape", sampled(
    ["3x4x700", "1x3x5000", "2x1x300", "9x3x8192", "2x257x300", "9x40x260", "70x5x33", "1x1100x129", "2x40x20000", "3x4x8832",
     "2x8x2560", "9x4x32768", "1x100x4608", "1x16x34816"], ("9x40x260", "3x4x8832", "1x100x4608"),
))  # fmt: skip
def test_every_layout_of_rows(shape: str) -> None:
    """Rows in every number of lanes, blocks that end raggedly, more sequences than a block holds."""
    batch, length, vocab = map(int, shape.split("x"))
    for name, dtype in (("maskgit", "bfloat16"), ("dream-entropy", "float32")):
        case = make_case(SIZED[name], batch=batch, length=length, vocab=vocab, dtype=dtype, seed=3)
        check(case, "pallas")


@pytest.mark.parametrize("shape", sampled(["2x4x8960", "2x8x2500", "1x40x5000", "2x130x900"], ("2x4x8960",)))  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropies_of_rows_far_from_zero(shape: str, dtype: str) -> None:
    """Each row's largest logit far above or below 0, at one of its columns: first, last or between."""
    batch, length, vocab = map(int, shape.split("x"))
    case = make_case(
        SIZED["dream-entropy"], batch=batch, length=length, vocab=vocab, dtype=dtype, seed=8
    )
    logits = np.array(case.logits)
    rng = np.random.default_rng(2)
    for row in logits.reshape(-1, vocab):
        row += rng.choice([-700, 0, 300])
        row[rng.choice([0, vocab - 1, vocab - 130, rng.integers(vocab)])] = row.max() + 4
    check(dataclasses.replace(case, logits=to_dtype(logits, dtype)), "pallas")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "vocab"), [
    (4, 8960), (8, 2176), pytest.param(8, 67_584, marks=pytest.mark.slow),
    pytest.param(4, 151_936, marks=pytest.mark.slow),
])  # fmt: skip
def test_views_of_packed_rows(
    length: int, vocab: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views that the TPU compiler gets, which the simulator does not know, in jax's plain interpreter."""
    monkeypatch.setattr(pallas_tpu, "interpret_params", lambda: True)
    for module in (pallas_tpu, pallas_tiles):
        monkeypatch.setattr(module, "is_simulating", lambda: False)
    for guidance in (None, 2.5):
        case = make_case(
            SIZED["maskgit"], batch=2, length=length, vocab=vocab, dtype=dtype, guidance=guidance
        )
        check(case, "pallas")


@pytest.mark.parametrize(
    "name", sampled([*CORE, "all-filters", "typical", "score-cold"], ("maskgit",))
)
def test_bad_entries(name: str) -> None:
    rule = StepRule.preset(name) if name in CORE else StepRule(name=name, **FIELDS[name])
    for dtype, guidance in (("float32", None), ("bfloat16", 1.5), ("bfloat16", None)):
        case = make_case(rule, dtype=dtype, length=40, vocab=150, guidance=guidance)
        check(spoil(case, 5), "pallas")


@pytest.mark.parametrize("dtype", sampled(DTYPES, ("bfloat16",)))
@pytest.mark.parametrize("scale", [0.02, 0.2])
def test_probabilities_that_round_to_the_largest(scale: float, dtype: str) -> None:
    """Dream's argmax where several tokens, or one a little behind, have the largest rounded probability."""
    rule = StepRule(name="greedy-probs", **FIELDS["greedy-probs"])
    case = make_case(rule, seed=5, vocab=700, dtype=dtype, scale=scale)
    logits = np.array(case.logits)
    logits[:, ::3] = logits[:, ::3] * 32  # rows of the same block that are clear
    check(dataclasses.replace(case, logits=logits), "pallas")


@pytest.mark.parametrize("guidance", sampled([None, 1.0], (None,)))
def test_neighbours_of_the_largest_logit(guidance: float | None) -> None:
    """Of two neighbours in bfloat16 above 2 only one has the largest rounded probability; not so below."""
    kind = ml_dtypes.bfloat16
    never = ml_dtypes.finfo(kind).min
    for levels, lowest in (
        ([2, 2.015625, 3.984375, 4, 90, -2, -2.015625, -70], -200),
        ([0.5, 0.996, 1, 1.0078125, 1.992, -0.5, -1, -1.992], -200),
        ([4, 1, 0, 1e-3], never),
    ):
        case = make_case(
            StepRule.preset("dream-entropy"), batch=1, length=len(levels), vocab=384, masked=1.0,
            dtype="bfloat16", guidance=guidance,
        )  # fmt: skip
        top = np.array(levels, kind)
        logits = np.maximum(np.array(case.logits, np.float32) - 200, lowest)
        next_below = np.nextafter(top, np.array(-np.inf, kind))
        logits[0, :, 20], logits[0, :, 130], logits[0, :, 257] = lowest, next_below, top
        for row in range(1, len(levels), 2):
            logits[0, row, 258] = top[row]  # a third of the mass each, and no half
        case = dataclasses.replace(case, logits=to_dtype(logits, "bfloat16"))
        check(case, "pallas")
        if lowest == never:  # entropies of what is drawn
            check(dataclasses.replace(case, rule=SIZED["dream-entropy"]), "pallas")
        assert (130 in run(case, "reference")[1]) == (min(map(abs, levels)) < 2)


@pytest.mark.parametrize("count", sampled(["masked", "quota", "fraction", "threshold", "factor"], ("masked",)))  # fmt: skip
def test_ties_of_positions(count: str) -> None:
    rng = np.random.default_rng(3)
    for cut in ("strict", "inclusive", "exact"):
        rule = StepRule(cut=cut, count=count, sample_temperature=0.0, score="prob", threshold=0.4)  # type: ignore[arg-type]
        case = make_case(rule, length=32, vocab=12, step=2, batch=4, mask_token_id=99)
        rows = rng.integers(0, 2, (4, 32, 1)) * np.eye(12)[rng.integers(0, 12, (4, 32))]
        case = dataclasses.replace(case, logits=(4 * rows).astype(np.float32))
        assert not check(case, "pallas").token_ties


@pytest.mark.slow
@pytest.mark.parametrize("preset", CORE)
def test_uneven_rows_and_eligibility(preset: str) -> None:
    rng = np.random.default_rng(1)
    case = make_case(StepRule.preset(preset), batch=4, length=30, vocab=50, step=4)
    tokens = case.tokens.copy()
    for b, count in enumerate((0, 1, 15, 30)):
        tokens[b] = np.where(np.arange(30) < count, 50, 7)
    eligible = rng.random(tokens.shape) < 0.6
    for start in (None, np.array([30, 0, 5, 30])):
        case = dataclasses.replace(
            case, tokens=tokens, eligible=eligible, num_masked_at_start=start
        )
        check(case, "pallas")


@pytest.mark.slow
def test_large_vocabulary() -> None:
    for name, dtype in (("maskgit", "bfloat16"), ("llada", "bfloat16"), ("filters", "float32")):
        case = make_case(SIZED[name], batch=1, length=4, vocab=126_464, dtype=dtype, masked=1.0)
        check(case, "pallas")


def test_a_row_is_the_same_wherever_it_lies() -> None:
    """Alone, among others, in lanes of its own or dealt out to several: the same token."""
    rule = StepRule.preset("maskgit")
    case = make_case(rule, batch=2, length=130, vocab=400, masked=1.0)
    together = run_stats(case, "pallas")
    for part in (slice(0, 3), slice(0, 40)):
        alone = dataclasses.replace(case, logits=case.logits[:, part], tokens=case.tokens[:, part])
        tokens, *numbers = run_stats(alone, "pallas")
        np.testing.assert_array_equal(together[0][:, part], tokens)
        # Sums in another order: an eps of log Z, of which a log-probability is the difference.
        bound = np.finfo(np.float32).eps * np.abs(together[2]).max()
        for a, b in zip(together[1:], numbers, strict=True):
            np.testing.assert_allclose(a[:, part], b, rtol=1e-6, atol=bound)


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[] if path.stem in _QUICK else [pytest.mark.slow])
    for _QUICK in [{"maskgit", *sorted(first_of_each_function())[:3]}]
    for path in FILES if meta_of(path)["dtype"] in DTYPES
])  # fmt: skip
def test_tokens_are_those_of_the_codebase_itself(path: Any) -> None:
    with np.load(path, allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    for s in range(0, len(golden["step"]), 3):
        next_tokens, _ = replay(
            golden, json.loads(str(golden["meta"])), golden_rule(path.stem), s, "pallas"
        )
        np.testing.assert_array_equal(next_tokens, golden["expected"][s], f"after step {s}")


@pytest.mark.parametrize("preset", ["maskgit", "titok", "soundstorm", "mdlm"])
@pytest.mark.parametrize("shape", ["64x256x1024", "8x32x126464", "3x257x50258"])
def test_cost_estimates_are_those_of_the_block_specs(preset: str, shape: str) -> None:
    """What each kernel says that it reads and writes is what its blocks add up to."""
    batch, length, vocab = map(int, shape.split("x"))
    rule = StepRule.preset(preset)
    plan = resolve(rule, 3, 8, (batch, length), "bfloat16")
    of = jax.ShapeDtypeStruct

    def step(logits: Any, tokens: Any, seeds: Any) -> Any:
        x = StepInputs(logits, tokens, None, None, seeds, None, None, None, None, 0.0, vocab - 1)
        return pallas_tpu.decode_step(x, plan, "bfloat16")

    with compiling():
        traced = jax.make_jaxpr(step)(
            of((batch, length, vocab), jnp.bfloat16), of((batch, length), jnp.int32), of((batch, 2), jnp.uint32)
        )  # fmt: skip
    calls = [e for e in traced.eqns if e.primitive.name == "pallas_call"]
    assert len(calls) == 2
    for call in calls:
        mapping = call.params["grid_mapping"]
        moved = 0
        for block in mapping.block_mappings:
            array = block.array_aval if hasattr(block, "array_aval") else block.array_shape_dtype
            if "smem" not in str(block.transformed_block_aval).lower():
                moved += int(np.prod(array.shape)) * jnp.dtype(array.dtype).itemsize
        estimate = call.params["cost_estimate"].bytes_accessed
        assert estimate == pytest.approx(moved, rel=0.01)
    bytes_of_logits = 2 * batch * length * vocab
    total = sum(call.params["cost_estimate"].bytes_accessed for call in calls)
    assert total <= 1.05 * bytes_of_logits


def test_confidences_agree_with_jax() -> None:
    case: Case = make_case(StepRule.preset("maskgit"), length=50, vocab=333, step=2)
    compare(case, run(case, "reference"), run(case, "pallas"))
    assert maskgit.available_backends()["pallas"] is None


def hidden_case(
    preset: str, dtype: str, shape: tuple[int, int, int, int], **changes: Any
) -> tuple[Any, ...]:
    """Hidden states, head, bias, tokens and options of a step."""
    rng = np.random.default_rng(5)
    batch, length, width, vocab = shape
    hidden, weight = (
        jnp.asarray(rng.normal(size=s), dtype) for s in ((batch, length, width), (vocab, width))
    )
    bias = jnp.asarray(rng.normal(size=vocab), dtype)
    tokens = np.full((batch, length), vocab - 1, np.int32)
    tokens[rng.random(tokens.shape) < 0.4] = 3
    rule = dataclasses.replace(StepRule.preset(preset), greedy_on="logits", **changes)
    seeds = jnp.asarray(rng.integers(0, 2**31, (batch, 2)), jnp.uint32)
    options = {"rule": rule, "mask_token_id": vocab - 1, "step": 2, "num_steps": 8, "seeds": seeds}
    options["num_masked_at_start"] = length
    return hidden * 0.3, weight, bias, jnp.asarray(tokens), options


@pytest.mark.parametrize("preset", sampled(
    ["maskgit", "llada", "dream-entropy", "dream-margin", "titok", "mdlm", "open-dllm-p2", "random"],
    ("maskgit", "dream-margin"),
))  # fmt: skip
def test_the_head_without_logits(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same tokens as with logits, in several blocks of rows, tiles and depths; known rows cost nothing."""
    from maskgit.kernels.head_sample.pallas_tpu import launch as head

    changes = {"revise": "no"} if preset == "open-dllm-p2" else {}
    hidden, weight, bias, tokens, options = hidden_case(
        preset, "float32", (2, 150, 256, 700), **changes
    )
    monkeypatch.setattr(head, "MOST_ROWS", 128)
    monkeypatch.setattr(head, "MOST_DEPTH", 128)
    monkeypatch.setattr(head, "TILE_BYTES", 1 << 17)
    calls = []
    rows = head.head_rows
    monkeypatch.setattr(head, "head_rows", lambda *a: calls.append(a[-1]) or rows(*a))
    for given in (bias, None):
        got, expected = (
            maskgit.decode_step_from_hidden(
                hidden, weight, tokens, head_bias=given, backend=backend, **options
            )
            for backend in ("pallas", "reference")
        )
        np.testing.assert_array_equal(got.candidate_tokens, expected.candidate_tokens)
        np.testing.assert_array_equal(got.next_tokens, expected.next_tokens)
        np.testing.assert_allclose(got.confidence, expected.confidence, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    assert calls[0].depth == 128
    assert calls[0].tile == 256


def test_the_head_in_bfloat16_and_with_guidance_and_a_slice() -> None:
    hidden, weight, bias, tokens, options = hidden_case(
        "maskgit", "bfloat16", (1, 40, 128, 600), vocab_slice=(0, 500), banned_ids=(7,)
    )
    out = maskgit.decode_step_from_hidden(
        hidden, weight, tokens, head_bias=bias, uncond_hidden=hidden * 0.5, guidance_scale=2.0,
        backend="pallas", **options,
    )  # fmt: skip
    mixed = (0.5 * hidden.astype(jnp.float32) + 2.0 * 0.5 * hidden.astype(jnp.float32)).astype(
        "bfloat16"
    )
    wide = [a.astype(jnp.float32) for a in (mixed, weight, bias)]
    exact = maskgit.decode_step_from_hidden(
        wide[0], wide[1], tokens, head_bias=wide[2], backend="reference", **options
    )
    agree = np.asarray(out.candidate_tokens) == np.asarray(exact.candidate_tokens)
    assert agree.mean() > 0.95
    drawn = np.asarray(out.candidate_tokens)[np.asarray(tokens) == 599]
    assert drawn.max() < 500
    assert (drawn != 7).all()


def test_heads_that_are_not_fused_still_run() -> None:
    hidden, weight, bias, tokens, options = hidden_case(
        "maskgit", "float32", (1, 12, 64, 300), filters=("top_k",), top_k=5
    )
    got, expected = (
        maskgit.decode_step_from_hidden(
            hidden, weight, tokens, head_bias=bias, backend=b, **options
        )
        for b in ("pallas", "reference")
    )
    np.testing.assert_array_equal(got.candidate_tokens, expected.candidate_tokens)


def pallas_call(function: Any, *arrays: Any) -> Any:
    """The parameters of the one kernel that a function calls."""
    with compiling():
        traced = jax.make_jaxpr(function)(*arrays)
    (found,) = [e.params for e in traced.eqns if e.primitive.name == "pallas_call"]
    return found


def block_bytes(mapping: Any) -> list[int]:
    """Bytes of a block of each operand and result, by the specs."""
    return [
        int(np.prod([n for n in block.transformed_block_aval.shape if isinstance(n, int)]))
        * jnp.dtype(block.array_aval.dtype).itemsize
        for block in mapping.block_mappings
    ]


@pytest.mark.parametrize(("length", "heads", "size"), [(256, 16, 48), (1024, 12, 64), (512, 8, 96)])
def test_the_cost_of_attention_is_that_of_its_blocks(length: int, heads: int, size: int) -> None:
    """Queries and results a block for each step of the grid, keys and values one for each block of heads."""
    from maskgit.kernels.attention import pallas_tpu

    of = jax.ShapeDtypeStruct((2, length, heads, size), jnp.bfloat16)
    call = pallas_call(lambda *a: pallas_tpu.attention(*a, None, 0.1), of, of, of)
    mapping = call["grid_mapping"]
    batch, groups, blocks = mapping.grid
    _, queries, keys, values, out = block_bytes(mapping)
    moved = batch * groups * (blocks * (queries + out) + keys + values)
    assert call["cost_estimate"].bytes_accessed == pytest.approx(moved, rel=0.01)
    assert call["cost_estimate"].flops == 4 * 2 * heads * length**2 * size


@pytest.mark.parametrize(
    ("rows", "width", "vocab"), [(512, 768, 1024), (1024, 4096, 2048), (512, 8192, 2048)]
)
def test_the_cost_of_the_head_is_that_of_its_blocks(rows: int, width: int, vocab: int) -> None:
    """The head's matrix once for each block of rows; hidden rows once, or with each tile if D is in blocks."""
    from maskgit.kernels.decode_step.inputs import complete
    from maskgit.kernels.head_sample.pallas_tpu import launch as head

    rule, of = StepRule.preset("maskgit"), jax.ShapeDtypeStruct
    plan = resolve(rule, 3, 8, (1, rows))

    def draw(hidden: Any, weight: Any, tokens: Any, seeds: Any) -> Any:
        x = StepInputs(None, tokens, None, None, seeds, None, None, None, None, 0.0, vocab - 1)
        x = complete(x, plan)
        return head.sample_rows(x, hidden, weight, None, x.eligible, plan)

    call = pallas_call(
        draw, of((1, rows, width), jnp.bfloat16), of((vocab, width), jnp.bfloat16),
        of((1, rows), jnp.int32), of((1, 2), jnp.uint32),
    )  # fmt: skip
    mapping = call["grid_mapping"]
    blocks, tiles, depths = mapping.grid
    _, words, hidden, weight, *results = block_bytes(mapping)
    moved = blocks * (words + sum(results))
    moved += blocks * tiles * depths * weight
    moved += blocks * (tiles * depths if depths > 1 else 1) * hidden
    assert call["cost_estimate"].bytes_accessed == pytest.approx(moved, rel=0.01)
    assert call["cost_estimate"].flops == 2 * rows * width * vocab
