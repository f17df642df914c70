"""Draw, score and log Z of rows of logits in Triton: one read of the row, nothing of its size written.

For a row l (V,) at temperature T the candidate is the winner of three races (reference.py): over
leaves of 128 logits, 16 groups, 8 tokens.  With a reference r near the row's maximum and s = log2(e)/T,

    leaf race    largest  sum_leaf 2^(s (l - r)) / E     E exponential variates: no logarithm of the sum
    log Z        ln 2 (s r + log2 sum 2^(s (l - r)))
    greedy       largest l, each thread keeping the leaf of the first largest it has seen

Passes.  A program walks its row (or its share of one, or several short rows) in tiles of whole leaves
(tiles.py).  A first walk takes r from the first tile and looks for nothing odd; it needs no
maximum, which is what lets the race keep up with memory.  Should its sum come out as zero, huge or NaN (a
NaN, an infinity, a maximum more than e^38 above r), or does the rule filter, the row is walked again:
for its maximum, for the filters' bounds (filters.py), then with cleaned logits.  At the end the
winning leaf, 256 bytes, is read again for the inner races or the first index of the maximum.

On chip: a sum per thread and, per leaf, the best ratio so far.  Where several programs share a row each
writes nine numbers, and `finish` runs in the kernel that comes next (commit.py).

Limits: V < 2^31.  Tokens less likely than e^-87 of their row enter no sum, nor could they win: a
Gumbel variate is at most 45.05.  Per logit on sm_90: tests/test_triton_compile.py.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from ...common.philox.triton_form import (
    LEAF,
    STREAM_INNER,
    STREAM_LEAF,
    exponential,
    key_words,
    over,
)
from ...common.triton_tools import BIG, FLOAT_MAX, by_row, rounded_to, scalar, spread
from .filters import find_conditions, survivors
from .tiles import elements, tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Triton 3.6 and 3.7 make a leaf's variate in all lanes that share the leaf, unless its sum is moved to one
# thread; 3.9 does so by itself, and its compiler aborts on this gather
SCATTERS = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9))
LEAST = tl.constexpr(-1000.0)  # exp of it is 0, and so is the product; with -inf it is NaN
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
def _scaled(x, reference, scale, safe: tl.constexpr):
    """scale (x - reference) with one rounding, or two where the product might overflow."""
    if safe:
        return (x - reference) * scale
    else:
        return tl.fma(x, scale, -(reference * scale))


@triton.jit
def rounded(value, kind: tl.constexpr, S: tl.constexpr):
    """`value` rounded to the dtype of the logits where the rule scores in that."""
    if S.rounding == "logits":
        return rounded_to(value, kind)
    else:
        return value


@triton.jit
def _noisy(x, index, noise, temperature, vocab):
    """x + temperature g in float64, for noise that the caller injects; -inf where there is none."""
    pointer, row, stride_v = noise
    inside = (x > -float("inf")) & (index >= 0) & (index < vocab)
    g = tl.load(pointer + (row + index.to(tl.int64) * stride_v), mask=inside, other=-float("inf"))
    y = x.to(tl.float64) + scalar(temperature, tl.float64) * g.to(tl.float64)
    return tl.where(y == y, y, -float("inf"))


@triton.jit
def _scored(xf, x, index, S: tl.constexpr):
    """What the score's softmax is taken over."""
    y = xf if S.score_filtered else x
    score_banned: tl.constexpr = S.score_banned
    for i in tl.static_range(len(score_banned)):
        y = tl.where(index == score_banned[i], -float("inf"), y)
    return y


