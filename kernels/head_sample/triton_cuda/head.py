"""Head, draw and score in one Triton kernel: logits stay in registers, tile by tile.

For listed rows H (R, D), W (V, D) and bias c, a program owns some rows and a range of leaves (128 columns
of the vocabulary) and for each leaf forms x = H W^T + c, (rows, 128), in float32.  From x, for each row:

    running maximum m, and sums relative to it, rescaled when it moves:
        z = sum exp2(s (x - m)),  t z for the entropy,  the two largest
    race: the leaf's sum over an exponential variate, against the best ratio so far
    greedy: the leaf's maximum, against the largest so far
    where a row's leaf is the new best, its 128 logits go to the row's place in `leaf`: about ln(leaves)
    times a row, 512 bytes each

At the end a program writes six numbers a row; `finish_kernel` merges the programs of a row and runs the
inner races on the stored leaf.  So the draw is that of the other kernels, from logits that were never
rounded to 16 bits.

Which rows: `list_kernel` lists those that take part, on the device.  The list's length decides how
programs are dealt out, so the time follows the masked rows without the host knowing their number.

Two regimes.  More than 64 rows: 128 rows by two leaves, 128 accumulators a thread, each leaf finished on its
own (by one leaf before Hopper, in float32 and for entropies); bound by the tensor cores, and the hidden
states of all rows and some leaves of W lie in L2.  Few rows: W is the left operand, 128 x K by K x 16 or 32,
since tensor cores take at least 64 rows there; bound by reading W, with two programs for each multiprocessor
so that the last ones share the bandwidth.

Limits: rules that filter, that score in float64, that take Dream's argmax of probabilities, that score
held tokens or get injected token noise go through chunked.py.  NaN counts as -inf; an infinite product as
the largest float, which may be a row's only one.
"""

# mypy: ignore-errors

from dataclasses import dataclass

import triton
import triton.language as tl

from ...common.philox.triton_form import LEAF, STREAM_LEAF, exponential, over
from ...common.triton_tools import BIG, FLOAT_MAX
from ...decode_step.triton_cuda.finish import Noise, Scales, Walked, finish, keys_of, top_two
from ...decode_step.triton_cuda.tiles import Place, RowSpec, Source, without

NUM_PARTS = 6


@dataclass(frozen=True)
class HeadSpec:
    """What the head kernel is compiled for.

    rows, depth: rows and columns of head in a product; swap: W is the left operand; pair: two leaves at
    a time, not with swap; even: D is a multiple of `depth`; programs: how many share the work; rule: of
    a RowSpec what follows from the rule.
    """

    rows: int
    depth: int
    swap: bool
    pair: bool
    even: bool
    programs: int
    rule: RowSpec


@triton.jit(do_not_specialize=["num_rows", "mask_token_id"])
def list_kernel(
    tokens, wanted, listed, count, drawn, score, num_rows, mask_token_id, block: tl.constexpr,
    touches_known: tl.constexpr,
):  # fmt: skip
    """One program: the rows that take part, in order, and their number; -1 and -inf for the others."""
    seen = num_rows * 0
    for first in range(0, num_rows, block):
        row = first + tl.arange(0, block)
        inside = row < num_rows
        taken = inside
        if not touches_known:
            token = tl.load(tokens + row, mask=inside, other=0).to(tl.int64)
            taken = taken & (token == mask_token_id)
        if wanted is not None:
            taken = taken & (tl.load(wanted + row, mask=inside, other=0) != 0)
        place = seen + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(listed + place, row, mask=taken)
        tl.store(drawn + row, row * 0 - 1, mask=inside & ~taken)
        tl.store(score + row, row * 0.0 - float("inf"), mask=inside & ~taken)
        seen += tl.sum(taken.to(tl.int32), 0)
    tl.store(count, seen)


