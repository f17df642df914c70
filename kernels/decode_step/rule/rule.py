"""What one decode step does, as data: `StepRule`.

A rule is a set of named choices.  It holds no code, so that a new codebase is a new preset
(presets.py) and never a new branch in a kernel.  docs/semantics.md explains each field.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from ...common.names import did_you_mean
from .schedules import check_schedule

Anneal = Literal["constant", "linear", "linspace", "compound", "before"]
Score = Literal[
    "prob", "log_prob", "top1_prob", "margin", "neg_entropy", "logit", "random", "given"
]
Count = Literal[
    "masked",
    "quota",
    "fraction",
    "bernoulli",
    "threshold",
    "factor",
    "entropy_bound",
    "runs",
    "given",
]
Filter = Literal["temperature", "top_k", "top_p", "min_p", "typical_p"]
Clamp = Literal["commit_one", "keep_one"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "count": (
        "masked",
        "quota",
        "fraction",
        "bernoulli",
        "threshold",
        "factor",
        "entropy_bound",
        "runs",
        "given",
    ),
    "count_base": ("masked_at_start", "positions", "block"),
    "count_rows": ("each", "first", "mean", "sum"),
    "count_rounding": ("floor", "round", "ceil"),
    "count_dtype": ("float32", "float64"),
    "count_ratio": ("step", "linspace", "linspace_ends"),
    "min_commit": ("one", "quota"),
    "time_grid": ("linspace", "uniform", "cosine", "ancestral"),
    "remask": ("none", "cap", "rescale", "forward_backward", "loop", "conf"),
    "cut": ("strict", "inclusive", "exact"),
    "last_step": ("schedule", "all"),
    "block_scope": ("block", "prefix"),
    "revise": ("no", "held", "drawn"),
    "sample_anneal": ("constant", "linear", "linspace", "compound", "before"),
    "choice_anneal": ("constant", "linear", "linspace", "compound", "before"),
    "greedy_on": ("logits", "probs"),
    "top_p_keep": ("crossing", "below"),
    "guidance_dtype": ("float32", "logits"),
    "guidance_form": ("from_uncond", "from_cond", "weighted"),
    "score": (
        "prob",
        "log_prob",
        "top1_prob",
        "margin",
        "neg_entropy",
        "logit",
        "random",
        "given",
    ),
    "score_dtype": ("logits", "float32", "float64"),
}
_FLAGS = (
    "factor_tail",
    "threshold_strict",
    "skip_mask_token",
    "greedy_last",
    "ban_mask_token",
    "score_filtered",
)
_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")

PRESETS: dict[str, StepRule] = {}  # by name; presets.py fills it as this package is imported


@dataclass(frozen=True)
class StepRule:
    """Everything that distinguishes one codebase's decode step from another's.

    Use `StepRule.preset(name)` and `dataclasses.replace` rather than spelling out all fields.
    All fields are checked on construction; a wrong one raises ValueError naming it.

    Count (how many positions stay masked or are committed):
        count: "masked" (schedule gives the number left masked), "quota" (U0 // T each step, the
            remainder first), "fraction" (of the number now masked, Dream), "bernoulli" (each
            position by chance, MDLM), "threshold" (confidence at or above a threshold), "factor"
            (Fast-dLLM's dynamic count), "entropy_bound" (in rising entropy while the sum of the
            earlier ones is within `threshold`), "runs" (dInfer's hierarchy: the best of each run of
            masked positions), "given" (num_commit, from the caller).
        schedule, count_base, count_rounding, count_dtype, count_ratio: gamma, what it multiplies,
            how the product is rounded, in which precision, and where the ratio of done steps comes
            from ((step + 1)/T, or torch.linspace in float32 without or with both ends).
        count_rows: whether each row has its own count, or all use the first row's, the mean of the
            rows (fraction), or the sum of their bases (VampNet).
        clamps: bounds put on the number that stays masked, in this order: "commit_one" is U - 1 at
            most, "keep_one" is 1 at least.
        last_step: "all" commits everything at the last step, "schedule" applies the rule as is.
        threshold, threshold_strict, threshold_slack, min_commit: confidence >= (or >) the threshold,
            or >= min(threshold, row's maximum - slack); at least one, or at least the quota.
        low_threshold: what the best of a run must exceed ("runs").
        factor, factor_tail: of count "factor"; a failure at the very last position commits it too.
        time_grid, time_eps, time_clip: the times of "bernoulli" and "fraction".
        remask, remask_eta, remask_on, remask_off, remask_alpha: ReMDM's chance to mask a known token
            again, for count "bernoulli".
    Select:
        cut: "strict" (re-mask conf < sorted[k]), "inclusive" (conf <= sorted[k - 1]) or "exact"
            (exactly k stay masked, ties commit the lowest position).
        block_scope: in semi-autoregressive decoding, "block" considers only the block's masked
            positions, "prefix" all masked positions up to the block's end.
        revise: whether known eligible positions compete and may be masked again, with the score of
            the token they hold ("held": critics, P2) or of one drawn anew and dropped ("drawn").
        edit_threshold: known eligible positions do not compete, but take a candidate that is drawn
            for them where it differs and its score is above this (LLaDA2's editing).
        skip_mask_token: a position whose candidate is the mask token does not take part.
    Draw:
        sample_temperature, sample_anneal, sample_temperature_end, sample_temperature_floor: 0 is
            argmax; end + (start - end) x anneal, and at least the floor.  "linear" is
            1 - (step + 1)/T, "before" 1 - step/T, "linspace" 1 - step/(T - 1), "compound" the
            product of the linear factors so far.
        greedy_last, draw_until: argmax at the last of several steps; argmax where step/T is above
            this.  Scores keep the drawing temperature.
        guidance_dtype, guidance_form: guidance u + S (c - u) in float32, or each of its operations
            rounded to the logits' dtype; then in the form u + S (c - u), from the conditional logits
            c + s (c - u), or weighted S c - s u, where s = S - 1.
        greedy_on: argmax of the logits, or of the probabilities rounded to the score dtype.
        filters, top_k, top_p, min_p, typical_p: filters in the order applied; the entry
            "temperature" marks where the temperature divides (first if it is not named).
        top_p_keep: whether the token that crosses p is kept, or only those below.
        vocab_slice: (start, stop) of the columns that may be drawn.
        banned_ids, ban_mask_token: ids that are never drawn (removed before the softmax).
    Score:
        score: what ranks the candidates, of the drawn token (prob, log_prob, logit), of its row
            (top1_prob, margin, neg_entropy), of nothing (random), or what the caller says (given:
            a critic, a fixed order).
        score_banned_ids: ids outside the score's softmax alone; such a candidate has probability 0.
        score_temperature: temperature of the softmax in the score; None is the drawing one.
        score_filtered: whether the filters apply to the score's distribution.
        score_dtype: precision of the score; "logits" rounds it to the dtype of the logits.
        choice_temperature, choice_anneal: multiplies the Gumbel noise added to the score.
    """

    name: str = "custom"
    source: str = ""
    count: Count = "masked"
    schedule: str = "cosine"
    count_base: Literal["masked_at_start", "positions", "block"] = "masked_at_start"
    count_rounding: Literal["floor", "round", "ceil"] = "floor"
    count_dtype: Literal["float32", "float64"] = "float32"
    count_ratio: Literal["step", "linspace", "linspace_ends"] = "step"
    count_rows: Literal["each", "first", "mean", "sum"] = "each"
    clamps: tuple[Clamp, ...] = ("commit_one", "keep_one")
    last_step: Literal["schedule", "all"] = "schedule"
    threshold: float = 0.9
    threshold_strict: bool = False
    threshold_slack: float | None = None
    min_commit: Literal["one", "quota"] = "one"
    low_threshold: float = 0.0
    factor: float = 1.0
    factor_tail: bool = True
    time_grid: Literal["linspace", "uniform", "cosine", "ancestral"] = "linspace"
    time_eps: float = 1e-3
    time_clip: float = 0.0
    remask: Literal["none", "cap", "rescale", "forward_backward", "loop", "conf"] = "none"
    remask_eta: float = 0.0
    remask_on: float = 1.0
    remask_off: float = 0.0
    remask_alpha: float = 0.0
    cut: Literal["strict", "inclusive", "exact"] = "exact"
    block_scope: Literal["block", "prefix"] = "block"
    revise: Literal["no", "held", "drawn"] = "no"
    edit_threshold: float | None = None
    skip_mask_token: bool = False
    sample_temperature: float = 1.0
    sample_anneal: Anneal = "constant"
    sample_temperature_end: float = 0.0
    sample_temperature_floor: float = 0.0
    greedy_last: bool = False
    draw_until: float = 1.0
    guidance_dtype: Literal["float32", "logits"] = "float32"
    guidance_form: Literal["from_uncond", "from_cond", "weighted"] = "from_uncond"
    greedy_on: Literal["logits", "probs"] = "logits"
    filters: tuple[Filter, ...] = ()
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_p_keep: Literal["crossing", "below"] = "crossing"
    vocab_slice: tuple[int, int] | None = None
    banned_ids: tuple[int, ...] = ()
    ban_mask_token: bool = False
    score: Score = "log_prob"
    score_banned_ids: tuple[int, ...] = ()
    score_temperature: float | None = 1.0
    score_filtered: bool = False
    score_dtype: Literal["logits", "float32", "float64"] = "float32"
    choice_temperature: float = 0.0
    choice_anneal: Anneal = "linear"

    def __post_init__(self) -> None:
        for field_ in dataclasses.fields(self):
            is_float = str(field_.type).startswith("float")
            object.__setattr__(self, field_.name, _plain(getattr(self, field_.name), is_float))
        for field in ("filters", "clamps", "banned_ids", "score_banned_ids", "vocab_slice"):
            value = getattr(self, field)
            if isinstance(value, list):  # from JSON
                object.__setattr__(self, field, tuple(value))
            elif not isinstance(value, tuple) and not (field == "vocab_slice" and value is None):
                raise ValueError(f"StepRule.{field}: expected a tuple, got {value!r}")
        for field in _FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(
                    f"StepRule.{field}: expected True or False, got {getattr(self, field)!r}"
                )
        for field, legal in _CHOICES.items():
            if getattr(self, field) not in legal:
                raise ValueError(
                    f"StepRule.{field}: expected one of {', '.join(legal)}, "
                    f"got {getattr(self, field)!r}"
                )
        check_schedule(self.schedule)
        _check_numbers(self)
        _check_filters(self)
        _check_name(self)
        object.__setattr__(self, "_encoded", json.dumps(dataclasses.asdict(self)))
        object.__setattr__(self, "_hash", hash(self._encoded))  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined,no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        """By its JSON: hashes of strings differ between processes, and a copy is the cached rule."""
        return StepRule.decode, (self.encoded,)

    @property
    def encoded(self) -> str:
        """The rule as one JSON string; `StepRule.decode` is the inverse."""
        return self._encoded  # type: ignore[attr-defined,no-any-return]

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(encoded: str) -> StepRule:
        """The rule that `encoded` was made from."""
        return StepRule(**json.loads(encoded))

    @staticmethod
    def preset(name: str) -> StepRule:
        """The rule of a published codebase; `StepRule.presets()` lists the names."""
        if name not in PRESETS:
            raise ValueError(
                f"rule: expected a StepRule or one of {', '.join(PRESETS)}, got {name!r}"
                f"{did_you_mean(PRESETS, name)}"
            )
        return PRESETS[name]

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Names of all presets."""
        return tuple(PRESETS)

    @property
    def draws_tokens(self) -> bool:
        """Whether candidates are drawn at random at some step."""
        return self.sample_temperature > 0

    @property
    def needs_seeds(self) -> bool:
        """Whether a step uses random numbers at all."""
        return (
            self.draws_tokens
            or self.choice_temperature > 0
            or self.score == "random"
            or self.count == "bernoulli"
        )

    @property
    def touches_known(self) -> bool:
        """Whether known tokens may change: those that `eligible` admits, all by default."""
        return self.revise != "no" or self.edit_threshold is not None or self.remask != "none"


def _check_name(rule: StepRule) -> None:
    """A preset's name belongs to it, and to what `dataclasses.replace` makes of it."""
    if not isinstance(rule.name, str) or not rule.name:
        raise ValueError(f"StepRule.name: expected a name, got {rule.name!r}")
    named = PRESETS.get(rule.name.strip().lower())
    if named is not None and rule.source != named.source:
        raise ValueError(
            f"StepRule.name: expected a name of its own, got {rule.name!r}, which is a preset: "
            f"StepRule.preset({rule.name!r}), or dataclasses.replace of it"
        )


def as_rule(rule: StepRule | str) -> StepRule:
    """`rule` itself, or the preset of that name; TypeError for anything else."""
    if isinstance(rule, StepRule):
        return rule
    if isinstance(rule, str):
        return StepRule.preset(rule)
    raise TypeError(f"rule: expected a StepRule or a preset name, got {type(rule).__name__}")


def _is_number(value: object) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    return is_real and math.isfinite(value)  # type: ignore[arg-type]


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any, is_float: bool) -> Any:
    """A number of any library as Python's, so that equal rules have one hash; else the value itself."""
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(v, is_float) for v in value)
    value = value.item() if isinstance(value, np.generic) else value
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        return float(value) + 0.0 if is_float and is_real else value  # no negative zero
    except OverflowError:
        return math.inf


