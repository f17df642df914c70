"""Every preset and every field of a rule, on every backend, against the float64 reference.

A different token must be an audited near tie; everything else is exact to rounding (helpers.py).
jax compiles each case anew, so all but its presets in float32 are slow tests.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from helpers import (
    BACKENDS,
    CORE,
    DTYPES,
    FREE,
    Case,
    check,
    compare,
    compare_stats,
    make_case,
    native,
    run,
    run_stats,
    to_dtype,
)  # fmt: skip
from maskgit.kernels.decode_step.inputs import StepInputs

from maskgit import StepRule

SLOW_ON_JAX = [
    pytest.param(name, marks=pytest.mark.slow) if name == "jax" else name for name in BACKENDS
]

FIELDS = {
    **{f"cut-{c}": {"cut": c} for c in ("strict", "inclusive", "exact")},
    **{f"cut-{c}-no-clamp": {"cut": c, "clamps": ()} for c in ("strict", "inclusive")},
    **{
        f"count-{c}": {"count": c}
        for c in ("masked", "quota", "fraction", "bernoulli", "threshold", "factor")
    },
    "count-lower-clamp": {"clamps": ("keep_one",), "count_ratio": "linspace_ends", "count_base": "positions"},
    "count-clamps-reversed": {"clamps": ("keep_one", "commit_one"), "schedule": "sine"},
    "count-sum": {"count_rows": "sum", "cut": "strict", "count_ratio": "linspace"},
    "fraction-mean": {"count": "fraction", "count_rows": "mean"},
    "threshold-strict": {"count": "threshold", "threshold": 0.3, "threshold_strict": True, "score": "prob", "score_dtype": "logits"},
    "threshold-slack": {"count": "threshold", "threshold": 0.99, "threshold_slack": 0.2, "score": "prob"},
    "threshold-quota": {"count": "threshold", "threshold": 0.9, "min_commit": "quota", "score": "prob", "count_base": "positions"},
    "entropy-bounded": {"count": "entropy_bound", "threshold": 6.0, "score": "neg_entropy"},
    "runs": {"count": "runs", "threshold": 0.7, "low_threshold": 0.2, "score": "prob"},
    "factor-no-tail": {"count": "factor", "factor": 1.5, "score": "prob", "factor_tail": False},
    "bernoulli-grids": {"count": "bernoulli", "score": "random", "time_grid": "cosine", "time_clip": 0.01},
    "bernoulli-ancestral": {"count": "bernoulli", "score": "random", "time_grid": "ancestral"},
    "anneal-before": {"sample_anneal": "before", "sample_temperature_end": 0.3, "choice_anneal": "before", "choice_temperature": 1.0},
    "greedy-last": {"greedy_last": True, "sample_temperature": 0.8, "score_temperature": None},
    "draw-until": {"draw_until": 0.5, "filters": ("top_p",), "top_p": 0.6, "score_filtered": True, "score_temperature": None, "sample_temperature": 0.7},
    "top-p-below": {"filters": ("top_p",), "top_p": 0.7, "top_p_keep": "below", "score_filtered": True},
    "score-bans": {"score": "prob", "score_banned_ids": (0, 1, 2, 3, 50, 9999)},
    "score-bans-filtered": {"score": "log_prob", "score_banned_ids": (5,), "filters": ("top_k",), "top_k": 20, "score_filtered": True},
    "guidance-rounded": {"guidance_dtype": "logits", "sample_temperature": 0.0, "score": "prob"},
    "guidance-from-cond": {"guidance_dtype": "logits", "guidance_form": "from_cond", "sample_temperature": 0.0, "score": "prob"},
    "guidance-weighted": {"guidance_dtype": "logits", "guidance_form": "weighted", "score_dtype": "logits"},
    "count-first": {"count_rows": "first", "cut": "inclusive"},
    "count-positions": {"count_base": "positions", "count_rounding": "round"},
    "count-ceil64": {"count_rounding": "ceil", "count_dtype": "float64", "schedule": "pow1.5"},
    "threshold-low": {"count": "threshold", "threshold": 0.05, "score": "prob"},
    "threshold-none": {"count": "threshold", "threshold": 2.0, "score": "prob"},
    "threshold-64": {"count": "threshold", "threshold": 0.3, "score_dtype": "float64", "score": "prob"},
    "factor-small": {"count": "factor", "factor": 1.5, "score": "prob", "sample_temperature": 0.0},
    "factor-zero": {"count": "factor", "factor": 0.0, "score": "prob"},
    "last-all": {"last_step": "all"},
    **{
        f"score-{s}-{d}": {"score": s, "score_dtype": d}
        for s in ("prob", "log_prob", "top1_prob", "margin", "neg_entropy", "logit", "random")
        for d in ("logits", "float32", "float64")
    },
    "score-cold": {"score_temperature": 0.25},
    "score-hot-sampling": {"score_temperature": None, "sample_temperature": 2.5},
    "greedy": {"sample_temperature": 0.0},
    "greedy-probs": {"sample_temperature": 0.0, "greedy_on": "probs", "score_dtype": "logits"},
    "greedy-probs-32": {"sample_temperature": 0.0, "greedy_on": "probs"},
    "cold": {"sample_temperature": 0.05},
    "hot": {"sample_temperature": 30.0},
    "anneal": {"sample_temperature": 4.5, "sample_anneal": "linear"},
    "noise-linspace": {"choice_temperature": 4.5, "choice_anneal": "linspace"},
    "noise-compound": {"choice_temperature": 4.5, "choice_anneal": "compound", "cut": "strict"},
    "noise-constant-64": {"choice_temperature": 1.0, "choice_anneal": "constant", "score_dtype": "float64"},
    "top-k": {"filters": ("top_k",), "top_k": 5},
    "top-k-1": {"filters": ("top_k",), "top_k": 1},
    "top-k-all": {"filters": ("top_k",), "top_k": 10_000},
    "top-p": {"filters": ("top_p",), "top_p": 0.7},
    "top-p-1": {"filters": ("top_p",), "top_p": 1.0},
    "top-p-tiny": {"filters": ("top_p",), "top_p": 1e-6},
    "min-p": {"filters": ("min_p",), "min_p": 0.1},
    "min-p-1": {"filters": ("min_p",), "min_p": 1.0},
    "typical": {"filters": ("typical_p",), "typical_p": 0.6},
    "typical-1": {"filters": ("typical_p",), "typical_p": 1.0},
    "top-k-then-p": {"filters": ("top_k", "temperature", "top_p"), "top_k": 40, "top_p": 0.8, "sample_temperature": 0.7},
    "top-p-then-k": {"filters": ("temperature", "top_p", "top_k"), "top_k": 4, "top_p": 0.95, "sample_temperature": 1.3},
    "all-filters": {
        "filters": ("min_p", "typical_p", "temperature", "top_k", "top_p"),
        "min_p": 0.01, "typical_p": 0.9, "top_k": 30, "top_p": 0.9, "sample_temperature": 0.8,
    },
    "filtered-score": {"filters": ("top_p",), "top_p": 0.5, "score_filtered": True, "score": "neg_entropy"},
    "filtered-margin": {"filters": ("top_k",), "top_k": 1, "score_filtered": True, "score": "margin"},
    "filtered-greedy": {"filters": ("top_p",), "top_p": 0.5, "score_filtered": True, "sample_temperature": 0.0, "greedy_on": "probs", "score_dtype": "logits", "score_temperature": None},
    "banned": {"banned_ids": (0, 3, 150, 9999)},
    "ban-mask": {"ban_mask_token": True},
    "slice": {"vocab_slice": (16, 150), "banned_ids": (3, 16, 149, 150)},
    "slice-ban-mask": {"vocab_slice": (16, 150), "ban_mask_token": True},
}  # fmt: skip


def is_slow(backend: str, preset: str, dtype: str) -> bool:
    """jax compiles each: those that are run always."""
    return backend == "jax" and not (dtype == "float32" and preset in CORE)


@pytest.mark.parametrize("noise", ["seeds", "injected"])
@pytest.mark.parametrize(
    ("backend", "preset", "dtype"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if is_slow(*case) else [])
        for case in itertools.product(BACKENDS, FREE, DTYPES)
    ],
)
def test_every_preset(backend: str, preset: str, dtype: str, noise: str) -> None:
    rule = StepRule.preset(preset)
    for step in (0, 3, 7):
        guidance = 2.5 if step == 3 else None
        check(
            make_case(rule, seed=step, dtype=dtype, noise=noise, step=step, guidance=guidance),
            backend,
        )


def but_jax(cases: Any, always: Any) -> list[Any]:
    """Cases whose first entry is a backend; of jax's all but those that are given are slow."""
    return [
        pytest.param(
            *case, marks=[pytest.mark.slow] if case[0] == "jax" and case[1:] not in always else []
        )
        for case in cases
    ]