@triton.jit
def _walk(
    source, at, stream, noise, reference, score_reference, begin, end, conditions, scales, step,
    S: tl.constexpr, safe: tl.constexpr,
):  # fmt: skip
    """One walk over leaves [begin, end) of each row, exponentials relative to the references [rows].

    Returns, each [rows]: key and leaf of the best, the largest logit and its leaf, sum of exp, sum
    of t exp(t), the two largest scored logits, mass of what is drawn from.
    """
    leaves: tl.constexpr = S.leaves
    vec: tl.constexpr = S.vec
    R: tl.constexpr = S.rows * leaves
    C: tl.constexpr = LEAF // vec
    kind: tl.constexpr = tl.float64 if S.wide else tl.float32
    draw_scale, score_scale, _, _, temperature = scales
    within = tl.arange(0, R) % leaves
    r = spread(reference, leaves)[:, None, None]
    rs = spread(score_reference, leaves)[:, None, None]
    z, tz = tl.zeros([R, C], kind), tl.zeros([R, C], kind)
    mass = tl.zeros([R], tl.float32)
    best, best_leaf = tl.full([R], -1.0, tl.float32), tl.zeros([R], tl.int32)
    top, top_leaf = tl.full([R, C], -float("inf"), tl.float32), tl.zeros([R, C], tl.int32)
    noisy, noisy_leaf = tl.full([R, C], -float("inf"), tl.float64), tl.zeros([R, C], tl.int32)
    first = tl.full([R, C], -float("inf"), tl.float32)
    second = tl.full([R, C], -float("inf"), tl.float32)
    position, k0, k1 = stream
    position, k0, k1 = spread(position, leaves), spread(k0, leaves), spread(k1, leaves)
    if S.shifted:
        shift = at[2]
        column = (tl.arange(0, C) * vec)[None, :, None] + tl.arange(0, vec)[None, None, :]
        own = (column >= tl.max(shift, 0)[None, :, :]).to(tl.float32)  # of one row
    for leaf in range(begin, end, leaves):
        x, index = tile(source, at, leaf, C, S, safe)
        xf = survivors(x, index, conditions, S)
        number = leaf + within
        if S.needs_z:
            y = _scored(xf, x, index, S)
            if S.wide:
                t = (y.to(tl.float64) - rs.to(tl.float64)) * wide_scale(scales)
                e = tl.exp(t)
            else:
                t = _scaled(y, rs, score_scale, safe)
                e = tl.exp2(t)
            z += tl.sum(e, 2)
            if S.score == "neg_entropy":
                tz += tl.sum(e * tl.maximum(t, LEAST), 2)
            if S.score == "margin":
                nothing = tl.full(y.shape, -float("inf"), tl.float32)
                one, two = tl.reduce((y, nothing), 2, top_two)
                first, second = top_two(first, second, one, two)
            if S.score == "top1_prob":
                first = tl.maximum(first, tl.max(y, 2))
        if S.draw == "race":
            if S.shared and S.needs_z:
                w = e
            else:
                w = tl.exp2(_scaled(xf, r, draw_scale, safe))
            if S.shifted:  # the leaf's last logits lie in the tile's next leaf
                if S.rows > 1:
                    own = (column >= shift).to(tl.float32)
                sums = tl.sum(tl.sum(w * own, 2), 1)
                x, index = tile(source, at, leaf + 1, 1, S, safe)
                xf = survivors(x, index, conditions, S)
                w = tl.exp2(_scaled(xf, r, draw_scale, safe))
                rest = tl.arange(0, vec)[None, None, :] < shift
                sums += tl.sum(tl.sum(tl.where(rest, w, 0.0), 2), 1)
            else:
                sums = tl.sum(tl.sum(w, 2), 1)
            mass += sums
            if SCATTERS:
                sums = tl.gather(sums, tl.arange(0, R), 0)
            ratio = over(sums, exponential(number, position, step, STREAM_LEAF, k0, k1))
            better = ratio > best
            best, best_leaf = tl.where(better, ratio, best), tl.where(better, number, best_leaf)
        else:
            largest = tl.max(xf, 2)
            better = largest > top
            top = tl.where(better, largest, top)
            top_leaf = tl.where(better, number[:, None], top_leaf)
        if S.draw == "noise":
            largest = tl.max(_noisy(xf, index, noise, temperature, source[4]), 2)
            better = largest > noisy
            noisy = tl.where(better, largest, noisy)
            noisy_leaf = tl.where(better, number[:, None], noisy_leaf)
        if S.draw == "greedy_probs":
            mass += tl.sum(tl.sum(tl.exp2((xf - r) * LOG2E), 2), 1)
    top_key, top_at = _best(top, top_leaf, leaves)
    if S.draw == "race":
        key, key_at = _best(best[:, None], best_leaf[:, None], leaves)
    elif S.draw == "noise":
        key, key_at = _best(noisy, noisy_leaf, leaves)
    else:
        key, key_at = top_key, top_at
    one, two = tl.reduce((first, second), 1, top_two)
    one, two = tl.reduce((by_row(one, leaves), by_row(two, leaves)), 1, top_two)
    z = tl.sum(by_row(tl.sum(z, 1), leaves), 1)
    tz = tl.sum(by_row(tl.sum(tz, 1), leaves), 1)
    return key, key_at, top_key, top_at, z, tz, one, two, tl.sum(by_row(mass, leaves), 1)