def _check_numbers(rule: StepRule) -> None:
    for field in (
        "sample_temperature", "sample_temperature_end", "sample_temperature_floor",
        "choice_temperature", "factor",
    ):  # fmt: skip
        value = getattr(rule, field)
        if not _is_number(value) or value < 0:
            raise ValueError(f"StepRule.{field}: expected a finite number >= 0, got {value!r}")
    temperature = rule.score_temperature
    if temperature is not None and (not _is_number(temperature) or temperature < 1e-6):
        raise ValueError(
            f"StepRule.score_temperature: expected None or a finite number >= 1e-6, got {temperature!r}"
        )
    if rule.greedy_on == "probs" and temperature not in (None, 1.0):
        raise ValueError(
            "StepRule.score_temperature: expected None or 1.0 with greedy_on='probs', "
            f"got {temperature!r}"
        )
    for field in ("threshold", "low_threshold", "threshold_slack", "edit_threshold"):
        value = getattr(rule, field)
        optional = field in ("threshold_slack", "edit_threshold")
        if not (_is_number(value) or (optional and value is None)):
            raise ValueError(f"StepRule.{field}: expected a finite number, got {value!r}")
    if not _is_number(rule.time_eps) or not 0 <= rule.time_eps < 1:
        raise ValueError(f"StepRule.time_eps: expected a number in [0, 1), got {rule.time_eps!r}")
    if not _is_number(rule.time_clip) or not 0 <= rule.time_clip < 0.5:
        raise ValueError(
            f"StepRule.time_clip: expected a number in [0, 0.5), got {rule.time_clip!r}"
        )
    for field in ("remask_eta", "remask_on", "remask_off", "remask_alpha", "draw_until"):
        value = getattr(rule, field)
        if not _is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"StepRule.{field}: expected a number in [0, 1], got {value!r}")
    _check_combinations(rule)
    piece = rule.vocab_slice
    if piece is not None and not (
        len(piece) == 2 and all(map(_is_index, piece)) and 0 <= piece[0] < piece[1]
    ):
        raise ValueError(
            f"StepRule.vocab_slice: expected None or (start, stop) with 0 <= start < stop, got {piece!r}"
        )
    for field in ("banned_ids", "score_banned_ids"):
        ids = getattr(rule, field)
        if not all(_is_index(i) and i >= 0 for i in ids):
            raise ValueError(f"StepRule.{field}: expected integers >= 0, got {ids!r}")