ON_JAX = [(name, "float32", "seeds") for name in ("banned", "slice-ban-mask", "all-filters")]


@pytest.mark.parametrize(
    ("backend", "name", "dtype", "noise"),
    but_jax(itertools.product(BACKENDS, FIELDS, DTYPES, ["seeds", "injected"]), ON_JAX),
)
def test_every_field(backend: str, name: str, dtype: str, noise: str) -> None:
    rule = StepRule(name=name, **FIELDS[name])
    mask = 20 if "ban-mask" in name else None
    for step in (1, 7):
        case = make_case(rule, seed=step, dtype=dtype, noise=noise, step=step, mask_token_id=mask)
        check(case, backend)
        if step == 1:
            check(dataclasses.replace(case, **_guidance(case)), backend)
        if rule.score != "random":
            wide = backend == "torch" and rule.score_dtype == "float64"
            case = dataclasses.replace(case, choice_gumbel=None)
            if rule.ban_mask_token:
                continue
            compare_stats(case, run_stats(case, backend), wide=wide)


def _guidance(case: Case) -> dict[str, Any]:
    rng = np.random.default_rng(99)
    uncond = to_dtype(rng.normal(size=case.logits.shape) * 3, case.dtype)
    return {"uncond_logits": uncond, "guidance_scale": 3.5}