@triton.jit
def wide_scale(scales):
    """1 / T of the score in float64, from its two float32 parts."""
    return scalar(scales[1], tl.float64) + scalar(scales[2], tl.float64)


@triton.jit
def _best(keys, at, leaves: tl.constexpr):
    """(largest key, lowest leaf that has it), [rows], of [R, C]."""
    top = tl.max(by_row(tl.max(keys, 1), leaves), 1)
    found = tl.where(keys == spread(top, leaves)[:, None], at, BIG)
    return top, tl.min(by_row(tl.min(found, 1), leaves), 1)


@triton.jit
def _maxima(source, at, begin, end, S: tl.constexpr):
    """(largest logit, largest finite logit) of each row, [rows]."""
    leaves: tl.constexpr = S.leaves
    R: tl.constexpr = S.rows * leaves
    top = tl.full([R], -float("inf"), tl.float32)
    finite = tl.full([R], -float("inf"), tl.float32)
    for leaf in range(begin, end, leaves):
        x, _ = tile(source, at, leaf, LEAF // S.vec, S, False)
        x = tl.where(x == x, x, -float("inf"))
        top = tl.maximum(top, tl.max(tl.max(x, 2), 1))
        x = tl.where(x < float("inf"), x, -float("inf"))
        finite = tl.maximum(finite, tl.max(tl.max(x, 2), 1))
    top, finite = tl.max(by_row(top, leaves), 1), tl.max(by_row(finite, leaves), 1)
    return tl.minimum(top, FLOAT_MAX), finite


@triton.jit
def _largest_scored(source, at, conditions, begin, end, S: tl.constexpr):
    leaves: tl.constexpr = S.leaves
    R: tl.constexpr = S.rows * leaves
    top = tl.full([R], -float("inf"), tl.float32)
    for leaf in range(begin, end, leaves):
        x, index = tile(source, at, leaf, LEAF // S.vec, S, True)
        x = _scored(survivors(x, index, conditions, S), x, index, S)
        top = tl.maximum(top, tl.max(tl.max(x, 2), 1))
    return tl.max(by_row(top, leaves), 1)


@triton.jit
def _first_of_probs(source, at, conditions, reference, mass, end, S: tl.constexpr):
    """Dream's argmax: the first token whose rounded probability is the largest one's, [rows]."""
    leaves: tl.constexpr = S.leaves
    kind: tl.constexpr = source[0].dtype.element_ty
    r, m = spread(reference, leaves)[:, None, None], spread(mass, leaves)[:, None, None]
    largest = rounded(tl.div_rn(mass * 0.0 + 1.0, mass), kind, S)
    bound = spread(largest, leaves)[:, None, None]
    rows: tl.constexpr = S.rows
    token = tl.full([rows], BIG, tl.int32)
    for leaf in range(0, end, leaves):
        x, index = tile(source, at, leaf, LEAF // S.vec, S, True)
        x = survivors(x, index, conditions, S)
        p = rounded(tl.div_rn(tl.exp2((x - r) * LOG2E), m + x * 0.0), kind, S)
        found = tl.where(p >= bound, index, BIG)
        token = tl.minimum(token, tl.min(by_row(tl.min(tl.min(found, 2), 1), leaves), 1))
    return token


@triton.jit
def _safely(source, at, stream, noise, live, begin, end, scales, step, S: tl.constexpr):
    """(both references, whether there is a logit, a finite one, conditions, what _walk returns)."""
    top, finite = _maxima(source, at, begin, end, S)
    present, alive = live & (top > -float("inf")), live & (finite > -float("inf"))
    reference = tl.where(present, top, 0.0)
    score_reference = reference
    conditions = find_conditions(source, at, reference, scales[3], end, S)
    score_banned: tl.constexpr = S.score_banned
    if len(score_banned) > 0:
        shown = _largest_scored(source, at, conditions, begin, end, S)
        score_reference = tl.where(shown > -float("inf"), shown, reference)
    key, key_at, top, top_at, z, tz, one, two, mass = _walk(
        source, at, stream, noise, reference, score_reference, begin, end, conditions, scales, step,
        S, True,
    )  # fmt: skip
    if S.draw == "greedy_probs":
        key_at = _first_of_probs(source, at, conditions, reference, mass, end, S)
    stats = (key, key_at, top, top_at, z, tz, one, two)
    return reference, score_reference, present, alive, conditions, stats


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
                y = _noisy(x, index, noise, temperature, source[4])
                usable = (key > -float("inf"))[:, None, None]
                hit = tl.where(usable, y == key[:, None, None], hit)
            token = tl.min(tl.min(tl.where(hit, index, BIG), 2), 1)
    if S.held:
        token = tl.where(is_own, own, token)
    x = elements(source, offset, uncond_offset, token, alive, S)[:, None, None]
    index = token[:, None, None]
    x = _scored(survivors(x, index, conditions, S), x, index, S)
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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sample_kernel(
    logits, uncond, noise, tokens, eligible, seeds, positions, drawn, score, log_z, parts,
    num_rows, length, vocab, stride_b, stride_n, stride_v, head, uncond_stride_b, uncond_stride_n,
    uncond_stride_v, noise_stride_b, noise_stride_n, noise_stride_v, mask_token_id, mask_column,
    vocab_start, step, guidance, temperature, draw_scale, score_scale, score_scale_low,
    filter_scale, S: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, splits): candidates and scores, or with splits what `merged` makes them from."""
    rows: tl.constexpr = S.rows
    leaves: tl.constexpr = S.leaves
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    split = tl.program_id(1)
    live, own, is_own = taking_part(tokens, eligible, row, num_rows, mask_token_id, vocab_start, S)
    if S.splits == 1:  # what is left where nothing is drawn
        outside = (row < num_rows) & ~live
        tl.store(drawn + row, (row * 0 - 1).to(drawn.dtype.element_ty), mask=outside)
        nothing = (row * 0.0 - float("inf")).to(score.dtype.element_ty)
        tl.store(score + row, nothing, mask=outside)
        if log_z is not None:
            tl.store(log_z + row, nothing, mask=outside)
    if tl.sum(live.to(tl.int32), 0) > 0:
        source, places = (logits, uncond, stride_v, uncond_stride_v, vocab, guidance, mask_column), (
            stride_b, stride_n,
        )  # fmt: skip
        scales = (draw_scale, score_scale, score_scale_low, filter_scale, temperature)
        offset, aligned, shift = offsets(row, num_rows, length, places, head, S)
        uncond_offset = (row // length).to(tl.int64) * uncond_stride_b
        uncond_offset += (row % length).to(tl.int64) * uncond_stride_n
        noise_offset = (row // length).to(tl.int64) * noise_stride_b
        noise_offset += (row % length).to(tl.int64) * noise_stride_n
        at = (
            spread(aligned, leaves)[:, None, None], spread(uncond_offset, leaves)[:, None, None],
            spread(shift, leaves)[:, None, None], spread(live, leaves)[:, None, None],
        )  # fmt: skip
        noise_at = (noise, spread(noise_offset, leaves)[:, None, None], noise_stride_v)
        stream = stream_of(seeds, positions, row, length, live)
        num_leaves = (vocab + LEAF - 1) // LEAF
        if S.shifted:
            num_leaves = (vocab + S.vec + LEAF - 2) // LEAF
        share = ((num_leaves + S.splits - 1) // S.splits + leaves - 1) // leaves * leaves
        begin = split * share
        end = tl.minimum(begin + share, num_leaves)
        redo = num_rows >= 0
        if S.quick:
            x, _ = tile(source, at, begin, LEAF // S.vec, S, False)
            reference = tl.max(by_row(tl.max(tl.max(x, 2), 1), leaves), 1)
            reference = tl.where(live & (begin < end), reference, 0.0)
            score_reference, present, alive, conditions = reference, live, live, ()
            key, key_at, top, top_at, z, tz, one, two, mass = _walk(
                source, at, stream, noise_at, reference, reference, begin, end, (), scales, step, S,
                False,
            )  # fmt: skip
            fine = live
            if S.needs_z:
                fine = fine & (z > 0) & (z < 1e17)
            if S.draw == "race":
                fine = fine & (mass > 0) & (mass < 1e17)
            else:
                fine = fine & (top > -float("inf")) & (top < float("inf"))
            redo = tl.sum((live & ~fine).to(tl.int32), 0) > 0
            if redo:
                reference, score_reference, present, alive, _none, stats = _safely(
                    source, at, stream, noise_at, live, begin, end, scales, step, S
                )
                key, key_at, top, top_at, z, tz, one, two = stats
        else:
            reference, score_reference, present, alive, conditions, stats = _safely(
                source, at, stream, noise_at, live, begin, end, scales, step, S
            )
            key, key_at, top, top_at, z, tz, one, two = stats
        safe = (row * 0 + redo.to(tl.int32)) == 1
        if S.splits == 1:
            noise_at = (noise, noise_offset[:, None, None], noise_stride_v)
            ids, scores, sums = finish(
                source, logits.dtype.element_ty, offset, uncond_offset, shift, alive, own, is_own, reference,
                score_reference, safe, (key, key_at, top, top_at, z, tz, one, two), conditions,
                stream, noise_at, scales, step, vocab_start, S,
            )  # fmt: skip
            tl.store(drawn + row, ids.to(drawn.dtype.element_ty), mask=live)
            tl.store(score + row, scores.to(score.dtype.element_ty), mask=live)
            if log_z is not None:
                tl.store(log_z + row, sums.to(log_z.dtype.element_ty), mask=live)
        else:
            place = parts + row * S.splits + split
            each = num_rows * S.splits
            tl.store(place, tl.where(present, reference, -float("inf")), mask=live)
            tl.store(place + each, safe.to(tl.float32), mask=live)
            tl.store(place + 2 * each, key.to(tl.float32), mask=live)
            tl.store(place + 3 * each, key_at.to(tl.float32), mask=live)
            tl.store(place + 4 * each, z.to(parts.dtype.element_ty), mask=live)
            tl.store(place + 5 * each, tz.to(parts.dtype.element_ty), mask=live)
            tl.store(place + 6 * each, one, mask=live)
            tl.store(place + 7 * each, two, mask=live)
            tl.store(place + 8 * each, alive.to(tl.float32), mask=live)


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
