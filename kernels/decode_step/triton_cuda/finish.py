"""What comes after the walks over a row in Triton: the winner's token, its score, log Z; and what rows share.

rows.py has the derivation.  `finish` runs in its kernel, in the head's, and in the commit's where several
programs shared a row, whose shares `merged` puts together.
"""

# mypy: ignore-errors

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...common.philox.triton_form import LEAF, STREAM_INNER, exponential, key_words, over
from ...common.triton_tools import BIG, rounded_to, scalar
from .filters import survivors
from .tiles import elements

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNSPECIALIZED = [
    "step",
    "mask_token_id",
    "mask_column",
    "vocab_start",
    "num_rows",
    "length",
    "vocab",
]
NUM_PARTS = 9  # numbers that a program writes of its share of a row


class Scales(NamedTuple):
    """log2(e) / T of the draw, of the score (in float64 1 / T as two float32), of filters; T of the draw."""

    draw: Any
    score: Any
    score_low: Any
    filter: Any
    temperature: Any


class Keys(NamedTuple):
    """The position word and the two key words of each row's random numbers."""

    position: Any
    low: Any
    high: Any


class Noise(NamedTuple):
    """The caller's noise: a pointer, where each row starts, the stride of its columns."""

    pointer: Any
    row: Any
    stride: Any


class Walked(NamedTuple):
    """What a walk over each row has found, [rows].

    key, leaf: the largest race key, or logit with its noise, and its leaf; top, top_leaf: the largest
    logit; sum_exp, sum_t_exp: of exp(t) and t exp(t), t being logits scaled from the pivot;
    first, second: the two largest that are scored.
    """

    key: Any
    leaf: Any
    top: Any
    top_leaf: Any
    sum_exp: Any
    sum_t_exp: Any
    first: Any
    second: Any


@triton.jit
def top_two(a, a2, b, b2):
    """The two largest of two pairs, for a reduction."""
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(a2, b2))