@triton.jit
def _dealt(count, leaves, head: tl.constexpr):
    """(blocks of rows, programs for each block) for `count` rows."""
    blocks = tl.maximum((count + head.rows - 1) // head.rows, 1)
    turns = (leaves + 1) // 2 if head.pair else leaves
    return blocks, tl.minimum(tl.maximum(head.programs // blocks, 1), turns)


@triton.jit
def _part(at, first, inside, width, head: tl.constexpr):
    """(n, depth) of a matrix, from column `first` on; `inside` says which rows there are."""
    k = tl.arange(0, head.depth)
    if head.even:
        return tl.load(at + first, mask=inside, other=0.0)
    else:
        return tl.load(at + first, mask=inside & (first + k < width)[None, :], other=0.0)


@triton.jit
def _product(
    hidden, weight, row, live, column, width, vocab, stride_h, stride_w, head: tl.constexpr
):
    """head W^T of some rows and one leaf, (rows, 128) float32, and of the next leaf where head.pair."""
    rows: tl.constexpr = head.rows
    k = tl.arange(0, head.depth)
    h_at = hidden + row.to(tl.int64)[:, None] * stride_h + k[None, :]
    w_at = weight + column.to(tl.int64)[:, None] * stride_w + k[None, :]
    next_at = w_at + LEAF * stride_w.to(tl.int64)
    h_in, w_in, next_in = live[:, None], (column < vocab)[:, None], (column + LEAF < vocab)[:, None]
    if head.swap:
        total = tl.zeros([LEAF, rows], tl.float32)
    else:
        total = tl.zeros([rows, LEAF], tl.float32)
    more = total
    for first in range(0, width, head.depth):
        h = _part(h_at, first, h_in, width, head)
        w = _part(w_at, first, w_in, width, head)
        if head.swap:
            total = tl.dot(w, tl.trans(h), total, input_precision="ieee")
        else:
            total = tl.dot(h, tl.trans(w), total, input_precision="ieee")
        if head.pair:
            w = _part(next_at, first, next_in, width, head)
            more = tl.dot(h, tl.trans(w), more, input_precision="ieee")
    if head.swap:
        total = tl.trans(total)
    return total, more


@triton.jit
def _taken(
    x, leaf, found, leaf_logits, entry, live, bias, vocab, mask_column, keys, step, draw_scale,
    score_scale, head: tl.constexpr,
):  # fmt: skip
    """What is `found` of each row so far, with a leaf's products x (rows, 128) counted in."""
    rule: tl.constexpr = head.rule
    m, sum_exp, sum_t_exp, best, best_leaf, second = found
    column = leaf * LEAF + tl.arange(0, LEAF)
    if bias is not None:
        x += tl.load(bias + column, mask=column < vocab, other=0.0).to(tl.float32)[None, :]
    x = tl.where((column < vocab)[None, :], x, -float("inf"))
    x = without(x, column[None, :], leaf * LEAF, leaf * LEAF + LEAF, mask_column, rule)
    x = tl.minimum(tl.maximum(x, -FLOAT_MAX), FLOAT_MAX)
    top = tl.max(x, 1)
    largest = tl.maximum(m, top)
    if rule.score == "margin":
        _, below = tl.reduce((x, x * 0.0 - FLOAT_MAX), 1, top_two)
        second = tl.maximum(tl.maximum(second, below), tl.minimum(m, top))
    if rule.needs_z:
        t = (x - largest[:, None]) * score_scale
        e = tl.exp2(t)
        behind = (m - largest) * score_scale
        weight_of_old = tl.exp2(behind)
        if rule.score == "neg_entropy":
            sum_t_exp = weight_of_old * (sum_t_exp + tl.where(sum_exp > 0, behind * sum_exp, 0.0))
            sum_t_exp += tl.sum(tl.where(e > 0, e * t, 0.0), 1)
        sums = tl.sum(e, 1)
        sum_exp = sum_exp * weight_of_old + sums
    if rule.draw == "race":
        if not (rule.shared and rule.needs_z):
            sums = tl.sum(tl.exp2((x - largest[:, None]) * draw_scale), 1)
        ratio = over(
            sums,
            exponential(
                best_leaf * 0 + leaf, keys.position, step, STREAM_LEAF, keys.low, keys.high
            ),
        )
        best *= tl.exp2((m - largest) * draw_scale)
        better = (ratio > best) & live & (top > -FLOAT_MAX)
        best = tl.where(better, ratio, best)
    else:
        better = (top > m) & live
    best_leaf = tl.where(better, leaf, best_leaf)
    if tl.sum(better.to(tl.int32), 0) > 0:
        place = entry.to(tl.int64)[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
        tl.store(leaf_logits + place, x, mask=better[:, None])
    return largest, sum_exp, sum_t_exp, best, best_leaf, second


@triton.jit(do_not_specialize=["mask_column", "vocab", "length", "step", "entries"])
def head_kernel(
    hidden, weight, bias, listed, count, seeds, positions, parts, leaf_logits, entries, length, width,
    vocab, stride_h, stride_w, mask_column, step, draw_scale, score_scale, head: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): what `finish_kernel` makes candidates and scores of."""
    rows: tl.constexpr = head.rows
    programs: tl.constexpr = head.programs
    together: tl.constexpr = 2 if head.pair else 1
    total = tl.load(count)
    leaves = (vocab + LEAF - 1) // LEAF
    blocks, splits = _dealt(total, leaves, head)
    for task in range(tl.program_id(0), blocks * splits, programs):
        entry = task * rows + tl.arange(0, rows)
        listing = task % blocks * rows + tl.arange(0, rows)
        live = listing < total
        row = tl.load(listed + listing, mask=live, other=0)
        keys = keys_of(seeds, positions, row, length, live)
        none = tl.zeros([rows], tl.float32)
        least = none - FLOAT_MAX
        found = (least, none, none, none - 1.0, tl.zeros([rows], tl.int32), least)
        # pointers to head are made anew for each leaf: kept, they would not fit into registers
        first, each = task // blocks * together, splits * together
        for leaf in tl.range(first, leaves, each, disable_licm=True):
            column = leaf * LEAF + tl.arange(0, LEAF)
            x, more = _product(
                hidden, weight, row, live, column, width, vocab, stride_h, stride_w, head
            )
            found = _taken(
                x, leaf, found, leaf_logits, entry, live, bias, vocab, mask_column, keys, step,
                draw_scale, score_scale, head,
            )  # fmt: skip
            if head.pair:
                found = _taken(
                    more, leaf + 1, found, leaf_logits, entry, live, bias, vocab, mask_column,
                    keys, step, draw_scale, score_scale, head,
                )  # fmt: skip
        m, sum_exp, sum_t_exp, best, best_leaf, second = found
        at = parts + entry
        tl.store(at, m, mask=live)
        tl.store(at + entries, best, mask=live)
        tl.store(at + 2 * entries, best_leaf.to(tl.float32), mask=live)
        tl.store(at + 3 * entries, sum_exp, mask=live)
        tl.store(at + 4 * entries, sum_t_exp, mask=live)
        tl.store(at + 5 * entries, second, mask=live)


@triton.jit(do_not_specialize=["mask_column", "vocab", "vocab_start", "length", "step", "entries"])
def finish_kernel(
    hidden, listed, count, seeds, positions, parts, leaf_logits, drawn, score, entries, length, vocab,
    mask_column, vocab_start, step, draw_scale, score_scale, most: tl.constexpr, head: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rule.rows rows): candidates and scores of the listed rows."""
    rule: tl.constexpr = head.rule
    few: tl.constexpr = rule.rows
    kind: tl.constexpr = hidden.dtype.element_ty
    listing = tl.program_id(0) * few + tl.arange(0, few)
    total = tl.load(count)
    live = listing < total
    if tl.sum(live.to(tl.int32), 0) > 0:
        leaves = (vocab + LEAF - 1) // LEAF
        blocks, splits = _dealt(total, leaves, head)
        split = tl.arange(0, most)[None, :]
        entry = (split * blocks + (listing // head.rows)[:, None]) * head.rows + (
            listing % head.rows
        )[:, None]
        inside = live[:, None] & (split < splits)
        at = parts + entry
        m = tl.load(at, mask=inside, other=-FLOAT_MAX)
        best = tl.load(at + entries, mask=inside, other=0.0)
        leaf = tl.load(at + 2 * entries, mask=inside, other=0.0).to(tl.int32)
        sum_exp = tl.load(at + 3 * entries, mask=inside, other=0.0)
        sum_t_exp = tl.load(at + 4 * entries, mask=inside, other=0.0)
        second = tl.load(at + 5 * entries, mask=inside, other=-FLOAT_MAX)
        top = tl.max(m, 1)
        alive = live & (top > -FLOAT_MAX)
        behind = m - top[:, None]
        if rule.draw == "race":
            key = tl.where(best > 0, tl.log2(best) + behind * draw_scale, -float("inf"))
        else:
            key = m
        largest = tl.max(key, 1)
        is_best = inside & (key == largest[:, None])
        leaf_at = tl.min(tl.where(is_best, leaf, BIG), 1)
        place = tl.min(tl.where(is_best & (leaf == leaf_at[:, None]), entry, BIG), 1)
        shift = behind * score_scale
        weight = tl.exp2(shift)
        sum_t_exp = tl.sum(tl.where(weight > 0, weight * (sum_t_exp + shift * sum_exp), 0.0), 1)
        sum_exp = tl.sum(weight * sum_exp, 1)
        first, second = tl.reduce((m, second), 1, top_two)
        row = tl.load(listed + listing, mask=live, other=0)
        keys = keys_of(seeds, positions, row, length, live)
        source = Source(leaf_logits, None, 1, 0, vocab, 0.0, mask_column)
        offset = (place - leaf_at).to(tl.int64) * LEAF
        ids, scores, _ = finish(
            source, kind, Place(offset, offset, row * 0, alive), row, row < 0, top, top, live,
            Walked(top, leaf_at, top, leaf_at, sum_exp, sum_t_exp, first, second), (), keys,
            Noise(leaf_logits, offset, 1), Scales(draw_scale, score_scale, 0.0, 1.0, 1.0), step,
            vocab_start, rule,
        )  # fmt: skip
        tl.store(drawn + row, ids.to(tl.int32), mask=live)
        tl.store(score + row, scores, mask=live)
