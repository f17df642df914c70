"""Where two right implementations of a decode step may differ for no other reason than a tie.

Argmax among equal logits, and which of several equal confidences a cut commits, are decided by
conventions (lowest index, highest index, all, none) and, where numbers are only nearly equal, by
rounding.  `audit_ties` computes a step with the float64 reference and names those places.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .kernels.common.arrays import dtype_name, kind_of, to_numpy, widen
from .kernels.common.names import unknown
from .kernels.common.rounding import round_to, rounded
from .kernels.decode_step import StepNoise, StepRule, reference
from .kernels.decode_step.api import rule_and_noise
from .kernels.decode_step.checks import LOGIT_DTYPES, check_guidance, check_logits, columns
from .kernels.decode_step.plan import StepPlan
from .kernels.decode_step.run import complete, inputs, narrowed
from .kernels.decode_step.spec import StepInputs

F64 = npt.NDArray[np.float64]
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True)
class RowTie:
    """A row whose candidate hangs on a tie.

    what: "logits" (guided and filtered), "probs" (after rounding to the score's dtype) or "keys"
        (logits with the caller's noise).
    kind: "equal", or "near": a rounding error apart.
    tokens: the first few ids that tie, rising; `count` of them in all.
    lowest, highest: the candidate by the lowest and by the highest index.
    gap: between the largest and the second largest value.
    """

    sequence: int
    position: int
    what: Literal["logits", "probs", "keys"]
    kind: Literal["equal", "near"]
    tokens: tuple[int, ...]
    count: int
    lowest: int
    highest: int
    gap: float


@dataclass(frozen=True)
class CutTie:
    """Confidences of one sequence that tie where the rule cuts, or at its threshold.

    kind: "equal", or "near" (a rounding error apart), at the cut; "threshold": a rounding error
        from the bound that confidences are compared with.
    confidence: at the cut, or the bound.
    positions: those that tie, rising.
    commits: which of them each convention commits: "lowest" and "highest" index to the exact
        number, and for rules with a count "strict" (all ties at the cut) and "inclusive" (none).
    """

    sequence: int
    kind: Literal["equal", "near", "threshold"]
    confidence: float
    positions: tuple[int, ...]
    commits: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TieReport:
    """What `audit_ties` found.

    rule, dtype, step, num_steps: what was audited; rows, how many rows took part.
    logits: ties between the largest logits (with injected noise, keys) of a row.
    probs: ties between the largest rounded probabilities, for rules that take their argmax.
    cuts: ties between confidences at the cut.
    """

    rule: str
    dtype: str
    step: int
    num_steps: int
    rows: int
    logits: tuple[RowTie, ...]
    probs: tuple[RowTie, ...]
    cuts: tuple[CutTie, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing ties."""
        return not (self.logits or self.probs or self.cuts)

    def as_dict(self, limit: int | None = None) -> dict[str, Any]:
        """Plain numbers for JSON: of each list how many there are, and the first `limit`."""
        head = {k: getattr(self, k) for k in ("rule", "dtype", "step", "num_steps", "rows")}
        out: dict[str, Any] = head | {"clean": self.is_clean}
        for name in ("logits", "probs", "cuts"):
            ties = getattr(self, name)
            out[name] = {
                "count": len(ties),
                "equal": sum(tie.kind == "equal" for tie in ties),
                "first": [dataclasses.asdict(tie) for tie in ties[:limit]],
            }
        return out


def audit_ties(
    logits: Any,
    tokens: Any = None,
    *,
    rule: StepRule | str,
    mask_token_id: int | None = None,
    step: int = 0,
    num_steps: int = 8,
    num_masked_at_start: Any = None,
    seeds: Any = None,
    noise: StepNoise | None = None,
    uncond_logits: Any = None,
    guidance_scale: float | None = None,
    eligible: Any = None,
    scores: Any = None,
    num_commit: Any = None,
    positions: Any = None,
    dtype: str | None = None,
) -> TieReport:
    """Report where right implementations of one decode step may differ because of a tie.

    Args:
        logits: (B, N, V) float16, bfloat16 or float32, torch, jax or NumPy.
        tokens: (B, N) integers; by default everything is masked.
        rule: a `StepRule` or preset name.
        mask_token_id: the id of the mask token; needed with `tokens`.
        step, num_steps: which step of how many; they say how many positions are committed.
        seeds: by default 0 .. B - 1 for rules that draw.  Draws from seeds have no ties to audit;
            the confidences are then those of the tokens drawn.
        noise: the caller's own noise: the largest logits with their noise are audited instead.
        dtype: the dtype that the logits were computed in, where the array is a wider one.
        All others: as `decode_step`.

    Returns:
        `TieReport`.  Two values are near where one rounding of the logits' dtype (guidance
        included), or the float32 error of a softmax, can make them equal or change their order.

    Raises:
        TypeError, ValueError: as `decode_step`; tokens without their mask id.

    Semantics: the float64 reference computes the step, one row at a time, on the host.
    """
    step_rule, token_gumbel, choice_gumbel = rule_and_noise(rule, noise, "auto")
    x, plan, kind = _inputs(
        logits, tokens, step_rule, mask_token_id, step, num_steps, num_masked_at_start, seeds,
        token_gumbel, choice_gumbel, uncond_logits, guidance_scale, eligible, scores, num_commit,
        positions, dtype,
    )  # fmt: skip
    taking_part = x.eligible & ((x.tokens == x.mask_token_id) | (step_rule.revise != "no"))
    ties: dict[str, list[RowTie]] = {"logits": [], "probs": []}
    rows = [(int(b), int(n)) for b, n in zip(*np.nonzero(taking_part), strict=True)]
    for b, n in rows:
        held = step_rule.revise == "held" and x.tokens[b, n] != x.mask_token_id
        row = None if held else _filtered(x, b, n, plan, kind)
        if row is None:
            continue
        for name, found in (
            ("logits", _key_tie(row, x, b, n, plan, kind)),
            ("probs", _prob_tie(row, b, n, plan, kind)),
        ):
            if found is not None:
                ties[name].append(found)
    cuts = _cut_ties(x, plan, kind)
    return TieReport(
        step_rule.name, kind, step, num_steps, len(rows), tuple(ties["logits"]),
        tuple(ties["probs"]), tuple(cuts),
    )  # fmt: skip


def _inputs(
    logits: Any, tokens: Any, rule: StepRule, mask_token_id: int | None, step: int, num_steps: int,
    num_masked_at_start: Any, seeds: Any, token_gumbel: Any, choice_gumbel: Any,
    uncond_logits: Any, guidance_scale: Any, eligible: Any, scores: Any, num_commit: Any,
    positions: Any, dtype: str | None,
) -> tuple[StepInputs, StepPlan, str]:  # fmt: skip
    """The checked inputs of the step in NumPy, the rule at it, and the dtype of the logits."""
    batch, length, vocab = check_logits(logits, 3)
    scale = check_guidance(logits, uncond_logits, guidance_scale)
    logits, uncond_logits = narrowed(logits), narrowed(uncond_logits)
    kind = dtype_name(logits) if dtype is None else dtype
    if kind not in LOGIT_DTYPES:
        raise ValueError(unknown("dtype", LOGIT_DTYPES, dtype))
    if tokens is None:
        mask_token_id = -1 if mask_token_id is None else mask_token_id
        tokens = np.full((batch, length), mask_token_id, np.int64)
        num_masked_at_start = length if num_masked_at_start is None else num_masked_at_start
    elif mask_token_id is None:
        raise ValueError("mask_token_id: expected an integer together with tokens, got None")
    has_noise = token_gumbel is not None or choice_gumbel is not None
    if seeds is None and not has_noise and rule.needs_seeds:
        seeds = np.arange(batch)
    model = _host(logits)
    x, plan = inputs(
        model, vocab, _host(tokens), rule, mask_token_id, step, num_steps,
        _host(num_masked_at_start), _host(seeds), _host(token_gumbel), _host(choice_gumbel),
        _host(eligible), _host(scores), _host(num_commit), _host(positions), kind,
    )  # fmt: skip
    x = complete(x, plan)._replace(
        logits=columns(model, rule),
        uncond_logits=columns(_host(uncond_logits), rule),
        guidance_scale=scale,
    )
    return x, plan, kind


def _host(x: Any) -> Any:
    """An array as NumPy, half precision as float32; everything else as it is."""
    if kind_of(x) is None:
        return np.asarray(x) if isinstance(x, (list, tuple)) else x
    return widen(to_numpy(x), dtype_name(x))


def _filtered(x: StepInputs, b: int, n: int, plan: StepPlan, kind: str) -> F64 | None:
    """The guided, banned and filtered row that candidates are taken from; None without a finite logit."""
    row = reference.guided(x, b, n, plan, kind)
    row[[i for i in plan.row.banned_columns(x.mask_token_id) if i < row.size]] = -np.inf
    if not np.isfinite(row).any():
        return None
    row = np.minimum(row, float(np.finfo(np.float32).max))
    return np.where(reference.keep_mask(row, plan), row, -np.inf)


def _key_tie(row: F64, x: StepInputs, b: int, n: int, plan: StepPlan, kind: str) -> RowTie | None:
    """A tie of the largest logits, or of logits with injected noise; None for draws from seeds."""
    temperature = plan.numbers.sample_temperature
    if not plan.row.draws:
        if plan.row.greedy_on_probs:
            return None  # rounded probabilities decide: see _prob_tie
        sizes = np.abs(row) if x.uncond_logits is None else _guided_sizes(row, x, b, n, plan)
        return _row_tie("logits", row, EPS[kind] * sizes / 2, b, n, plan)
    if x.token_gumbel is None:
        return None
    noise = temperature * x.token_gumbel[b, n].astype(np.float64)
    keys = np.where(np.isfinite(row), row + noise, -np.inf)
    keys = np.where(np.isnan(keys), -np.inf, keys)
    if not np.isfinite(keys).any():
        return None
    sizes = np.abs(row) + np.abs(noise)
    return _row_tie("keys", keys, 2 * EPS["float32"] * sizes, b, n, plan)


def _guided_sizes(row: F64, x: StepInputs, b: int, n: int, plan: StepPlan) -> F64:
    """The largest number that each guided logit is computed from, for what its rounding may be."""
    cond, uncond = (a[b, n].astype(np.float64) for a in (x.logits, x.uncond_logits))
    form, full = plan.row.guidance, x.guidance_scale
    with np.errstate(invalid="ignore"):
        if form == "weighted":
            parts = full * cond, (full - 1) * uncond
        elif form == "from_cond":
            parts = cond, (full - 1) * (cond - uncond)
        else:
            parts = uncond, full * (cond - uncond)
    return np.asarray(np.nanmax(np.abs([row, *parts]), axis=0))


def _prob_tie(row: F64, b: int, n: int, plan: StepPlan, kind: str) -> RowTie | None:
    """A tie of the largest probabilities after rounding, for rules whose argmax is over them."""
    if not plan.row.greedy_on_probs:
        return None
    probs, score_dtype = reference.softmax(row), plan.row.score_dtype
    rounded = round_to(probs, score_dtype)
    error = 16 * EPS["float64" if score_dtype == "float64" else "float32"]
    high = round_to(probs * (1 + error), score_dtype)
    low = round_to(np.array(probs.max() * (1 - error)), score_dtype)
    return _tie_of("probs", rounded, high >= low, b, n, plan)


def _row_tie(
    what: Literal["logits", "keys"], values: F64, errors: F64, b: int, n: int, plan: StepPlan
) -> RowTie | None:
    """A tie of values that may each be off by `errors`."""
    best = int(np.argmax(values))
    with np.errstate(invalid="ignore"):
        near = np.isfinite(values) & (values + errors >= values[best] - errors[best])
    return _tie_of(what, values, near, b, n, plan)


def _tie_of(
    what: Literal["logits", "probs", "keys"], values: F64, near: npt.NDArray[np.bool_], b: int,
    n: int, plan: StepPlan,
) -> RowTie | None:  # fmt: skip
    """What the entries that equal the largest, or else those near it, amount to."""
    top = values.max()
    equal = values == top
    tied = np.flatnonzero(equal if equal.sum() > 1 else near | equal)
    if tied.size < 2:
        return None
    start = plan.row.vocab_start
    ids = [int(i) + start for i in tied]
    first, second = np.sort(values)[::-1][:2]
    return RowTie(
        sequence=b, position=n, what=what, kind="equal" if equal.sum() > 1 else "near",
        tokens=tuple(ids[:8]), count=len(ids), lowest=ids[0], highest=ids[-1],
        gap=float(first - second),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# the cut


def _cut_ties(x: StepInputs, plan: StepPlan, kind: str) -> list[CutTie]:
    """Ties of confidences, one sequence after the other."""
    how = plan.commit
    if how.count in ("all", "bernoulli"):
        return []  # everything is committed, or each position by its own chance
    _, _, confidence = reference.decode_step(x, plan, kind)
    low, high = _bounds(x, plan, kind, confidence)
    eligible = x.eligible & ((x.tokens == x.mask_token_id) | how.revises)
    if how.skips_mask:
        eligible = eligible & ~np.isneginf(confidence)
    found: list[CutTie] = []
    for b in np.flatnonzero(eligible.sum(1)):
        one = _Ranked(int(b), confidence[b], low[b], high[b], eligible[b])
        if how.count == "runs":
            found += _run_ties(one, plan)
            continue
        commits = _commits(one, x, plan, confidence, eligible)
        tie = _boundary_tie(one, commits)
        if tie is not None:
            found.append(tie)
        found += _threshold_ties(one, plan)
    return found


@dataclass(frozen=True)
class _Ranked:
    """One sequence's confidences, how far rounding may move each, and who competes."""

    sequence: int
    confidence: npt.NDArray[Any]
    low: F64
    high: F64
    eligible: npt.NDArray[np.bool_]


def _bounds(
    x: StepInputs, plan: StepPlan, kind: str, confidence: npt.NDArray[Any]
) -> tuple[F64, F64]:
    """The least and the largest confidence that the float32 error of a softmax and of noise gives."""
    row, how = plan.row, plan.commit
    values = confidence.astype(np.float64)
    eps = EPS["float64" if row.is_wide else "float32"]
    if row.score in ("random", "given"):
        error = 8 * eps * np.abs(values) if row.score == "random" else 0 * values
        return _plus(values, -error), _plus(values, error)
    exact_plan = StepPlan(  # the noise comes after the rounding
        dataclasses.replace(row, score_dtype="float64"),
        dataclasses.replace(how, is_wide=True, adds_noise=False),
        plan.numbers,
    )
    exact = reference.decode_step(x, exact_plan, kind)[2].astype(np.float64)
    log_like = row.score in ("log_prob", "neg_entropy", "logit")
    with np.errstate(invalid="ignore"):
        error = 16 * eps * (1 + np.abs(exact) if log_like else np.abs(exact))
        if row.score == "margin":
            error = np.full_like(exact, 16 * eps)
        bare = round_to(exact, row.score_dtype)
        noise = np.where(np.isfinite(bare), values - bare, 0.0)  # nothing, or the rule's
    slack = np.where(noise == 0, 0.0, 4 * EPS["float32"] * (np.abs(noise) + np.abs(bare)))
    if not how.adds_noise:
        noise, slack = 0 * slack, 0 * slack
    ends = (round_to(_plus(exact, s * error), row.score_dtype) for s in (-1, 1))
    low, high = (_plus(end, noise) for end in ends)
    return _plus(low, -slack), _plus(high, slack)


def _plus(values: F64, change: F64) -> F64:
    """Their sum; infinities stay."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(values), values + change, values)


def _commits(
    one: _Ranked, x: StepInputs, plan: StepPlan, confidence: npt.NDArray[Any],
    eligible: npt.NDArray[np.bool_],
) -> dict[str, npt.NDArray[np.bool_]]:  # fmt: skip
    """Which positions of a sequence each convention commits, (N,) bool; "lowest" is exact."""

    def selected(cut: Literal["exact", "strict", "inclusive"]) -> npt.NDArray[np.bool_]:
        how = dataclasses.replace(plan.commit, cut=cut)
        changed = dataclasses.replace(plan, commit=how)
        noise = np.zeros(confidence.shape)
        commit = reference.select(confidence, eligible, x, noise, changed)
        return np.asarray(commit[one.sequence])

    out = {"lowest": selected("exact")}
    where = np.flatnonzero(one.eligible)[::-1]  # the highest index first
    order = where[np.argsort(-one.confidence[where], kind="stable")]
    out["highest"] = np.zeros_like(one.eligible)
    out["highest"][order[: out["lowest"].sum()]] = True
    if plan.commit.count in ("masked", "quota", "fraction", "given"):
        out |= {"strict": selected("strict"), "inclusive": selected("inclusive")}
    return out


def _boundary_tie(one: _Ranked, commits: dict[str, npt.NDArray[np.bool_]]) -> CutTie | None:
    """A tie between what is committed and what is left."""
    taken = commits["lowest"] & one.eligible
    left = one.eligible & ~taken
    alive = one.eligible & ~np.isneginf(one.confidence)
    if not (taken & alive).any() or not (left & alive).any():
        return None
    cut, best_left = one.confidence[taken].min(), one.confidence[left].max()
    equal = bool(cut == best_left)
    if equal:
        tied = one.eligible & (one.confidence == cut)
    else:
        tied = (taken & (one.low <= one.high[left].max())) | (
            left & (one.high >= one.low[taken].min())
        )
        if not (tied & taken).any() or not (tied & left).any():
            return None
    where = np.flatnonzero(tied & alive)
    return CutTie(
        sequence=one.sequence,
        kind="equal" if equal else "near",
        confidence=float(cut),
        positions=tuple(int(n) for n in where),
        commits={k: tuple(int(n) for n in where if v[n]) for k, v in commits.items()},
    )


def _threshold_ties(one: _Ranked, plan: StepPlan) -> list[CutTie]:
    """Confidences that are a rounding error away from what they are compared with."""
    how, n = plan.commit, plan.numbers
    where = np.flatnonzero(one.eligible & ~np.isneginf(one.confidence))
    order = where[np.argsort(-one.confidence[where], kind="stable")]
    if not order.size:
        return []
    low, high = one.low[order], one.high[order]
    if how.count == "threshold":
        bound = n.threshold
        if how.has_slack:
            below = one.confidence[order[0]] - n.threshold_slack
            bound = min(bound, rounded(below, how.compared_in))
        at = order[(low <= bound) & (bound <= high)]
    elif how.count == "factor":
        bounds = n.bounds[: order.size]
        passing = reference.confident(one.confidence[order], plan)
        decides = (np.arange(order.size) <= passing) & (np.arange(order.size) > 0)
        hit = np.flatnonzero(decides & (low <= bounds) & (bounds <= high))
        at, bound = order[hit], float(bounds[hit[0]]) if hit.size else 0.0
    elif how.count == "entropy_bound":
        entropies = -one.confidence[order].astype(np.float64)
        before = np.cumsum(entropies) - entropies
        error = 16 * EPS["float32"] * (1 + before) * np.arange(1, order.size + 1)
        at, bound = order[np.abs(before - n.threshold) <= error], n.threshold
    else:
        return []
    return [_at_threshold(one, bound, at)] if at.size else []


def _at_threshold(one: _Ranked, bound: float, at: npt.NDArray[Any]) -> CutTie:
    positions = tuple(sorted(int(n) for n in at))
    above = {"at or above": tuple(n for n in positions if one.confidence[n] >= bound)}
    above["above"] = tuple(n for n in positions if one.confidence[n] > bound)
    return CutTie(one.sequence, "threshold", bound, positions, above)


def _run_ties(one: _Ranked, plan: StepPlan) -> list[CutTie]:
    """Ties for the best of a run of neighbouring positions, and at the two thresholds."""
    floor, bar = plan.numbers.low_threshold, plan.numbers.threshold
    where, found = np.flatnonzero(one.eligible), []
    for run in np.split(where, np.flatnonzero(np.diff(where) != 1) + 1):
        values = one.confidence[run]
        equal = run[values == values.max()]
        near = run[one.high[run] >= one.low[run].max()]
        tied = equal if equal.size > 1 else near
        if tied.size > 1 and floor < values.max() <= bar:
            positions = tuple(int(n) for n in tied)
            commits = {"lowest": positions[:1], "highest": positions[-1:]}
            commits["all"] = tuple(int(n) for n in equal)
            name: Literal["equal", "near"] = "equal" if equal.size > 1 else "near"
            found.append(CutTie(one.sequence, name, float(values.max()), positions, commits))
    for bound in (floor, bar):
        at = where[(one.low[where] <= bound) & (bound <= one.high[where])]
        if at.size:
            found.append(_at_threshold(one, bound, at))
    return found


__all__ = ["CutTie", "RowTie", "TieReport", "audit_ties"]
