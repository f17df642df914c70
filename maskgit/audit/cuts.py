"""Ties of confidences: where the rule cuts, at its threshold, and within runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..kernels.common.rounding import round_to, rounded
from ..kernels.decode_step import reference
from ..kernels.decode_step.inputs import StepInputs
from ..kernels.decode_step.rule.plan import StepPlan
from .ties import EPS, F64, CutTie


def cut_ties(x: StepInputs, plan: StepPlan, kind: str) -> list[CutTie]:
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
