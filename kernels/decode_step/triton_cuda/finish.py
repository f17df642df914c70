"""What comes after the walks over a row in Triton: the winner's token, its score, log Z; and what rows share.

rows.py has the derivation.  `finish` runs in its kernel, in the head's, and in the commit's where several
programs shared a row, whose shares `merged` puts together.
"""

# mypy: ignore-errors

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


@triton.jit
def top_two(a, a2, b, b2):
    """The two largest of two pairs, for a reduction."""
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(a2, b2))


@triton.jit
def stream_of(seeds, positions, row, length, live):
    """(position word, two key words) of rows, uint32 [rows]; zeros where nothing is drawn."""
    position = (row % length).to(tl.uint32)
    if positions is not None:
        position = tl.load(positions + row, mask=live, other=0).to(tl.uint32)
    k0, k1 = position * 0, position * 0
    if seeds is not None:
        k0, k1 = key_words(seeds, tl.where(live, row // length, 0))
    return position, k0, k1


@triton.jit
def rounded(value, kind: tl.constexpr, S: tl.constexpr):
    """`value` rounded to the dtype of the logits where the rule scores in that."""
    if S.rounding == "logits":
        return rounded_to(value, kind)
    else:
        return value


@triton.jit
def with_noise(x, index, noise, temperature, vocab):
    """x + temperature g in float64, for noise that the caller injects; -inf where there is none."""
    pointer, row, stride_v = noise
    inside = (x > -float("inf")) & (index >= 0) & (index < vocab)
    g = tl.load(pointer + (row + index.to(tl.int64) * stride_v), mask=inside, other=-float("inf"))
    y = x.to(tl.float64) + scalar(temperature, tl.float64) * g.to(tl.float64)
    return tl.where(y == y, y, -float("inf"))


@triton.jit
def scored(xf, x, index, S: tl.constexpr):
    """What the score's softmax is taken over."""
    y = xf if S.score_filtered else x
    score_banned: tl.constexpr = S.score_banned
    for i in tl.static_range(len(score_banned)):
        y = tl.where(index == score_banned[i], -float("inf"), y)
    return y


@triton.jit
def wide_scale(scales):
    """1 / T of the score in float64, from its two float32 parts."""
    return scalar(scales[1], tl.float64) + scalar(scales[2], tl.float64)


@triton.jit
def _race(x, leaf, stream, step, draw_scale, S: tl.constexpr):
    """(token, its logit), [rows], of the leaf x [rows, 8, 16]: a race of groups, then one of tokens."""
    rows: tl.constexpr = S.rows
    position, k0, k1 = stream
    groups, tokens = tl.arange(0, 16), tl.arange(0, 8)
    top = tl.max(tl.max(x, 2), 1)
    top = tl.where(top > -float("inf"), top, 0.0)
    w = tl.exp2((x - top[:, None, None]) * draw_scale)
    number = tl.broadcast_to(groups[None, :], [rows, 16])
    spare = number.to(tl.uint32) * 0
    e = exponential(
        number, position[:, None] + spare, step, STREAM_INNER, k0[:, None] + spare,
        k1[:, None] + spare,
    )  # fmt: skip
    group = tl.argmax(over(tl.sum(w, 1), e), 1)
    chosen = groups[None, None, :] == group[:, None, None]
    number = tl.broadcast_to(16 + tokens[None, :], [rows, 8])
    spare = number.to(tl.uint32) * 0
    e = exponential(
        number, position[:, None] + spare, step, STREAM_INNER, k0[:, None] + spare,
        k1[:, None] + spare,
    )  # fmt: skip
    token = tl.argmax(over(tl.sum(tl.where(chosen, w, 0.0), 2), e), 1)
    return leaf * LEAF + token.to(tl.int32) * 16 + group.to(tl.int32)


@triton.jit
def finish(
    source, kind: tl.constexpr, offset, uncond_offset, shift, alive, own, is_own, reference,
    score_reference, safe, stats, conditions, stream, noise, scales, step, vocab_start, S: tl.constexpr,
):  # fmt: skip
    """(token id or -1, score, log Z), [rows], from what the walks over each row have found.

    `kind` is the dtype of the logits, which scores may be rounded to.
    """
    draw_scale, score_scale, _, _, temperature = scales
    key, key_at, top, top_at, z, tz, one, two = stats
    if S.draw == "greedy_probs":
        token = key_at
    else:
        at = key_at
        if S.draw == "noise":
            at = tl.where(key > -float("inf"), key_at, top_at)
        start = at * LEAF
        if S.draw != "race":  # leaves of the tile, not of the row
            start -= shift
        inner = tl.arange(0, 8)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        index = start[:, None, None] + inner
        x = elements(
            source, offset[:, None, None], uncond_offset[:, None, None], index,
            alive[:, None, None], S,
        )  # fmt: skip
        x = survivors(x, index, conditions, S)
        if S.draw == "race":
            token = _race(x, at, stream, step, draw_scale, S)
        else:
            hit = x == top[:, None, None]
            if S.draw == "noise":
                y = with_noise(x, index, noise, temperature, source[4])
                usable = (key > -float("inf"))[:, None, None]
                hit = tl.where(usable, y == key[:, None, None], hit)
            token = tl.min(tl.min(tl.where(hit, index, BIG), 2), 1)
    if S.held:
        token = tl.where(is_own, own, token)
    x = elements(source, offset, uncond_offset, token, alive, S)[:, None, None]
    index = token[:, None, None]
    x = scored(survivors(x, index, conditions, S), x, index, S)
    x = tl.sum(tl.sum(x, 2), 1)
    alive_score = alive & (token >= 0) & (token < source[4]) if S.held else alive
    none = z == 0
    if S.wide:
        low, wide = score_reference.to(tl.float64), wide_scale(scales)
        t = (x.to(tl.float64) - low) * wide
        t1, t2 = (one.to(tl.float64) - low) * wide, (two.to(tl.float64) - low) * wide
        p, p1, p2 = tl.exp(t), tl.exp(t1), tl.exp(t2)
        log_sum = tl.log(z)
        log_z = low * wide + log_sum
        mean = tz
    else:
        t = _either(x, score_reference, score_scale, safe)
        t1 = _either(one, score_reference, score_scale, safe)
        t2 = _either(two, score_reference, score_scale, safe)
        p, p1, p2 = tl.exp2(t), tl.exp2(t1), tl.exp2(t2)
        log_sum = tl.log2(z) * LN2
        log_z = (score_reference * score_scale) * LN2 + log_sum
        t, mean = t * LN2, tz * LN2
    if S.score == "logit":
        score = x.to(z.dtype)
    elif S.score == "prob":
        score = tl.where(none, 0.0, _quotient(p, z))
    elif S.score == "log_prob":
        score = t - log_sum
    elif S.score == "top1_prob":
        score = _quotient(p1, z)
    elif S.score == "margin":
        score = rounded(_quotient(p1, z), kind, S) - rounded(_quotient(p2, z), kind, S)
    elif S.score == "neg_entropy":
        score = _quotient(mean, z) - log_sum
    else:
        score = z * 0.0
    if S.score != "prob" and S.needs_z:
        score = tl.where(none, -float("inf"), score)
    score = tl.where(alive_score, rounded(score, kind, S), -float("inf"))
    drawn = tl.where(alive, token + vocab_start, -1)
    if S.held:
        drawn = tl.where(is_own, own + vocab_start, drawn)
    return drawn, score, tl.where(alive, log_z, -float("inf"))


@triton.jit
def _either(x, reference, scale, safe):
    return tl.where(safe, (x - reference) * scale, tl.fma(x, scale, -(reference * scale)))


@triton.jit
def _quotient(a, b):
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def offsets(row, num_rows, length, places, head, S: tl.constexpr):
    """(where each row starts, where the aligned place before it is, the difference), in elements."""
    stride_b, stride_n = places
    offset = (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_n
    shift = row * 0
    if S.shifted:
        vec: tl.constexpr = S.vec
        shift = ((offset + head) & (vec - 1)).to(tl.int32)
    return offset, offset - shift, shift


@triton.jit
def merged(parts, row, num_rows, live, draw_scale, scales, S: tl.constexpr):
    """The shares of each row put together: (reference, safe, alive, what `finish` gets of a walk)."""
    splits: tl.constexpr = S.splits
    place = parts + row[:, None] * splits + tl.arange(0, splits)[None, :]
    each, mask = num_rows * splits, live[:, None] & (tl.arange(0, splits)[None, :] >= 0)
    reference = tl.load(place, mask=mask, other=-float("inf")).to(tl.float32)
    safe = tl.load(place + each, mask=mask, other=0.0)
    key = tl.load(place + 2 * each, mask=mask, other=-float("inf")).to(tl.float32)
    key_at = tl.load(place + 3 * each, mask=mask, other=0.0).to(tl.int32)
    z = tl.load(place + 4 * each, mask=mask, other=0.0)
    tz = tl.load(place + 5 * each, mask=mask, other=0.0)
    one = tl.load(place + 6 * each, mask=mask, other=-float("inf")).to(tl.float32)
    two = tl.load(place + 7 * each, mask=mask, other=-float("inf")).to(tl.float32)
    finite = tl.load(place + 8 * each, mask=mask, other=0.0)
    has = reference > -float("inf")
    top = tl.max(reference, 1)
    alive = live & (tl.max(finite, 1) > 0)
    top = tl.where(top > -float("inf"), top, 0.0)
    behind = tl.where(has, reference - top[:, None], -float("inf"))
    if S.wide:
        shift = behind.to(tl.float64) * wide_scale(scales)
        weight = tl.exp(shift)
    else:
        shift = behind * scales[1]
        weight = tl.exp2(shift)
    tz = tl.where(weight > 0, weight * (tz + tl.where(has, shift, 0.0) * z), 0.0)
    z = tl.where(weight > 0, weight * z, 0.0)
    if S.draw == "race":
        key = tl.where(has & (key > 0), tl.log2(key) + behind * draw_scale, -float("inf"))
    else:
        key = tl.where(has, key, -float("inf"))
    best = tl.max(key, 1)
    at = tl.min(tl.where(key == best[:, None], key_at, BIG), 1)
    is_safe = tl.max(tl.where(reference == top[:, None], safe, 0.0), 1) > 0
    one, two = tl.reduce((one, two), 1, top_two)
    stats = (best, at, best, at, tl.sum(z, 1), tl.sum(tz, 1), one, two)
    return top, is_safe, alive, stats


@triton.jit
def taking_part(
    tokens, eligible, row, num_rows, mask_token_id, vocab_start, S: tl.constexpr
):  # fmt: skip
    """(which rows are walked, the column of the token each holds, whether it is scored by that)."""
    live, own, is_own = row < num_rows, row, row < 0
    if tokens is not None:
        token = tl.load(tokens + row, mask=live, other=0).to(tl.int64)
        is_own = live & (token != mask_token_id) & S.held
        own = (token - vocab_start).to(tl.int32)
        if not S.touches_known:
            live = live & (token == mask_token_id)
        if eligible is not None:
            live = live & (tl.load(eligible + row, mask=live, other=0) != 0)
    return live, own, is_own