def _check_combinations(rule: StepRule) -> None:
    """Fields that make sense only together."""
    if len(rule.clamps) != len(set(rule.clamps)) or any(
        clamp not in ("commit_one", "keep_one") for clamp in rule.clamps
    ):
        raise ValueError(
            f"StepRule.clamps: expected commit_one and keep_one, each at most once, got {rule.clamps!r}"
        )
    wanted = {
        "remask": (rule.remask != "none", "bernoulli", rule.count),
        "count_rows": (rule.count_rows == "mean", "fraction", rule.count),
        "min_commit": (rule.min_commit == "quota", "threshold", rule.count),
        "threshold_slack": (rule.threshold_slack is not None, "threshold", rule.count),
    }
    for field, (used, count, got) in wanted.items():
        if used and got != count:
            raise ValueError(
                f"StepRule.{field}: {getattr(rule, field)!r} expected with count={count!r}, got {got!r}"
            )
    if rule.guidance_form != "from_uncond" and rule.guidance_dtype != "logits":
        raise ValueError(
            f"StepRule.guidance_form: {rule.guidance_form!r} expected with guidance_dtype='logits' "
            f"(forms differ in their rounding alone), got {rule.guidance_dtype!r}"
        )
    if rule.remask == "conf" and rule.score != "given":
        raise ValueError(f"StepRule.remask: 'conf' expected with score='given', got {rule.score!r}")
    if rule.count_rows == "sum" and (rule.count, rule.count_base) != ("masked", "masked_at_start"):
        raise ValueError(
            "StepRule.count_rows: 'sum' expected with count='masked' and count_base='masked_at_start'"
        )
    if rule.score_banned_ids and rule.score not in ("prob", "log_prob"):
        raise ValueError(
            f"StepRule.score_banned_ids: expected with score prob or log_prob, got {rule.score!r}"
        )
    if rule.remask != "none" and (rule.revise != "no" or rule.edit_threshold is not None):
        raise ValueError(
            "StepRule.remask: expected with revise='no' and edit_threshold=None, "
            f"got {rule.revise!r} and {rule.edit_threshold!r}"
        )
    if rule.edit_threshold is not None and rule.revise != "no":
        raise ValueError(
            "StepRule.edit_threshold: expected with revise='no' (known positions do not compete), "
            f"got {rule.revise!r}"
        )


def _check_filters(rule: StepRule) -> None:
    if len(rule.filters) != len({str(f) for f in rule.filters}) or any(
        f not in _FILTERS for f in rule.filters
    ):
        raise ValueError(
            f"StepRule.filters: expected each of {', '.join(_FILTERS)} at most once, got {rule.filters!r}"
        )
    for field in _FILTERS[1:]:
        value = getattr(rule, field)
        if (value is not None) != (field in rule.filters):
            raise ValueError(
                f"StepRule.{field}: expected a value exactly when filters names it, "
                f"got {value!r} with filters={rule.filters!r}"
            )
        if value is None:
            continue
        if field == "top_k":
            if not _is_index(value) or value < 1:
                raise ValueError(f"StepRule.top_k: expected an integer >= 1, got {value!r}")
        elif not _is_number(value) or not 0 < value <= 1:
            raise ValueError(f"StepRule.{field}: expected a number in (0, 1], got {value!r}")
