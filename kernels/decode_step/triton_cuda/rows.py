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
    Keys,
    Noise,
    Scales,
    Walked,
    finish,
    keys_of,
    offset_of,
    rounded,
    scored,
    shift_of,
    taking_part,
    top_two,
    wide_scale,
    with_noise,
)
from .tiles import Place, Source, tile

# Triton 3.6 and 3.7 make a leaf's variate in all lanes that share the leaf, unless its sum is moved to one
# thread; 3.9 does so by itself, and its compiler aborts on this gather
SCATTERS = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9))
LEAST = tl.constexpr(-1000.0)  # exp of it is 0, and so is the product; with -inf it is NaN
FAR = tl.constexpr(
    1e17
)  # a larger sum has a maximum too far above the pivot, more than e^38 times it


@triton.jit
def _scaled(x, pivot, scale, safe: tl.constexpr):
    """scale (x - pivot) with one rounding, or two where the product might overflow."""
    if safe:
        return (x - pivot) * scale
    else:
        return tl.fma(x, scale, -(pivot * scale))


@triton.jit
def _walk(
    source, at, keys, noise, pivot, score_pivot, begin, end, conditions, scales, step,
    spec: tl.constexpr, safe: tl.constexpr,
):  # fmt: skip
    """One walk over leaves [begin, end) of each row, exponentials relative to the pivots [rows].

    Returns what it found, and the mass of what is drawn from, [rows].
    """
    leaves: tl.constexpr = spec.leaves
    vec: tl.constexpr = spec.vec
    R: tl.constexpr = spec.rows * leaves
    C: tl.constexpr = LEAF // vec
    kind: tl.constexpr = tl.float64 if spec.wide else tl.float32
    within = tl.arange(0, R) % leaves
    r = spread(pivot, leaves)[:, None, None]
    rs = spread(score_pivot, leaves)[:, None, None]
    sum_exp, sum_t_exp = tl.zeros([R, C], kind), tl.zeros([R, C], kind)
    mass = tl.zeros([R], tl.float32)
    best, best_leaf = tl.full([R], -1.0, tl.float32), tl.zeros([R], tl.int32)
    top, top_leaf = tl.full([R, C], -float("inf"), tl.float32), tl.zeros([R, C], tl.int32)
    noisy, noisy_leaf = tl.full([R, C], -float("inf"), tl.float64), tl.zeros([R, C], tl.int32)
    first = tl.full([R, C], -float("inf"), tl.float32)
    second = tl.full([R, C], -float("inf"), tl.float32)
    keys = Keys(spread(keys.position, leaves), spread(keys.low, leaves), spread(keys.high, leaves))
    if spec.shifted:
        shift = at.shift
        column = (tl.arange(0, C) * vec)[None, :, None] + tl.arange(0, vec)[None, None, :]
        own = (column >= tl.max(shift, 0)[None, :, :]).to(tl.float32)  # of one row
    for leaf in range(begin, end, leaves):
        x, index = tile(source, at, leaf, C, spec, safe)
        xf = survivors(x, index, conditions, spec)
        number = leaf + within
        if spec.needs_z:
            y = scored(xf, x, index, spec)
            if spec.wide:
                t = (y.to(tl.float64) - rs.to(tl.float64)) * wide_scale(scales)
                e = tl.exp(t)
            else:
                t = _scaled(y, rs, scales.score, safe)
                e = tl.exp2(t)
            sum_exp += tl.sum(e, 2)
            if spec.score == "neg_entropy":
                sum_t_exp += tl.sum(e * tl.maximum(t, LEAST), 2)
            if spec.score == "margin":
                nothing = tl.full(y.shape, -float("inf"), tl.float32)
                one, two = tl.reduce((y, nothing), 2, top_two)  # of each chunk
                first, second = top_two(first, second, one, two)
            if spec.score == "top1_prob":
                first = tl.maximum(first, tl.max(y, 2))
        if spec.draw == "race":
            if spec.shared and spec.needs_z:
                w = e
            else:
                w = tl.exp2(_scaled(xf, r, scales.draw, safe))
            if spec.shifted:  # the leaf's last logits lie in the tile's next leaf
                if spec.rows > 1:
                    own = (column >= shift).to(tl.float32)
                sums = tl.sum(tl.sum(w * own, 2), 1)
                x, index = tile(source, at, leaf + 1, 1, spec, safe)
                xf = survivors(x, index, conditions, spec)
                w = tl.exp2(_scaled(xf, r, scales.draw, safe))
                rest = tl.arange(0, vec)[None, None, :] < shift
                sums += tl.sum(tl.sum(tl.where(rest, w, 0.0), 2), 1)
            else:
                sums = tl.sum(tl.sum(w, 2), 1)
            mass += sums
            if SCATTERS:
                sums = tl.gather(sums, tl.arange(0, R), 0)
            ratio = over(
                sums, exponential(number, keys.position, step, STREAM_LEAF, keys.low, keys.high)
            )
            better = ratio > best
            best, best_leaf = tl.where(better, ratio, best), tl.where(better, number, best_leaf)
        else:
            largest = tl.max(xf, 2)
            better = largest > top
            top = tl.where(better, largest, top)
            top_leaf = tl.where(better, number[:, None], top_leaf)
        if spec.draw == "noise":
            largest = tl.max(with_noise(xf, index, noise, scales.temperature, source.vocab), 2)
            better = largest > noisy
            noisy = tl.where(better, largest, noisy)
            noisy_leaf = tl.where(better, number[:, None], noisy_leaf)
        if spec.draw == "greedy_probs":
            mass += tl.sum(tl.sum(tl.exp2((xf - r) * LOG2E), 2), 1)
    top_key, top_at = _best(top, top_leaf, leaves)
    if spec.draw == "race":
        key, key_at = _best(best[:, None], best_leaf[:, None], leaves)
    elif spec.draw == "noise":
        key, key_at = _best(noisy, noisy_leaf, leaves)
    else:
        key, key_at = top_key, top_at
    first, second = tl.reduce((first, second), 1, top_two)
    first, second = tl.reduce((by_row(first, leaves), by_row(second, leaves)), 1, top_two)
    sum_exp = tl.sum(by_row(tl.sum(sum_exp, 1), leaves), 1)
    sum_t_exp = tl.sum(by_row(tl.sum(sum_t_exp, 1), leaves), 1)
    walked = Walked(key, key_at, top_key, top_at, sum_exp, sum_t_exp, first, second)
    return walked, tl.sum(by_row(mass, leaves), 1)