@triton.jit
def keys_of(seeds, positions, row, length, live):
    """The keys of rows, uint32 [rows]; zeros where nothing is drawn."""
    position = (row % length).to(tl.uint32)
    if positions is not None:
        position = tl.load(positions + row, mask=live, other=0).to(tl.uint32)
    low, high = position * 0, position * 0
    if seeds is not None:
        low, high = key_words(seeds, tl.where(live, row // length, 0))
    return Keys(position, low, high)


@triton.jit
def rounded(value, kind: tl.constexpr, spec: tl.constexpr):
    """`value` rounded to the dtype of the logits where the rule scores in that."""
    if spec.rounding == "logits":
        return rounded_to(value, kind)
    else:
        return value


@triton.jit
def with_noise(x, index, noise, temperature, vocab):
    """x + temperature g in float64, for noise that the caller injects; -inf where there is none."""
    inside = (x > -float("inf")) & (index >= 0) & (index < vocab)
    g = tl.load(
        noise.pointer + (noise.row + index.to(tl.int64) * noise.stride),
        mask=inside,
        other=-float("inf"),
    )
    y = x.to(tl.float64) + scalar(temperature, tl.float64) * g.to(tl.float64)
    return tl.where(y == y, y, -float("inf"))


@triton.jit
def scored(xf, x, index, spec: tl.constexpr):
    """What the score's softmax is taken over."""
    y = xf if spec.score_filtered else x
    score_banned: tl.constexpr = spec.score_banned
    for i in tl.static_range(len(score_banned)):
        y = tl.where(index == score_banned[i], -float("inf"), y)
    return y


@triton.jit
def wide_scale(scales):
    """1 / T of the score in float64, from its two float32 parts."""
    return scalar(scales.score, tl.float64) + scalar(scales.score_low, tl.float64)


@triton.jit
def _race(x, leaf, keys, step, draw_scale, spec: tl.constexpr):
    """(token, its logit), [rows], of the leaf x [rows, 8, 16]: a race of groups, then one of tokens."""
    rows: tl.constexpr = spec.rows
    groups, tokens = tl.arange(0, 16), tl.arange(0, 8)
    top = tl.max(tl.max(x, 2), 1)
    top = tl.where(top > -float("inf"), top, 0.0)
    w = tl.exp2((x - top[:, None, None]) * draw_scale)
    number = tl.broadcast_to(groups[None, :], [rows, 16])
    spare = number.to(tl.uint32) * 0
    e = exponential(
        number, keys.position[:, None] + spare, step, STREAM_INNER, keys.low[:, None] + spare,
        keys.high[:, None] + spare,
    )  # fmt: skip
    group = tl.argmax(over(tl.sum(w, 1), e), 1)
    chosen = groups[None, None, :] == group[:, None, None]
    number = tl.broadcast_to(16 + tokens[None, :], [rows, 8])
    spare = number.to(tl.uint32) * 0
    e = exponential(
        number, keys.position[:, None] + spare, step, STREAM_INNER, keys.low[:, None] + spare,
        keys.high[:, None] + spare,
    )  # fmt: skip
    token = tl.argmax(over(tl.sum(tl.where(chosen, w, 0.0), 2), e), 1)
    return leaf * LEAF + token.to(tl.int32) * 16 + group.to(tl.int32)


@triton.jit
def finish(
    source, kind: tl.constexpr, at, own, is_own, pivot, score_pivot, safe, walked, conditions, keys, noise,
    scales, step, vocab_start, spec: tl.constexpr,
):  # fmt: skip
    """(token id or -1, score, log Z), [rows], from what the walks over each row have found.

    `kind` is the dtype of the logits, which scores may be rounded to; `at` is a `Place` of [rows].
    """
    sum_exp, alive = walked.sum_exp, at.live
    if spec.draw == "greedy_probs":
        token = walked.leaf
    else:
        leaf = walked.leaf
        if spec.draw == "noise":
            leaf = tl.where(walked.key > -float("inf"), walked.leaf, walked.top_leaf)
        start = leaf * LEAF
        if spec.draw != "race":  # leaves of the tile, not of the row
            start -= at.shift
        inner = tl.arange(0, 8)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        index = start[:, None, None] + inner
        x = elements(
            source, at.row[:, None, None], at.uncond_row[:, None, None], index,
            alive[:, None, None], spec,
        )  # fmt: skip
        x = survivors(x, index, conditions, spec)
        if spec.draw == "race":
            token = _race(x, leaf, keys, step, scales.draw, spec)
        else:
            hit = x == walked.top[:, None, None]
            if spec.draw == "noise":
                y = with_noise(x, index, noise, scales.temperature, source.vocab)
                usable = (walked.key > -float("inf"))[:, None, None]
                hit = tl.where(usable, y == walked.key[:, None, None], hit)
            token = tl.min(tl.min(tl.where(hit, index, BIG), 2), 1)
    if spec.held:
        token = tl.where(is_own, own, token)
    x = elements(source, at.row, at.uncond_row, token, alive, spec)[:, None, None]
    index = token[:, None, None]
    x = scored(survivors(x, index, conditions, spec), x, index, spec)
    x = tl.sum(tl.sum(x, 2), 1)
    alive_score = alive & (token >= 0) & (token < source.vocab) if spec.held else alive
    none = sum_exp == 0
    if spec.wide:
        low, wide = score_pivot.to(tl.float64), wide_scale(scales)
        t = (x.to(tl.float64) - low) * wide
        t1, t2 = (
            (walked.first.to(tl.float64) - low) * wide,
            (walked.second.to(tl.float64) - low) * wide,
        )
        p, p1, p2 = tl.exp(t), tl.exp(t1), tl.exp(t2)
        log_sum = tl.log(sum_exp)
        log_z = low * wide + log_sum
        mean = walked.sum_t_exp
    else:
        t = _either(x, score_pivot, scales.score, safe)
        t1 = _either(walked.first, score_pivot, scales.score, safe)
        t2 = _either(walked.second, score_pivot, scales.score, safe)
        p, p1, p2 = tl.exp2(t), tl.exp2(t1), tl.exp2(t2)
        log_sum = tl.log2(sum_exp) * LN2
        log_z = (score_pivot * scales.score) * LN2 + log_sum
        t, mean = t * LN2, walked.sum_t_exp * LN2
    if spec.score == "logit":
        score = x.to(sum_exp.dtype)
    elif spec.score == "prob":
        score = tl.where(none, 0.0, _quotient(p, sum_exp))
    elif spec.score == "log_prob":
        score = t - log_sum
    elif spec.score == "top1_prob":
        score = _quotient(p1, sum_exp)
    elif spec.score == "margin":
        score = rounded(_quotient(p1, sum_exp), kind, spec) - rounded(
            _quotient(p2, sum_exp), kind, spec
        )
    elif spec.score == "neg_entropy":
        score = _quotient(mean, sum_exp) - log_sum
    else:
        score = sum_exp * 0.0
    if spec.score != "prob" and spec.needs_z:
        score = tl.where(none, -float("inf"), score)
    score = tl.where(alive_score, rounded(score, kind, spec), -float("inf"))
    drawn = tl.where(alive, token + vocab_start, -1)
    if spec.held:
        drawn = tl.where(is_own, own + vocab_start, drawn)
    return drawn, score, tl.where(alive, log_z, -float("inf"))


@triton.jit
def _either(x, pivot, scale, safe):
    return tl.where(safe, (x - pivot) * scale, tl.fma(x, scale, -(pivot * scale)))


@triton.jit
def _quotient(a, b):
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def offset_of(row, length, stride_b, stride_n):
    """Where each row starts, in elements."""
    return (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_n


@triton.jit
def shift_of(offset, row, misalignment, spec: tl.constexpr):
    """Logits between each row's first one and the aligned place before it."""
    shift = row * 0
    if spec.shifted:
        vec: tl.constexpr = spec.vec
        shift = ((offset + misalignment) & (vec - 1)).to(tl.int32)
    return shift


@triton.jit
def merged(parts, row, num_rows, live, scales, spec: tl.constexpr):
    """The shares of each row put together: (pivot, safe, alive, what one walk would have found)."""
    splits: tl.constexpr = spec.splits
    place = parts + row[:, None] * splits + tl.arange(0, splits)[None, :]
    each, mask = num_rows * splits, live[:, None] & (tl.arange(0, splits)[None, :] >= 0)
    pivot = tl.load(place, mask=mask, other=-float("inf")).to(tl.float32)
    safe = tl.load(place + each, mask=mask, other=0.0)
    key = tl.load(place + 2 * each, mask=mask, other=-float("inf")).to(tl.float32)
    key_at = tl.load(place + 3 * each, mask=mask, other=0.0).to(tl.int32)
    sum_exp = tl.load(place + 4 * each, mask=mask, other=0.0)
    sum_t_exp = tl.load(place + 5 * each, mask=mask, other=0.0)
    first = tl.load(place + 6 * each, mask=mask, other=-float("inf")).to(tl.float32)
    second = tl.load(place + 7 * each, mask=mask, other=-float("inf")).to(tl.float32)
    finite = tl.load(place + 8 * each, mask=mask, other=0.0)
    has = pivot > -float("inf")
    top = tl.max(pivot, 1)
    alive = live & (tl.max(finite, 1) > 0)
    top = tl.where(top > -float("inf"), top, 0.0)
    behind = tl.where(has, pivot - top[:, None], -float("inf"))
    if spec.wide:
        shift = behind.to(tl.float64) * wide_scale(scales)
        weight = tl.exp(shift)
    else:
        shift = behind * scales.score
        weight = tl.exp2(shift)
    sum_t_exp = tl.where(
        weight > 0, weight * (sum_t_exp + tl.where(has, shift, 0.0) * sum_exp), 0.0
    )
    sum_exp = tl.where(weight > 0, weight * sum_exp, 0.0)
    if spec.draw == "race":
        key = tl.where(has & (key > 0), tl.log2(key) + behind * scales.draw, -float("inf"))
    else:
        key = tl.where(has, key, -float("inf"))
    best = tl.max(key, 1)
    at = tl.min(tl.where(key == best[:, None], key_at, BIG), 1)
    is_safe = tl.max(tl.where(pivot == top[:, None], safe, 0.0), 1) > 0
    first, second = tl.reduce((first, second), 1, top_two)
    walked = Walked(best, at, best, at, tl.sum(sum_exp, 1), tl.sum(sum_t_exp, 1), first, second)
    return top, is_safe, alive, walked


@triton.jit
def taking_part(
    tokens, eligible, row, num_rows, mask_token_id, vocab_start, spec: tl.constexpr
):  # fmt: skip
    """(which rows are walked, the column of the token each holds, whether it is scored by that)."""
    live, own, is_own = row < num_rows, row, row < 0
    if tokens is not None:
        token = tl.load(tokens + row, mask=live, other=0).to(tl.int64)
        is_own = live & (token != mask_token_id) & spec.held
        own = (token - vocab_start).to(tl.int32)
        if not spec.touches_known:
            live = live & (token == mask_token_id)
        if eligible is not None:
            live = live & (tl.load(eligible + row, mask=live, other=0) != 0)
    return live, own, is_own
