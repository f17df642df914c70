"""Comparing a backend with the float64 reference, each difference audited as a near tie.

The audit has three parts, each strict on its own: a candidate may differ only where the float64
keys of the two candidates are closer than rounding; a confidence must be that of the backend's own
candidate to within rounding; and what is committed must be exactly the reference's selection from
the backend's own confidences.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from maskgit.kernels.common import philox
from maskgit.kernels.decode_step import reference
from maskgit.kernels.decode_step.inputs import StepInputs
from maskgit.kernels.decode_step.rule.plan import constant_plan, resolve

import maskgit
from maskgit import StepNoise, StepRule, adapters

EPS32, EPS64 = float(np.finfo(np.float32).eps), float(np.finfo(np.float64).eps)
BACKENDS = [
    n for n, why in maskgit.available_backends().items() if why is None and n != "reference"
]
DTYPES = ("float32", "bfloat16", "float16")
# Presets that need nothing from the caller and leave known tokens alone; and the first of them, which
# between them use every mechanism, for the tests that multiply.
FREE = [
    name
    for name in StepRule.presets()
    for rule in [StepRule.preset(name)]
    if "given" not in (rule.score, rule.count) and not rule.touches_known
]
CORE = [
    "maskgit", "amused", "open-muse", "titok", "llada", "llada-fp64", "threshold", "factor", "random",
    "dream-maskgit-plus", "dream-margin", "dream-entropy", "dream-origin",
]  # fmt: skip

GOLDEN = Path(__file__).parent / "golden"


def golden_rule(name: str) -> StepRule:
    """The rule that a recorded run is replayed with: a preset, or a preset and the fields that differ."""
    given = json.loads((GOLDEN / "rules.json").read_text())[name]
    if isinstance(given, str):
        return StepRule.preset(given)
    layout = ("layout", "span", "reduce")  # what is not the rule's: tests/sampling/test_layouts.py
    fields = {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k not in layout
    }
    return dataclasses.replace(StepRule.preset(fields.pop("preset")), **fields)


# ---------------------------------------------------------------------------------------------
# helpers


def to_dtype(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` rounded to `dtype`, held in float32 (float16 and bfloat16 fit in it exactly)."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        nan = np.isnan(x)
        out = reference.round_to(x, dtype).astype(np.float32)
    return np.where(nan, np.float32(np.nan), out)


@dataclass
class Case:
    """One call of `decode_step`: float32 arrays that hold values of `dtype` exactly."""

    rule: StepRule
    logits: np.ndarray
    tokens: np.ndarray
    dtype: str = "float32"
    mask_token_id: int = -1
    step: int = 0
    num_steps: int = 8
    num_masked_at_start: np.ndarray | None = None
    seeds: np.ndarray | None = None
    token_gumbel: np.ndarray | None = None
    choice_gumbel: np.ndarray | None = None
    uncond_logits: np.ndarray | None = None
    guidance_scale: float | None = None
    eligible: np.ndarray | None = None
    note: str = ""

    @property
    def plan(self) -> Any:
        """The rule resolved at this step."""
        return resolve(self.rule, self.step, self.num_steps, self.tokens.shape, self.dtype)

    def inputs(self) -> StepInputs:
        """What the reference's functions get."""
        piece = slice(*(self.rule.vocab_slice or (0, self.logits.shape[-1])))
        masked = self.tokens == self.mask_token_id
        eligible = masked if self.eligible is None else masked & self.eligible
        start = self.num_masked_at_start
        words = None if self.seeds is None else np.stack(philox.seed_words(self.seeds), axis=1)
        drawn = self.plan.row.draws
        return StepInputs(
            logits=self.logits[..., piece],
            tokens=self.tokens,
            eligible=eligible,
            num_masked_at_start=eligible.sum(1) if start is None else start,
            seeds=words,
            positions=np.broadcast_to(np.arange(self.tokens.shape[1]), self.tokens.shape),
            token_gumbel=self.token_gumbel if drawn else None,
            choice_gumbel=self.choice_gumbel,
            uncond_logits=None if self.uncond_logits is None else self.uncond_logits[..., piece],
            guidance_scale=self.guidance_scale or 0.0,
            mask_token_id=self.mask_token_id,
        )