@triton.jit
def _best(keys, at, leaves: tl.constexpr):
    """(largest key, lowest leaf that has it), [rows], of [R, C]."""
    top = tl.max(by_row(tl.max(keys, 1), leaves), 1)
    found = tl.where(keys == spread(top, leaves)[:, None], at, BIG)
    return top, tl.min(by_row(tl.min(found, 1), leaves), 1)


@triton.jit
def _maxima(source, at, begin, end, spec: tl.constexpr):
    """(largest logit, largest finite logit) of each row, [rows]."""
    leaves: tl.constexpr = spec.leaves
    R: tl.constexpr = spec.rows * leaves
    top = tl.full([R], -float("inf"), tl.float32)
    finite = tl.full([R], -float("inf"), tl.float32)
    for leaf in range(begin, end, leaves):
        x, _ = tile(source, at, leaf, LEAF // spec.vec, spec, False)
        x = tl.where(x == x, x, -float("inf"))
        top = tl.maximum(top, tl.max(tl.max(x, 2), 1))
        x = tl.where(x < float("inf"), x, -float("inf"))
        finite = tl.maximum(finite, tl.max(tl.max(x, 2), 1))
    top, finite = tl.max(by_row(top, leaves), 1), tl.max(by_row(finite, leaves), 1)
    return tl.minimum(top, FLOAT_MAX), finite


@triton.jit
def _largest_scored(source, at, conditions, begin, end, spec: tl.constexpr):
    leaves: tl.constexpr = spec.leaves
    R: tl.constexpr = spec.rows * leaves
    top = tl.full([R], -float("inf"), tl.float32)
    for leaf in range(begin, end, leaves):
        x, index = tile(source, at, leaf, LEAF // spec.vec, spec, True)
        x = scored(survivors(x, index, conditions, spec), x, index, spec)
        top = tl.maximum(top, tl.max(tl.max(x, 2), 1))
    return tl.max(by_row(top, leaves), 1)


@triton.jit
def _first_of_probs(source, at, conditions, pivot, mass, end, spec: tl.constexpr):
    """Dream's argmax: the first token whose rounded probability is the largest one's, [rows]."""
    leaves: tl.constexpr = spec.leaves
    kind: tl.constexpr = source.logits.dtype.element_ty
    r, m = spread(pivot, leaves)[:, None, None], spread(mass, leaves)[:, None, None]
    largest = rounded(tl.div_rn(mass * 0.0 + 1.0, mass), kind, spec)
    bound = spread(largest, leaves)[:, None, None]
    rows: tl.constexpr = spec.rows
    token = tl.full([rows], BIG, tl.int32)
    for leaf in range(0, end, leaves):
        x, index = tile(source, at, leaf, LEAF // spec.vec, spec, True)
        x = survivors(x, index, conditions, spec)
        p = rounded(tl.div_rn(tl.exp2((x - r) * LOG2E), m + x * 0.0), kind, spec)
        found = tl.where(p >= bound, index, BIG)
        token = tl.minimum(token, tl.min(by_row(tl.min(tl.min(found, 2), 1), leaves), 1))
    return token


@triton.jit
def _safely(source, at, keys, noise, live, begin, end, scales, step, spec: tl.constexpr):
    """(both pivots, whether there is a logit, a finite one, conditions, what the walk found)."""
    top, finite = _maxima(source, at, begin, end, spec)
    present, alive = live & (top > -float("inf")), live & (finite > -float("inf"))
    pivot = tl.where(present, top, 0.0)
    score_pivot = pivot
    conditions = find_conditions(source, at, pivot, scales.filter, end, spec)
    score_banned: tl.constexpr = spec.score_banned
    if len(score_banned) > 0:
        shown = _largest_scored(source, at, conditions, begin, end, spec)
        score_pivot = tl.where(shown > -float("inf"), shown, pivot)
    walked, mass = _walk(
        source, at, keys, noise, pivot, score_pivot, begin, end, conditions, scales, step,
        spec, True,
    )  # fmt: skip
    if spec.draw == "greedy_probs":
        token = _first_of_probs(source, at, conditions, pivot, mass, end, spec)
        key, _, top, top_leaf, sum_exp, sum_t_exp, first, second = walked
        walked = Walked(key, token, top, top_leaf, sum_exp, sum_t_exp, first, second)
    return pivot, score_pivot, present, alive, conditions, walked


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sample_kernel(
    logits, uncond, noise, tokens, eligible, seeds, positions, drawn, score, log_z, parts,
    num_rows, length, vocab, stride_b, stride_n, stride_v, misalignment, uncond_stride_b, uncond_stride_n,
    uncond_stride_v, noise_stride_b, noise_stride_n, noise_stride_v, mask_token_id, mask_column,
    vocab_start, step, guidance, temperature, draw_scale, score_scale, score_scale_low,
    filter_scale, spec: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, splits): candidates and scores, or with splits what `merged` makes them from."""
    rows: tl.constexpr = spec.rows
    leaves: tl.constexpr = spec.leaves
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    split = tl.program_id(1)
    live, own, is_own = taking_part(
        tokens, eligible, row, num_rows, mask_token_id, vocab_start, spec
    )
    if spec.splits == 1:  # what is left where nothing is drawn
        outside = (row < num_rows) & ~live
        tl.store(drawn + row, (row * 0 - 1).to(drawn.dtype.element_ty), mask=outside)
        nothing = (row * 0.0 - float("inf")).to(score.dtype.element_ty)
        tl.store(score + row, nothing, mask=outside)
        if log_z is not None:
            tl.store(log_z + row, nothing, mask=outside)
    if tl.sum(live.to(tl.int32), 0) > 0:
        source = Source(logits, uncond, stride_v, uncond_stride_v, vocab, guidance, mask_column)
        scales = Scales(draw_scale, score_scale, score_scale_low, filter_scale, temperature)
        offset = offset_of(row, length, stride_b, stride_n)
        shift = shift_of(offset, row, misalignment, spec)
        uncond_offset = offset_of(row, length, uncond_stride_b, uncond_stride_n)
        noise_offset = offset_of(row, length, noise_stride_b, noise_stride_n)
        at = Place(
            spread(offset - shift, leaves)[:, None, None],
            spread(uncond_offset, leaves)[:, None, None],
            spread(shift, leaves)[:, None, None],
            spread(live, leaves)[:, None, None],
        )
        noise_at = Noise(noise, spread(noise_offset, leaves)[:, None, None], noise_stride_v)
        keys = keys_of(seeds, positions, row, length, live)
        num_leaves = (vocab + LEAF - 1) // LEAF
        if spec.shifted:
            num_leaves = (vocab + spec.vec + LEAF - 2) // LEAF
        share = ((num_leaves + spec.splits - 1) // spec.splits + leaves - 1) // leaves * leaves
        begin = split * share
        end = tl.minimum(begin + share, num_leaves)
        redo = num_rows >= 0
        if spec.quick:
            x, _ = tile(source, at, begin, LEAF // spec.vec, spec, False)
            pivot = tl.max(by_row(tl.max(tl.max(x, 2), 1), leaves), 1)
            pivot = tl.where(live & (begin < end), pivot, 0.0)
            score_pivot, present, alive, conditions = pivot, live, live, ()
            walked, mass = _walk(
                source, at, keys, noise_at, pivot, pivot, begin, end, (), scales, step, spec,
                False,
            )  # fmt: skip
            fine = live
            if spec.needs_z:
                fine = fine & (walked.sum_exp > 0) & (walked.sum_exp < FAR)
            if spec.draw == "race":
                fine = fine & (mass > 0) & (mass < FAR)
            else:
                fine = fine & (walked.top > -float("inf")) & (walked.top < float("inf"))
            redo = tl.sum((live & ~fine).to(tl.int32), 0) > 0
            if redo:
                pivot, score_pivot, present, alive, _none, walked = _safely(
                    source, at, keys, noise_at, live, begin, end, scales, step, spec
                )
        else:
            pivot, score_pivot, present, alive, conditions, walked = _safely(
                source, at, keys, noise_at, live, begin, end, scales, step, spec
            )
        safe = (row * 0 + redo.to(tl.int32)) == 1
        if spec.splits == 1:
            ids, scores, sums = finish(
                source, logits.dtype.element_ty, Place(offset, uncond_offset, shift, alive), own, is_own,
                pivot, score_pivot, safe, walked, conditions, keys,
                Noise(noise, noise_offset[:, None, None], noise_stride_v), scales, step, vocab_start, spec,
            )  # fmt: skip
            tl.store(drawn + row, ids.to(drawn.dtype.element_ty), mask=live)
            tl.store(score + row, scores.to(score.dtype.element_ty), mask=live)
            if log_z is not None:
                tl.store(log_z + row, sums.to(log_z.dtype.element_ty), mask=live)
        else:
            place = parts + row * spec.splits + split
            each = num_rows * spec.splits
            tl.store(place, tl.where(present, pivot, -float("inf")), mask=live)
            tl.store(place + each, safe.to(tl.float32), mask=live)
            tl.store(place + 2 * each, walked.key.to(tl.float32), mask=live)
            tl.store(place + 3 * each, walked.leaf.to(tl.float32), mask=live)
            tl.store(place + 4 * each, walked.sum_exp.to(parts.dtype.element_ty), mask=live)
            tl.store(place + 5 * each, walked.sum_t_exp.to(parts.dtype.element_ty), mask=live)
            tl.store(place + 6 * each, walked.first, mask=live)
            tl.store(place + 7 * each, walked.second, mask=live)
            tl.store(place + 8 * each, alive.to(tl.float32), mask=live)