FORMS = {
    "from_uncond": lambda c, u, full, rest: u + full * (c - u),
    "from_cond": lambda c, u, full, rest: c + rest * (c - u),
    "weighted": lambda c, u, full, rest: full * c - rest * u,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_guided_logits_are_rounded_as_torch_rounds_them(
    backend: str, form: str, dtype: str
) -> None:
    check_guided_logits(backend, form, dtype)


def check_guided_logits(backend: str, form: str, dtype: str) -> None:
    """To the last bit, overflow included: the operations of torch in the dtype of the logits."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    rule = StepRule(guidance_dtype="logits", guidance_form=form, sample_temperature=0.0,
                    score="logit", count="quota", score_dtype="float32")  # fmt: skip
    rng = np.random.default_rng(7)
    largest, zero = float(torch.finfo(kind).max), np.zeros((4, 16), np.int32)
    pair = rng.normal(size=(2, 4, 16, 2)) * np.exp(3 * rng.normal(size=(2, 4, 16, 2)))
    pair[..., 1] = -1.0  # what is left where the other is none
    odd = [largest, -largest, largest / 2, np.inf, -np.inf, np.nan, 0.0]
    for rows, row, sign in ((0, 0, 1), (1, 1, 1), (0, 2, 1), (1, 2, -1)):
        pair[rows, row, : len(odd), 0] = sign * np.array(odd)
    cond, uncond = (torch.from_numpy(x).to(kind) for x in pair)
    for scale in (3.0, 4.37, 0.3, 1.0, -2.5, 9000.0):
        full = np.float32(scale)
        mixed = FORMS[form](cond, uncond, float(full), float(full - np.float32(1)))
        mixed = mixed.double().nan_to_num(-np.inf, posinf=float(np.finfo(np.float32).max))
        case = Case(rule, cond.float().numpy(), zero, dtype, 0, guidance_scale=scale,
                    uncond_logits=uncond.float().numpy())  # fmt: skip
        np.testing.assert_array_equal(run(case, backend)[2], mixed.amax(-1).numpy(), str(scale))


SIZED = {
    "maskgit": StepRule.preset("maskgit"),
    "dream-entropy": dataclasses.replace(StepRule.preset("dream-entropy"), sample_temperature=0.8),
    "llada": StepRule.preset("llada"),
    "filters": StepRule(
        filters=("top_k", "top_p", "typical_p"), top_k=50, top_p=0.95, typical_p=0.9
    ),
    "margin": StepRule(score="margin", sample_temperature=1.5),
}


@pytest.mark.parametrize("vocab", [1, 2, 17, 127, 128, 129, 256, 1000, 2049, 5000])
@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_every_vocabulary_size(backend: str, name: str, vocab: int) -> None:
    for dtype in DTYPES:
        check(make_case(SIZED[name], vocab=vocab, length=9, dtype=dtype, seed=vocab), backend)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 1), (1, 257), (5, 2), (2, 3)])
@pytest.mark.parametrize("masked", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("preset", CORE)
@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_every_shape(backend: str, preset: str, masked: float, shape: tuple[int, int]) -> None:
    batch, length = shape
    for step in (0, 6, 7):
        rule = StepRule.preset(preset)
        check(
            make_case(
                rule, batch=batch, length=length, vocab=33, masked=masked, step=step, seed=step
            ),
            backend,
        )


def spoil(case: Case, seed: int) -> Case:
    """NaN, infinities and the largest floats in the logits, some rows without a finite entry."""
    rng = np.random.default_rng(seed)
    logits = case.logits.copy()
    for value, share in (
        (np.nan, 0.05),
        (-np.inf, 0.1),
        (np.inf, 0.002),
        (65504.0, 0.002),
        (-65504.0, 0.01),
    ):
        logits[rng.random(logits.shape) < share] = value
    kinds = rng.integers(0, 8, logits.shape[:2])
    for kind, value in enumerate((np.nan, -np.inf, np.inf)):
        logits[kinds == kind] = value
    logits[kinds == 3, 1:] = -np.inf  # a single live token
    if case.dtype != "float16":
        logits[kinds == 4, 0] = to_dtype(np.array([3.3e38]), case.dtype)[0]
        logits[kinds == 4, 1] = -logits[kinds == 4, 0]
    return dataclasses.replace(case, logits=to_dtype(logits, case.dtype), note="spoiled")


BAD = [*CORE, "score-margin-logits", "score-neg_entropy-float32", "score-cold", "all-filters", "typical",
       "top-p", "greedy-probs-32"]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "name", "noise"),
    but_jax(itertools.product(BACKENDS, BAD, ["seeds", "injected"]), [("maskgit", "seeds")]),
)
def test_bad_entries(backend: str, name: str, noise: str) -> None:
    rule = StepRule.preset(name) if name in CORE else StepRule(name=name, **FIELDS[name])
    for dtype, guidance in itertools.product(DTYPES, (None, 1.5)):
        case = make_case(rule, dtype=dtype, noise=noise, length=40, vocab=150, guidance=guidance)
        check(spoil(case, 5), backend)


@pytest.mark.parametrize("cut", ["strict", "inclusive", "exact"])
@pytest.mark.parametrize("count", ["masked", "quota", "fraction", "threshold", "factor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_of_tokens_and_positions(backend: str, cut: str, count: str) -> None:
    rule = StepRule(cut=cut, count=count, sample_temperature=0.0, score="prob", threshold=0.4)
    rng = np.random.default_rng(3)
    for levels, step in itertools.product((1, 2, 3), range(0, 8, 2)):
        case = make_case(rule, length=32, vocab=12, step=step, batch=4, mask_token_id=99)
        rows = rng.integers(0, levels, (4, 32, 1)) * np.eye(12)[rng.integers(0, 12, (4, 32))]
        case = dataclasses.replace(case, logits=(4 * rows).astype(np.float32))
        report = check(case, backend)
        assert not report.token_ties


@pytest.mark.parametrize("preset", CORE)
@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_uneven_rows_and_eligibility(backend: str, preset: str) -> None:
    rng = np.random.default_rng(1)
    for step in (0, 4, 7):
        case = make_case(StepRule.preset(preset), batch=4, length=30, vocab=50, step=step)
        tokens = case.tokens.copy()
        for b, count in enumerate((0, 1, 15, 30)):
            tokens[b] = np.where(np.arange(30) < count, 50, 7)
        eligible = rng.random(tokens.shape) < 0.6
        for some, who in ((tokens, eligible), (tokens[::-1].copy(), None)):
            now = ((some == 50) & (True if who is None else who)).sum(1)
            for start in (now if step else None, np.maximum(now, [30, 0, 5, 30])):
                given = {"tokens": some, "eligible": who, "num_masked_at_start": start}
                check(dataclasses.replace(case, **given), backend)


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_noise_with_infinities(backend: str) -> None:
    for rule in (StepRule(choice_temperature=1.0, cut="strict"), StepRule(choice_temperature=1.0, cut="inclusive"),
                 StepRule(score="random", count="bernoulli"), StepRule(choice_temperature=1.0, clamps=())):  # fmt: skip
        case = make_case(rule, noise="injected", length=30)
        for value in (np.inf, -np.inf, np.nan):
            case.choice_gumbel[:, ::5] = value
            case.token_gumbel[:, 1::5, ::2] = value
            check(case, backend)


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_agreement_with_the_reference_is_high(backend: str) -> None:
    rows, ties = 0, []
    for seed in range(4):
        case = make_case(SIZED["maskgit"], batch=4, length=64, vocab=700, seed=seed, masked=1.0)
        report = check(case, backend)
        rows, ties = rows + report.rows, ties + report.token_ties
    assert len(ties) <= 2, f"{len(ties)} of {rows}: {ties[:3]}"


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_large_vocabulary(backend: str) -> None:
    for name, dtype in (
        ("maskgit", "float32"),
        ("llada", "bfloat16"),
        ("dream-entropy", "float32"),
        ("filters", "float32"),
    ):
        check(
            make_case(SIZED[name], batch=1, length=4, vocab=126_464, dtype=dtype, masked=1.0),
            backend,
        )


@pytest.mark.parametrize("preset", CORE)
def test_jax_traces(preset: str) -> None:
    jax = pytest.importorskip("jax")
    from maskgit.kernels.decode_step.plain import jax_ref

    case = make_case(StepRule.preset(preset), step=3, guidance=2.0)
    fields = {k: v for k, v in case.inputs()._asdict().items() if v is not None}
    fields["seeds"] = fields["seeds"].astype(np.uint32)
    fields["positions"] = np.array(fields["positions"], np.uint32)
    fixed = {k: fields.pop(k) for k in ("guidance_scale", "mask_token_id")}
    blank = dict.fromkeys(StepInputs._fields)

    @jax.jit
    def step(arrays: Any) -> Any:
        return jax_ref.decode_step(StepInputs(**(blank | arrays | fixed)), case.plan, case.dtype)

    got = tuple(np.asarray(a) for a in step(fields))
    compare(case, run(case, "reference"), got)


@pytest.mark.parametrize("preset", ["maskgit", "dream-entropy", "llada-fp64", "factor", "titok"])
def test_torch_compiles_without_breaks(preset: str) -> None:
    torch = pytest.importorskip("torch")
    from maskgit.kernels.decode_step.plain import torch_ref

    case = make_case(StepRule.preset(preset), step=3, guidance=2.0, length=8, vocab=300)
    fields = {k: native(v, "torch") if isinstance(v, np.ndarray) else v for k, v in case.inputs()._asdict().items()
              if k not in ("seeds", "positions")}  # fmt: skip
    fields["seeds"] = torch.from_numpy(case.inputs().seeds.astype(np.int64))
    fields["positions"] = torch.from_numpy(np.array(case.inputs().positions, np.int64))
    plan = case.plan

    def step(x: StepInputs) -> Any:
        return torch_ref.decode_step(x, plan, case.dtype)

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(StepInputs(**fields))
    compare(case, run(case, "reference"), tuple(a.numpy() for a in got))