def make_case(
    rule: StepRule,
    *,
    seed: int = 0,
    batch: int = 2,
    length: int = 24,
    vocab: int = 200,
    dtype: str = "float32",
    masked: float = 0.7,
    noise: str = "seeds",
    guidance: float | None = None,
    scale: float = 3.0,
    step: int = 2,
    num_steps: int = 8,
    mask_token_id: int | None = None,
    **changes: Any,
) -> Case:
    """A random case; `noise` is "seeds" or "injected"."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, vocab)
    mask_id = vocab if mask_token_id is None else mask_token_id
    tokens = rng.integers(0, vocab, shape[:2])
    tokens = np.where(tokens == mask_id, (mask_id + 1) % max(vocab, 1), tokens)
    tokens = np.where(rng.random(shape[:2]) < masked, mask_id, tokens)
    width = vocab if rule.vocab_slice is None else rule.vocab_slice[1] - rule.vocab_slice[0]
    injected = noise == "injected"
    case = Case(
        rule=rule,
        logits=to_dtype(rng.normal(size=shape) * scale, dtype),
        tokens=tokens,
        dtype=dtype,
        mask_token_id=mask_id,
        step=step,
        num_steps=num_steps,
        num_masked_at_start=np.minimum((tokens == mask_id).sum(1) + 2, length),
        seeds=None if injected else rng.integers(-(2**63), 2**63, batch),
        token_gumbel=rng.gumbel(size=(*shape[:2], width)).astype(np.float32) if injected else None,
        choice_gumbel=rng.gumbel(size=shape[:2]).astype(np.float32) if injected else None,
        uncond_logits=None if guidance is None else to_dtype(rng.normal(size=shape) * scale, dtype),
        guidance_scale=guidance,
    )
    return dataclasses.replace(case, **changes)


def native(x: np.ndarray | None, kind: str, dtype: str | None = None) -> Any:
    """`x` as an array of the library `kind`, in `dtype`."""
    if x is None:
        return None
    if kind == "numpy":
        return x if dtype is None else x.astype(dtype)
    if kind == "torch":
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(x))
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))
    import jax.numpy as jnp

    return jnp.asarray(x) if dtype is None else jnp.asarray(x).astype(dtype)


def native_seeds(seeds: np.ndarray | None, kind: str) -> Any:
    """Seeds as the library takes them; jax without 64-bit integers gets (B, 2) words."""
    if seeds is None or kind != "jax":
        return native(seeds, kind)
    return native(np.stack(philox.seed_words(seeds), axis=1).astype(np.uint32), "jax")


def kind_for(backend: str, dtype: str) -> str:
    """Which library's arrays a backend is tested with."""
    if backend in ("jax", "pallas"):
        return "jax"
    return "torch" if backend in ("torch", "triton") or dtype == "bfloat16" else "numpy"


