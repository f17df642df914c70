"""What one decode step does, as data: `StepRule`, and the containers that go in and out.

A rule is a set of named choices.  It holds no code, so that a new codebase is a new preset
(presets.py) and never a new branch in a kernel.  docs/semantics.md explains each field.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from .counts import check_schedule

Anneal = Literal["constant", "linear", "linspace", "compound"]
Score = Literal[
    "prob", "log_prob", "top1_prob", "margin", "neg_entropy", "logit", "random", "given"
]
Count = Literal["masked", "quota", "fraction", "bernoulli", "threshold", "factor"]
Filter = Literal["temperature", "top_k", "top_p", "min_p", "typical_p"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "count": ("masked", "quota", "fraction", "bernoulli", "threshold", "factor"),
    "count_base": ("masked_at_start", "positions"),
    "count_rows": ("each", "first"),
    "count_rounding": ("floor", "round", "ceil"),
    "count_dtype": ("float32", "float64"),
    "cut": ("strict", "inclusive", "exact"),
    "last_step": ("schedule", "all"),
    "block_scope": ("block", "prefix"),
    "sample_anneal": ("constant", "linear", "linspace", "compound"),
    "choice_anneal": ("constant", "linear", "linspace", "compound"),
    "greedy_on": ("logits", "probs"),
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
_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class StepRule:
    """Everything that distinguishes one codebase's decode step from another's.

    Use `StepRule.preset(name)` and `dataclasses.replace` rather than spelling out all fields.
    All fields are checked on construction; a wrong one raises ValueError naming it.

    Count (how many positions stay masked or are committed):
        count: "masked" (schedule gives the number left masked), "quota" (U0 // T each step, the
            remainder first), "fraction" (of the mean number now masked, Dream), "bernoulli" (each
            position by chance, Dream's origin), "threshold" (confidence >= threshold, at least
            one), "factor" (Fast-dLLM's dynamic count, at least one).
        schedule, count_base, count_rounding, count_dtype, count_rows: gamma, what it multiplies,
            how the product is rounded, in which precision, and whether each row has its own count
            or all use the first row's.
        keep_one_masked: clamp to [1, masked now - 1].
        last_step: "all" commits everything at the last step, "schedule" applies the rule as is.
        threshold, factor, time_eps: parameters of the count kinds of those names.
    Select:
        cut: "strict" (re-mask conf < sorted[k]), "inclusive" (conf <= sorted[k - 1]) or "exact"
            (exactly k stay masked, ties commit the lowest position).
        block_scope: in semi-autoregressive decoding, "block" considers only the block's masked
            positions, "prefix" all masked positions up to the block's end.
        revise: every eligible position competes, known ones with the score of the token they hold,
            and may be masked again.  Only for rules that revise committed tokens (critics, P2).
    Draw:
        sample_temperature, sample_anneal: 0 is argmax; "linear" multiplies by 1 - (step + 1)/T,
            "linspace" by 1 - step/(T - 1), "compound" by the product of the linear factors so far.
        greedy_on: argmax of the logits, or of the probabilities rounded to the score dtype.
        filters, top_k, top_p, min_p, typical_p: filters in the order applied; the entry
            "temperature" marks where the temperature divides (first if it is not named).
        vocab_slice: (start, stop) of the columns that may be drawn.
        banned_ids, ban_mask_token: ids that are never drawn (removed before the softmax).
    Score:
        score: what ranks the candidates, of the drawn token (prob, log_prob, logit), of its row
            (top1_prob, margin, neg_entropy), of nothing (random), or what the caller says (given:
            a critic, a fixed order).
        score_temperature: temperature of the softmax in the score; None is the drawing one.
        score_filtered: whether the filters apply to the score's distribution.
        score_dtype: precision of the score; "logits" rounds it to the dtype of the logits.
        choice_temperature, choice_anneal: multiplies the Gumbel noise added to the score.
    """

    name: str = "custom"
    source: str = ""
    count: Count = "masked"
    schedule: str = "cosine"
    count_base: Literal["masked_at_start", "positions"] = "masked_at_start"
    count_rounding: Literal["floor", "round", "ceil"] = "floor"
    count_dtype: Literal["float32", "float64"] = "float32"
    count_rows: Literal["each", "first"] = "each"
    keep_one_masked: bool = True
    last_step: Literal["schedule", "all"] = "schedule"
    threshold: float = 0.9
    factor: float = 1.0
    time_eps: float = 1e-3
    cut: Literal["strict", "inclusive", "exact"] = "exact"
    block_scope: Literal["block", "prefix"] = "block"
    revise: bool = False
    sample_temperature: float = 1.0
    sample_anneal: Anneal = "constant"
    greedy_on: Literal["logits", "probs"] = "logits"
    filters: tuple[Filter, ...] = ()
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    vocab_slice: tuple[int, int] | None = None
    banned_ids: tuple[int, ...] = ()
    ban_mask_token: bool = False
    score: Score = "log_prob"
    score_temperature: float | None = 1.0
    score_filtered: bool = False
    score_dtype: Literal["logits", "float32", "float64"] = "float32"
    choice_temperature: float = 0.0
    choice_anneal: Anneal = "linear"

    def __post_init__(self) -> None:
        for field in ("filters", "banned_ids", "vocab_slice"):
            value = getattr(self, field)
            if isinstance(value, list):  # from JSON
                object.__setattr__(self, field, tuple(value))
            elif not isinstance(value, tuple) and not (field == "vocab_slice" and value is None):
                raise ValueError(f"StepRule.{field}: expected a tuple, got {value!r}")
        for field in ("keep_one_masked", "ban_mask_token", "score_filtered", "revise"):
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
        object.__setattr__(self, "_encoded", json.dumps(dataclasses.asdict(self)))

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
        from .presets import PRESETS

        if name not in PRESETS:
            raise ValueError(
                f"rule: expected a StepRule or one of {', '.join(PRESETS)}, got {name!r}"
            )
        return PRESETS[name]

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Names of all presets."""
        from .presets import PRESETS

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


def as_rule(rule: StepRule | str) -> StepRule:
    """`rule` itself, or the preset of that name; TypeError for anything else."""
    if isinstance(rule, StepRule):
        return rule
    if isinstance(rule, str):
        return StepRule.preset(rule)
    raise TypeError(f"rule: expected a StepRule or a preset name, got {type(rule).__name__}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(rule: StepRule) -> None:
    for field in ("sample_temperature", "choice_temperature", "factor"):
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
    if not _is_number(rule.threshold):
        raise ValueError(f"StepRule.threshold: expected a finite number, got {rule.threshold!r}")
    if not _is_number(rule.time_eps) or not 0 < rule.time_eps < 1:
        raise ValueError(f"StepRule.time_eps: expected a number in (0, 1), got {rule.time_eps!r}")
    piece = rule.vocab_slice
    if piece is not None and not (
        len(piece) == 2 and all(isinstance(i, int) for i in piece) and 0 <= piece[0] < piece[1]
    ):
        raise ValueError(
            f"StepRule.vocab_slice: expected None or (start, stop) with 0 <= start < stop, got {piece!r}"
        )
    if not all(isinstance(i, int) and i >= 0 for i in rule.banned_ids):
        raise ValueError(f"StepRule.banned_ids: expected integers >= 0, got {rule.banned_ids!r}")


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
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"StepRule.top_k: expected an integer >= 1, got {value!r}")
        elif not _is_number(value) or not 0 < value <= 1:
            raise ValueError(f"StepRule.{field}: expected a number in (0, 1], got {value!r}")


class StepNoise(NamedTuple):
    """The caller's own standard Gumbel noise, in place of the counter-based draw.

    token_gumbel: (B, N, V), added as l + temperature * g; V is the width after vocab_slice.
    choice_gumbel: (B, N), for the noise on the confidence and for random scores.
    Either may be None where the rule does not use it.  Floating, same library as the logits.
    """

    token_gumbel: Any = None
    choice_gumbel: Any = None


class StepInputs(NamedTuple):
    """What a backend's `decode_step` and `sample_tokens` get, checked, in the backend's arrays.

    logits (B, N, V) after vocab_slice, tokens (B, N) int64, eligible (B, N) bool (the masked
    positions that take part), num_masked_at_start (B,), seeds (B, 2) uint32 key words or None,
    positions (B, N) Philox position words, noise or None, uncond_logits or None.  scores (B, N)
    where the rule's score is "given".  With `drawn` (B, N), candidates or -1, there are no logits
    and `scores` are those of the candidates.
    """

    logits: Any
    tokens: Any
    eligible: Any
    num_masked_at_start: Any
    seeds: Any
    positions: Any
    token_gumbel: Any
    choice_gumbel: Any
    uncond_logits: Any
    guidance_scale: float
    mask_token_id: int
    scores: Any = None
    drawn: Any = None


class StepResult(NamedTuple):
    """What one decode step returns; arrays of the kind and on the device that went in.

    next_tokens: (B, N), the sequence with the committed candidates, the rest masked again.
    candidate_tokens: (B, N), every eligible position filled in: MaskGIT's final image.
    confidence: (B, N) float32 (float64 where the rule scores in float64), the ranking key with
        its noise; +inf at known positions, -inf at masked positions that were not eligible and
        at rows without a finite logit.
    """

    next_tokens: Any
    candidate_tokens: Any
    confidence: Any


class TokenStats(NamedTuple):
    """What `sample_tokens` returns, all of the shape of the logits without V.

    candidate_tokens: drawn ids in the dtype int64 (int32 in jax without 64-bit integers);
        -1 for a row without a finite logit.
    confidence: the rule's score, without the annealed noise; -inf for such a row.
    log_z: log of the sum of exp(l / score temperature) over the score's distribution.
    """

    candidate_tokens: Any
    confidence: Any
    log_z: Any
