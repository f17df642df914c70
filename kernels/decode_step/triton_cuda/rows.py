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
winning leaf, 256 bytes, is read again (finish.py) for the inner races or the first index of the maximum.

On chip: a sum per thread and, per leaf, the best ratio so far.  Where several programs share a row each
writes nine numbers, and `finish` runs in the kernel that comes next (commit.py).

Limits: V < 2^31.  Tokens less likely than e^-87 of their row enter no sum, nor could they win: a
Gumbel variate is at most 45.05.  Per logit on sm_90: tests/backends/test_triton_compile.py.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from ...common.philox.triton_form import (
    LEAF,
    STREAM_LEAF,
    exponential,
    over,
)
from ...common.triton_tools import BIG, FLOAT_MAX, by_row, spread
from .filters import find_conditions, survivors
from .finish import (
    LOG2E,
    UNSPECIALIZED,
    finish,
    offsets,
    rounded,
    scored,
    stream_of,
    taking_part,
    top_two,
    wide_scale,
    with_noise,
)
from .tiles import tile

# Triton 3.6 and 3.7 make a leaf's variate in all lanes that share the leaf, unless its sum is moved to one
# thread; 3.9 does so by itself, and its compiler aborts on this gather
SCATTERS = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9))
LEAST = tl.constexpr(-1000.0)  # exp of it is 0, and so is the product; with -inf it is NaN


@triton.jit
def _scaled(x, reference, scale, safe: tl.constexpr):
    """scale (x - reference) with one rounding, or two where the product might overflow."""
    if safe:
        return (x - reference) * scale
    else:
        return tl.fma(x, scale, -(reference * scale))


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
            y = scored(xf, x, index, S)
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
            largest = tl.max(with_noise(xf, index, noise, temperature, source[4]), 2)
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
        x = scored(survivors(x, index, conditions, S), x, index, S)
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