def run(case: Case, backend: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(next_tokens, candidate_tokens, confidence) of a backend, through the public function."""
    kind = kind_for(backend, case.dtype)
    noise = None
    if case.token_gumbel is not None or case.choice_gumbel is not None:
        noise = StepNoise(native(case.token_gumbel, kind), native(case.choice_gumbel, kind))
    out = maskgit.decode_step(
        native(case.logits, kind, case.dtype),
        native(case.tokens, kind),
        rule=case.rule,
        mask_token_id=case.mask_token_id,
        step=case.step,
        num_steps=case.num_steps,
        num_masked_at_start=native(case.num_masked_at_start, kind),
        seeds=native_seeds(case.seeds, kind),
        noise=noise,
        uncond_logits=native(case.uncond_logits, kind, case.dtype),
        guidance_scale=case.guidance_scale,
        eligible=native(case.eligible, kind),
        backend=backend,
    )
    return tuple(np.asarray(a) for a in out)  # type: ignore[return-value]


def run_stats(case: Case, backend: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(candidate_tokens, confidence, log_z) of `sample_tokens` on all rows of a case."""
    kind = kind_for(backend, case.dtype)
    noise = None if case.token_gumbel is None else StepNoise(native(case.token_gumbel, kind))
    out = maskgit.sample_tokens(
        native(case.logits, kind, case.dtype),
        rule=case.rule,
        seeds=native_seeds(case.seeds, kind),
        step=case.step,
        noise=noise,
        backend=backend,
    )
    return tuple(np.asarray(a) for a in out)  # type: ignore[return-value]


@dataclass
class Agreement:
    """How often two results agree; every difference counted here has passed its audit."""

    rows: int = 0
    token_ties: list[str] = field(default_factory=list)
    commit_differences: int = 0
    worst_confidence: float = 0.0  # in units of its tolerance


def compare(
    case: Case, expected: Any, got: Any, *, wide: bool = False, drawn: np.ndarray | None = None
) -> Agreement:
    """Check `got` against the reference result `expected`; AssertionError where it is wrong.

    `wide`: the backend computes this rule in float64, and is held to float64 rounding.  `drawn`: the
    reference's candidates, where they are known.
    """
    x, plan = case.inputs(), case.plan
    next_tokens, candidates, confidence = got
    for name, a, b in zip(("next", "candidates", "confidence"), expected, got, strict=True):
        assert a.shape == b.shape, f"{name}: shape {b.shape}, expected {a.shape}"
    known = x.tokens != x.mask_token_id
    assert np.array_equal(next_tokens[known], x.tokens[known]), "a known token changed"
    assert np.array_equal(candidates[known], x.tokens[known]), "a known candidate changed"
    assert np.isposinf(confidence[known]).all(), "a known position's confidence is not +inf"
    if drawn is None:
        drawn, _, _ = reference.sample_tokens(x, plan, case.dtype)
    alive = x.eligible & (drawn >= 0)
    idle = ~known & ~alive
    assert np.array_equal(next_tokens[idle], x.tokens[idle]), "an idle position was committed"
    assert np.array_equal(candidates[idle], x.tokens[idle]), "an idle position has a candidate"
    assert np.isneginf(confidence[idle]).all(), "an idle position's confidence is not -inf"
    noise = reference._choice_noise(x, plan)
    report = Agreement(rows=int(alive.sum()))
    for b, n in zip(*np.nonzero(alive), strict=True):
        extra = 0.0 if noise is None else float(noise[b, n])
        _audit_row(case, x, plan, int(b), int(n), int(drawn[b, n]), int(candidates[b, n]),
                   float(confidence[b, n]), extra, wide, report)  # fmt: skip
    # The selection from the backend's own confidences is exact.
    commit = reference.select(confidence, x.eligible, x, noise, plan) & alive
    wanted = np.where(commit, candidates, x.tokens)
    differs = wanted != next_tokens
    if plan.commit.count == "bernoulli" and noise is not None:
        differs &= np.abs(noise - plan.numbers.commit_below) > 16 * EPS32 * (1 + np.abs(noise))
    assert not differs.any(), f"selection differs at {np.argwhere(differs)[:4].tolist()}"
    report.commit_differences = int((expected[0] != next_tokens).sum())
    return report


def compare_stats(case: Case, got: Any, *, wide: bool = False) -> Agreement:
    """Check the result of `sample_tokens` on all rows of a case."""
    whole = np.ones(case.tokens.shape, bool)
    x = case.inputs()._replace(eligible=whole, uncond_logits=None, mask_token_id=-1)
    x = x._replace(token_gumbel=case.token_gumbel)
    plan = constant_plan(case.rule, case.step, case.dtype)
    drawn, _, log_z = reference.sample_tokens(x, plan, case.dtype)
    plan = dataclasses.replace(plan, commit=dataclasses.replace(plan.commit, adds_noise=False))
    report = Agreement(rows=whole.size)
    assert np.array_equal(got[0] < 0, drawn < 0), "dead rows differ"
    dead = drawn < 0
    assert np.isneginf(got[1][dead]).all()
    assert np.isneginf(got[2][dead]).all()
    bare = dataclasses.replace(case, uncond_logits=None, guidance_scale=None)
    for b, n in np.argwhere(~dead):
        _audit_row(bare, x, plan, b, n, int(drawn[b, n]), int(got[0][b, n]),
                   float(got[1][b, n]), 0.0, wide, report)  # fmt: skip
    if not case.rule.score_filtered or not case.rule.filters:
        tolerance = 64 * (EPS64 if wide else EPS32) * (1 + np.abs(log_z[~dead]))
        with np.errstate(over="ignore"):
            wanted = log_z[~dead].astype(got[2].dtype).astype(np.float64)
            near = np.abs(got[2][~dead] - log_z[~dead]) <= tolerance
        assert (near | (got[2][~dead] == wanted)).all(), "log_z"
    return report


def _audit_row(
    case: Case, x: StepInputs, plan: Any, b: int, n: int, wanted: int, token: int,
    confidence: float, extra: float, wide: bool, report: Agreement,
) -> None:  # fmt: skip
    """One alive row: the candidate is the reference's or a near tie, the confidence is its own."""
    eps = EPS64 if wide else EPS32
    start = case.rule.vocab_slice[0] if case.rule.vocab_slice else 0
    row, error = _reference_row(case, x, b, n, eps)
    token, wanted = token - start, wanted - start
    where = f"row ({b}, {n}) of {case.rule.name} {case.note}"
    assert 0 <= token < row.size, f"{where}: candidate {token} outside {row.size} columns"
    assert np.isfinite(row[token]), f"{where}: candidate {token} was banned"
    key = None if x.seeds is None else (x.seeds[b, 0], x.seeds[b, 1])
    given = None if x.token_gumbel is None else x.token_gumbel[b, n].astype(np.float64)
    complaints = []
    for variant in _nearby(plan, eps):
        filtered = np.where(reference.keep_mask(row, variant), row, -np.inf)
        gap = allowed = 0.0
        if token != wanted or variant is not plan:
            gap, allowed = _key_gap(filtered, token, variant, given, key, n, case.dtype, error, eps)
        if token != wanted and not gap <= allowed:
            complaints.append(f"candidate {token}, not {wanted}: key gap {gap:.3g} > {allowed:.3g}")
            continue
        base = _scored_tokens(filtered if plan.row.score_filtered else row, case.rule)
        share = _confidence_share(base, token, variant, case.dtype, confidence, extra, error, eps)
        if not share <= 1:
            complaints.append(f"confidence {confidence!r} is {share:.3g} tolerances off")
            continue
        if token != wanted:
            report.token_ties.append(
                f"{where}: {wanted} -> {token}, gap {gap:.3g} of {allowed:.3g}"
            )
        report.worst_confidence = max(report.worst_confidence, share)
        return
    raise AssertionError(f"{where}: {complaints[0]}")


def _reference_row(
    case: Case, x: StepInputs, b: int, n: int, eps: float
) -> tuple[np.ndarray, float]:
    """The guided, banned row in float64, and how far rounding may have moved its large entries."""
    row = reference.guided(x, b, n, case.plan, case.dtype)
    rule = case.rule
    banned = rule.banned_ids + ((x.mask_token_id,) if rule.ban_mask_token else ())
    start = rule.vocab_slice[0] if rule.vocab_slice else 0
    row[[i - start for i in banned if 0 <= i - start < row.size]] = -np.inf
    row = np.minimum(row, float(np.finfo(np.float32).max))
    error = 0.0
    if x.uncond_logits is not None:
        with np.errstate(invalid="ignore", over="ignore"):
            c, u = np.abs(x.logits[b, n]), np.abs(x.uncond_logits[b, n])
            sizes = (1 + abs(case.guidance_scale or 0.0)) * (c + u)
        close = np.isfinite(row) & np.isfinite(sizes) & (row > row.max() - 60)
        error = 2 * eps * float(sizes[close].max(initial=0.0))
    return row, error


def _scored_tokens(row: np.ndarray, rule: StepRule) -> np.ndarray:
    """The row without what is outside the score's softmax."""
    start = rule.vocab_slice[0] if rule.vocab_slice else 0
    out = np.isin(np.arange(row.size) + start, rule.score_banned_ids)
    return np.where(out, -np.inf, row)


def _nearby(plan: Any, eps: float) -> list[Any]:
    """The plan, and the plans whose filters are moved by rounding: any of their sets is right."""
    plans = [plan]
    filters = plan.row.filters
    for (i, (name, value, divides)), sign in itertools.product(enumerate(filters), (-1, 1)):
        if name in ("top_p", "min_p", "typical_p"):
            moved = (name, min(value * (1 + sign * 64 * eps), 1.0), divides)
            row = dataclasses.replace(plan.row, filters=(*filters[:i], moved, *filters[i + 1 :]))
            plans.append(dataclasses.replace(plan, row=row))
    return plans


def _key_gap(
    row: np.ndarray, token: int, plan: Any, noise: np.ndarray | None, key: Any, position: int,
    dtype: str, error: float, eps: float,
) -> tuple[float, float]:  # fmt: skip
    """(how far the candidate's key is behind the best one, how far rounding may put it)."""
    if not np.isfinite(row[token]):
        return np.inf, 0.0
    temperature = plan.numbers.sample_temperature
    if plan.row.greedy_on_probs:
        probs, slack = reference.softmax(row), 16 * eps + error
        low = reference.round_to(np.array([probs.max() * (1 - slack)]), plan.row.score_dtype)
        high = reference.round_to(np.array([probs[token] * (1 + slack)]), plan.row.score_dtype)
        return float(low[0] - high[0]), 0.0
    if temperature == 0:
        gap = float(row.max() - row[token])
        first = int(np.argmax(row)) == token
        return (gap, 2 * error) if gap or first else (0.0, 2 * error if error else -1.0)
    if noise is not None:
        keys = np.where(np.isfinite(row), row + temperature * noise, -np.inf)
        keys = np.where(np.isnan(keys), -np.inf, keys)
        best = int(np.argmax(keys))
        size = sum(abs(row[i]) + temperature * abs(noise[i]) for i in (best, token))
        return float(keys[best] - keys[token]), 2 * eps * float(size) + 2 * error
    leaf, inside = divmod(token, philox.LEAF)
    member, group = divmod(inside, philox.GROUPS)
    leaves = -(-row.size // philox.LEAF)
    scaled = np.full(leaves * philox.LEAF, -np.inf)
    scaled[: row.size] = (row - row.max()) / temperature
    tree = scaled.reshape(leaves, philox.PER_GROUP, philox.GROUPS)

    def variates(size: int, stream: int) -> np.ndarray:
        return philox.gumbel(key, np.arange(size), position, plan.numbers.step, stream)

    inner = variates(philox.GROUPS + philox.PER_GROUP, philox.STREAM_INNER)
    races = (
        (np.array([reference.log_sum_exp(t) for t in tree]),
         variates(leaves, philox.STREAM_LEAF), leaf),
        (np.array([reference.log_sum_exp(tree[leaf, :, g]) for g in range(philox.GROUPS)]),
         inner[: philox.GROUPS], group),
        (tree[leaf, :, group], inner[philox.GROUPS :], member),
    )  # fmt: skip
    worst, allowed = 0.0, 0.0
    for mass, gumbels, index in races:
        keys = mass + gumbels
        best = int(np.argmax(keys))
        gap = float(keys[best] - keys[index])
        size = sum(2 + abs(mass[i]) + abs(gumbels[i]) for i in (best, index))
        limit = 8 * EPS32 * float(size) + 2 * error / temperature
        if gap > limit or gap > worst:
            worst, allowed = gap, limit
        if gap > limit:
            break
    return worst, allowed


def _confidence_share(
    row: np.ndarray, token: int, plan: Any, dtype: str, confidence: float, extra: float,
    error: float, eps: float,
) -> float:  # fmt: skip
    """Distance of a confidence from its float64 value, in tolerances: at most 1 is right."""
    low, high = _score_bounds(row, token, plan, dtype, error, eps)
    noisy = plan.row.score == "random" or plan.commit.adds_noise
    temperature = plan.numbers.choice_temperature
    if noisy and not np.isfinite(extra):
        wanted = -np.inf if np.isnan(extra) or np.isneginf(low) else extra
        return 0.0 if confidence == wanted else np.inf
    if plan.row.score == "random":
        low = high = extra
        slack = 8 * EPS32 * (1 + abs(extra))
        low, high = low - slack, high + slack
    elif plan.commit.adds_noise:
        shift = temperature * extra
        slack = 4 * EPS32 * (temperature * (1 + abs(extra)))
        slack += EPS32 * max(abs(low), abs(high)) if np.isfinite(low) and np.isfinite(high) else 0.0
        low, high = low + shift - slack, high + shift + slack
    if low <= confidence <= high:
        middle, half = (low + high) / 2, (high - low) / 2
        return abs(confidence - middle) / half if half and np.isfinite(half) else 0.0
    with np.errstate(over="ignore"):
        if confidence in (float(np.float32(low)), float(np.float32(high))):
            return 1.0
    return (
        float("inf") if low == high else 1 + max(low - confidence, confidence - high) / (high - low)
    )


def _score_bounds(
    row: np.ndarray, token: int, plan: Any, dtype: str, error: float, eps: float
) -> tuple[float, float]:
    """The least and the largest score that rounding within the computation can give."""
    kind, temperature = plan.row.score, plan.numbers.score_temperature

    def rounded(value: float) -> float:
        with np.errstate(over="ignore"):
            return float(reference.round_to(np.array([value]), plan.row.score_dtype)[0])

    if kind == "random":
        return 0.0, 0.0
    if kind == "logit":
        slack = error + eps * abs(row[token])
        return rounded(row[token] - slack), rounded(row[token] + slack)
    z = (row - row.max()) / temperature
    log_total = reference.log_sum_exp(z)
    log_p = z - log_total
    slack = 8 * eps * (1 + log_total) + 2 * error / temperature

    def of(value: float) -> float:  # a relative error of the exponential of this logarithm
        return slack + 4 * eps * abs(value) if np.isfinite(value) else 0.0

    if kind == "neg_entropy":
        probs = np.exp(log_p)
        value = float(np.sum(probs[probs > 0] * log_p[probs > 0]))
        slack = slack + 16 * eps * (1 + abs(value)) + 4 * error / temperature * (1 + abs(value))
        return rounded(value - slack), rounded(value + slack)
    if kind == "log_prob":
        value = float(log_p[token])
        return rounded(value - of(value)), rounded(value + of(value))
    tiny = 1e-37  # below it float32 flushes

    def bounds(value: float) -> tuple[float, float]:
        with np.errstate(under="ignore"):
            p = float(np.exp(value))
        return rounded(max(p * (1 - of(value)) - tiny, 0.0)), rounded(p * (1 + of(value)) + tiny)

    if kind == "margin":
        first, second = np.sort(np.append(log_p, -np.inf))[::-1][:2]
        (a, b), (c, d) = bounds(first), bounds(second) if np.isfinite(second) else (0.0, 0.0)
        return rounded(max(a - d, 0.0)), rounded(b - c)
    return bounds(float(log_p[token] if kind == "prob" else log_p.max()))


def check(case: Case, backend: str, *, differences: float = 0.05) -> Agreement:
    """Run a backend on a case and audit it; at most a share `differences` of near ties."""
    x, plan = case.inputs(), case.plan
    drawn, score, _ = reference.sample_tokens(x, plan, case.dtype)
    given = case.rule.score == "given"
    x = x if given else x._replace(drawn=drawn, scores=score)  # the reference is slow: once a case
    expected = reference.decode_step(x, plan, case.dtype)
    if backend == BACKENDS[0]:
        for a, b in zip(run(case, "reference"), expected, strict=True):
            assert np.array_equal(a, b), "the public function changes the reference's result"
    wide = backend == "torch" and case.rule.score_dtype == "float64"
    report = compare(case, expected, run(case, backend), wide=wide, drawn=drawn)
    assert len(report.token_ties) <= max(1, differences * report.rows), report.token_ties[:3]
    return report


def patch_toy(target, *args, **options):
    """`adapters.patch` for stand-ins, whose code is ours and so no version of anyone's."""
    return adapters.patch(target, *args, **({"trust_version": True} | options))


def on_toy(target, *args, **options):
    """`adapters.fast_sampler` for stand-ins."""
    return adapters.fast_sampler(target, *args, **({"trust_version": True} | options))
