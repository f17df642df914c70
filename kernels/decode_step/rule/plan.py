"""A rule at one step: what a kernel is compiled for, and the numbers that it is given.

    RowPlan      how a row of logits becomes a candidate and a score
    CommitPlan   which candidates a step commits
    Numbers      temperatures, thresholds, chances and tables: what may change from step to step

The first two are equal by value, so that the steps of a loop share compiled programs; every backend
reads these three and no rule.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...common.rounding import round_to, rounded
from .rule import StepRule
from .tables import commit_share, masked_count_table, quota_table, remask_chances

# 1/T must stay in float32: temperatures under the first are 0, since the draw is argmax long before;
# those above the second are the second, where any logits but of the order of 1e23 are long alike.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-6, 1e30
_LOG2E = 1.4426950408889634
_LARGE = 1 << 14  # positions whose tables are a memory that counts, over all steps of a loop


@dataclass(frozen=True)
class RowPlan:
    """How a row of logits becomes a candidate and a score.

    draws: a token is drawn, else the best one is taken, of probabilities rounded to `score_dtype` where
        `greedy_on_probs`.
    guidance: "float32", or the form of which each operation is rounded to the dtype of the logits.
    vocab_slice: the columns that may be drawn; banned, bans_mask: which of them are not, numbered
        from the slice's first; so is score_banned, outside the score's softmax alone.
    filters: of (name, value, whether the temperature divides first), one after the other; nucleus_below:
        the token that passes top_p's limit is left out.
    score, score_filtered, score_dtype: the score, of what, and the dtype that it is rounded to.
    same_temperature: a token is drawn and scored at one temperature.
    holds: known positions are scored by the token that they hold; touches_known: they take part.
    """

    draws: bool
    greedy_on_probs: bool
    guidance: str
    vocab_slice: tuple[int, int] | None
    banned: tuple[int, ...]
    bans_mask: bool
    filters: tuple[tuple[str, float, bool], ...]
    nucleus_below: bool
    score: str
    score_filtered: bool
    score_dtype: str
    score_banned: tuple[int, ...]
    same_temperature: bool
    holds: bool
    touches_known: bool

    @property
    def vocab_start(self) -> int:
        """The id of the first column."""
        return self.vocab_slice[0] if self.vocab_slice else 0

    @property
    def guide(self) -> int:
        """The guidance as kernels number it, from 1."""
        return 1 + ("float32", "from_uncond", "from_cond", "weighted").index(self.guidance)

    @property
    def is_wide(self) -> bool:
        """Whether scores are in float64."""
        return self.score_dtype == "float64"

    def banned_columns(self, mask_token_id: int) -> tuple[int, ...]:
        """The columns that are never drawn, the mask token's among them where it is one."""
        mask = mask_token_id - self.vocab_start
        return tuple(sorted({*self.banned, *([mask] if self.bans_mask and mask >= 0 else [])}))


@dataclass(frozen=True)
class CommitPlan:
    """Which candidates a step commits.

    count: the rule's, or "all" in a last step that commits everything; cut, count_rows, clamps: the
        rule's; base_is_positions: counts are formed from N; least_is_quota: of "threshold".
    source: where scores come from, "drawn", "random" or "given"; adds_noise: annealed noise is added
        to them; uses_noise: the step needs a variate for each position.
    is_wide: confidences are float64; compared_in: the dtype in which they are compared with bounds.
    threshold_strict, has_slack, factor_tail: of thresholds.
    revises: known positions compete; touches_known: they take part; edits, remasks, remasks_by_score:
        what else may happen to them; skips_mask: a candidate that is the mask token does not compete.
    """

    count: str
    cut: str
    count_rows: str
    base_is_positions: bool
    clamps: tuple[str, ...]
    least_is_quota: bool
    source: str
    adds_noise: bool
    uses_noise: bool
    is_wide: bool
    compared_in: str
    threshold_strict: bool
    has_slack: bool
    factor_tail: bool
    revises: bool
    touches_known: bool
    edits: bool
    remasks: bool
    remasks_by_score: bool
    skips_mask: bool


class Numbers(NamedTuple):
    """The numbers of a step, on the host; in jax's programs they are arguments.

    draw_scale, score_scale, filter_scale: log2(e) over the temperature, for exponentials of base 2.
    commit_below, remask_below: bounds that the choice Gumbel of a position stays under which a
    Bernoulli rule commits, or masks again; remask_chance: that chance.  The four thresholds are rounded
    to the dtype that scores are compared in, and 0 where the rule has none.  `table` is int32 (size +
    1,), indexed by the count base (counts.next_masked_counts), `shares` what a "fraction" commits,
    indexed by the number masked; `bounds` those of "factor", by rank.
    """

    step: Any
    sample_temperature: Any
    filter_temperature: Any
    score_temperature: Any
    choice_temperature: Any
    draw_scale: Any
    score_scale: Any
    filter_scale: Any
    commit_fraction: Any
    commit_below: Any
    remask_chance: Any
    remask_below: Any
    factor: Any
    threshold: Any
    threshold_slack: Any
    low_threshold: Any
    edit_threshold: Any
    table: Any
    shares: Any
    bounds: Any


class Arguments(NamedTuple):
    """`Numbers` as a jitted program takes them: few arrays, since each costs every call some microseconds."""

    step: Any
    scalars: Any  # the fields between `step` and `table`
    table: Any
    shares: Any
    bounds: Any

    def unpacked(self, kind: Any) -> Numbers:
        """The numbers, those with a fraction in the floating dtype `kind`."""
        scalars = self.scalars.astype(kind)
        each = [scalars[i] for i in range(scalars.shape[0])]
        return Numbers._make([self.step, *each, self.table, self.shares, self.bounds])


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What every backend is given instead of (rule, step, num_steps).

    Of a traced step `numbers` are those of every step that it may be, of which `index` says which.
    """

    row: RowPlan
    commit: CommitPlan
    numbers: Any  # Numbers; for the C++ core in jax's programs cpu.in_jax.Packed
    index: Any = None


@lru_cache(maxsize=4096)
def as_arguments(plan: StepPlan) -> Arguments:
    """The numbers of a plan, packed."""
    step, *scalars, table, shares, bounds = plan.numbers
    return Arguments(np.uint32(step), np.array(scalars, np.float64), table, shares, bounds)


def _anneal(kind: str, step: int, num_steps: int) -> float:
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - (step + 1) / num_steps
    if kind == "before":
        return 1.0 - step / num_steps
    if kind == "linspace":
        return 1.0 - step / (num_steps - 1) if num_steps > 1 else 1.0
    share = 1.0
    for i in range(step + 1):
        share *= 1.0 - (i + 1) / num_steps
        if share < 1e-300:  # no temperature any more, however many steps follow
            break
    return share


def _bounded(value: float) -> float:
    return min(value, _MAX_TEMPERATURE) if value >= _MIN_TEMPERATURE else 0.0


def _sample_temperature(rule: StepRule, step: int, num_steps: int) -> float:
    """The drawing temperature of a step, not regarding steps that are greedy by decree."""
    end = rule.sample_temperature_end
    share = _anneal(rule.sample_anneal, step, num_steps)
    return _bounded(
        max(end + (rule.sample_temperature - end) * share, rule.sample_temperature_floor)
    )


def _is_greedy(rule: StepRule, step: int, num_steps: int) -> bool:
    return (rule.greedy_last and 1 < num_steps == step + 1) or step / num_steps > rule.draw_until


def gumbel_below(chance: float) -> float:
    """The bound that a standard Gumbel variate stays under with this probability."""
    if chance >= 1:
        return math.inf
    return -math.log(-math.log(chance)) if chance > 0 else -math.inf


def check_num_steps(num_steps: object) -> None:
    """ValueError unless `num_steps` is an integer of at least 1."""
    whole = isinstance(num_steps, (int, np.integer)) and not isinstance(num_steps, bool)
    if not whole or num_steps < 1:  # type: ignore[operator]
        raise ValueError(f"num_steps: expected an integer >= 1, got {num_steps!r}")
    if num_steps > 2**32:  # type: ignore[operator]
        raise ValueError(f"num_steps: expected at most 2^32, got {num_steps}")


@lru_cache(maxsize=1024)
def constant_plan(rule: StepRule, step: int, dtype: str = "float32") -> StepPlan:
    """The rule without its annealing and its count, its random numbers those of `step`."""
    if not 0 <= step < 2**32:
        raise ValueError(f"step: expected an integer in [0, 2^32), got {step!r}")
    flat = dataclasses.replace(
        rule,
        sample_anneal="constant",
        greedy_last=False,
        draw_until=1.0,
        count="quota",
        count_rows="each",
        min_commit="one",
        threshold_slack=None,
        remask="none",
    )
    plan = resolve(flat, 0, 1, (1, 0), dtype)
    return dataclasses.replace(plan, numbers=plan.numbers._replace(step=step))


def resolve(
    rule: StepRule, step: int, num_steps: int, shape: tuple[int, int], dtype: str = "float32"
) -> StepPlan:
    """`rule` at `step` of `num_steps` on tokens of shape (B, N); `dtype` is that of the logits.

    Raises:
        ValueError: num_steps < 1 or step outside [0, num_steps).
    """
    check_num_steps(num_steps)
    if not isinstance(step, (int, np.integer)) or not 0 <= step < num_steps:
        raise ValueError(f"step: expected an integer in [0, {num_steps}), got {step!r}")
    batch, length = shape
    size = batch * length if rule.count_rows in ("sum", "mean") else length
    kept = _resolved if size < _LARGE else _large_resolved
    return kept(rule, step, num_steps, size, batch if rule.count_rows == "mean" else 1, dtype)


@lru_cache(maxsize=4096)
def _resolved(
    rule: StepRule, step: int, num_steps: int, size: int, batch: int, dtype: str
) -> StepPlan:
    """The plan for counts that are formed from up to `size` positions, as means over `batch`."""
    dtype = dtype if dtype in ("bfloat16", "float16") else "float32"
    compared_in = dtype if rule.score_dtype == "logits" else rule.score_dtype
    numbers = _numbers(rule, int(step), int(num_steps), size, compared_in, batch)
    row = _row_plan(rule, numbers, compared_in)
    return StepPlan(row, _commit_plan(rule, numbers, compared_in, step == num_steps - 1), numbers)


_large_resolved = lru_cache(maxsize=64)(_resolved.__wrapped__)


def _row_plan(rule: StepRule, numbers: Numbers, score_dtype: str) -> RowPlan:
    start = rule.vocab_slice[0] if rule.vocab_slice else 0
    draws = numbers.sample_temperature > 0
    stays = rule.score_temperature is None or rule.sample_anneal == "constant"
    return RowPlan(
        draws=draws,
        greedy_on_probs=not draws and rule.greedy_on == "probs",
        guidance="float32" if rule.guidance_dtype == "float32" else rule.guidance_form,
        vocab_slice=rule.vocab_slice,
        banned=tuple(sorted({i - start for i in rule.banned_ids if i >= start})),
        bans_mask=rule.ban_mask_token,
        filters=_filters(rule),
        nucleus_below=rule.top_p_keep == "below",
        score=rule.score,
        score_filtered=rule.score_filtered,
        score_dtype=score_dtype,
        score_banned=tuple(sorted({i - start for i in rule.score_banned_ids if i >= start})),
        same_temperature=draws
        and stays
        and numbers.sample_temperature == numbers.score_temperature,
        holds=rule.revise == "held",
        touches_known=rule.touches_known,
    )


def _filters(rule: StepRule) -> tuple[tuple[str, float, bool], ...]:
    """The filters that leave anything out, each with its value and whether logits are scaled by then."""
    scaled, found = "temperature" not in rule.filters, []
    for name in rule.filters:
        scaled = scaled or name == "temperature"
        value = getattr(rule, name, 1)
        if name in ("top_k", "min_p") or (name != "temperature" and value < 1):
            found.append((name, value, scaled))
    return tuple(found)


def _commit_plan(rule: StepRule, numbers: Numbers, compared_in: str, is_last: bool) -> CommitPlan:
    is_random = rule.score == "random"
    return CommitPlan(
        count="all" if is_last and rule.last_step == "all" else rule.count,
        cut=rule.cut,
        count_rows=rule.count_rows,
        base_is_positions=rule.count_base == "positions",
        clamps=rule.clamps,
        least_is_quota=rule.min_commit == "quota",
        source=rule.score if rule.score in ("random", "given") else "drawn",
        adds_noise=numbers.choice_temperature > 0 and not is_random,
        uses_noise=numbers.choice_temperature > 0 or is_random or rule.count == "bernoulli",
        is_wide=rule.score_dtype == "float64",
        compared_in=compared_in,
        threshold_strict=rule.threshold_strict,
        has_slack=rule.threshold_slack is not None,
        factor_tail=rule.factor_tail,
        revises=rule.revise != "no",
        touches_known=rule.touches_known,
        edits=rule.edit_threshold is not None,
        remasks=rule.remask != "none",
        remasks_by_score=rule.remask == "conf",
        skips_mask=rule.skip_mask_token,
    )


def _numbers(
    rule: StepRule, step: int, num_steps: int, size: int, compared_in: str, batch: int
) -> Numbers:
    sample = _sample_temperature(rule, step, num_steps)
    draws = sample > 0 and not _is_greedy(rule, step, num_steps)
    score = _bounded(rule.score_temperature or sample) or 1.0
    choice = rule.choice_temperature * _anneal(rule.choice_anneal, step, num_steps)
    share, chance = commit_share(rule, step, num_steps), 0.0
    if rule.remask != "none":
        chance, share = remask_chances(rule, step, num_steps)
    return Numbers(
        step=step,
        sample_temperature=sample if draws else 0.0,
        filter_temperature=sample or 1.0,
        score_temperature=score,
        choice_temperature=_bounded(choice),
        draw_scale=_LOG2E / sample if draws else 1.0,
        score_scale=_LOG2E / score,
        filter_scale=_LOG2E / (sample or 1.0),
        commit_fraction=float(np.float32(share)),
        commit_below=gumbel_below(share),
        remask_chance=chance,
        remask_below=gumbel_below(chance),
        factor=rule.factor,
        threshold=rounded(rule.threshold, compared_in),
        threshold_slack=rounded(rule.threshold_slack or 0.0, compared_in),
        low_threshold=rounded(rule.low_threshold, compared_in),
        edit_threshold=rounded(rule.edit_threshold or 0.0, compared_in),
        table=_table(rule, step, num_steps, size),
        shares=_shares(rule, share, size, batch),
        bounds=_bounds(rule, size, compared_in),
    )


def _table(rule: StepRule, step: int, num_steps: int, size: int) -> npt.NDArray[np.int32]:
    if rule.count == "masked":
        return masked_count_table(rule, step, num_steps, size)
    if rule.count == "quota" or rule.min_commit == "quota":
        return quota_table(step, num_steps, size)
    return np.zeros(0, np.int32)


def _shares(rule: StepRule, share: float, size: int, batch: int) -> npt.NDArray[np.int32]:
    """What a "fraction" commits of 0..size positions, of all sequences together where it is their mean."""
    if rule.count != "fraction":
        return np.zeros(0, np.int32)
    counts = np.arange(size + 1, dtype=np.float32)
    if rule.count_rows == "mean":
        counts = counts / np.float32(max(batch, 1))
    return (counts * np.float32(share)).astype(np.int32)


def _bounds(rule: StepRule, size: int, compared_in: str) -> npt.NDArray[np.float64]:
    """What the confidence of each rank must reach under "factor"."""
    if rule.count != "factor":
        return np.zeros(0)
    return round_to(1 - rule.factor / (np.arange(size + 1) + 2.0), compared_in)
