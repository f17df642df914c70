"""Which tokens survive a rule's filters, without a sort: thresholds found by bisection.

Each filter keeps the tokens whose key is above a bound, and of those equal to it the first few.  Keys
are logits, for `typical_p` -|center - x| with the mean of the logits for a center, which orders tokens as
|log p + entropy| does, and has the same bits wherever it is formed.  As unsigned integers in the order of
the floats they have 32 bits, of which logits in 16-bit types use the upper 16 (bfloat16) or 19 (float16):
one pass over the row for each bit, from L1 or L2, where the count (top_k) or the mass (top_p, typical_p)
above a candidate bound is compared with what is asked for.  Where only some of several equal tokens fit,
one more pass finds the last of them.

A condition is a tuple (reference, center, bound, last), each [rows]; a filter is (kind, value,
whether the temperature divides before it).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from ...common.philox.triton_form import LEAF
from ...common.triton_tools import by_row, spread
from .tiles import tile

TOP_K = tl.constexpr(1)
TOP_P = tl.constexpr(2)
MIN_P = tl.constexpr(3)
TYPICAL_P = tl.constexpr(4)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _ordered(key, bits: tl.constexpr):
    """The first bits of a float, as an unsigned integer in the order of the floats."""
    raw = key.to(tl.uint32, bitcast=True)
    flipped = tl.where(raw >= 0x80000000, ~raw, raw | 0x80000000)
    return (flipped >> (32 - bits)) << (32 - bits)


@triton.jit
def _key(x, pivot, center, kind: tl.constexpr):
    if kind == TYPICAL_P:
        return tl.where(x > -float("inf"), -tl.abs(center - (x - pivot)), x)
    else:
        return x


@triton.jit
def _over_leaves(values, leaves: tl.constexpr):
    return spread(values, leaves)[:, None, None]


@triton.jit
def survivors(x, index, conditions, spec: tl.constexpr):
    """`x` [R, ...] with -inf where one of the conditions so far does not hold."""
    leaves: tl.constexpr = x.shape[0] // spec.rows
    filters: tl.constexpr = spec.filters
    for i in tl.static_range(len(conditions)):
        pivot, center, bound, last = conditions[i]
        c = _over_leaves(center, leaves)
        if filters[i][0] == MIN_P:
            x = tl.where(x >= c, x, -float("inf"))
        else:
            key = _key(x, _over_leaves(pivot, leaves), c, filters[i][0])
            key = _ordered(key, 32 if filters[i][0] == TYPICAL_P else spec.bits)
            b = _over_leaves(bound, leaves)
            keep = (key > b) | ((key == b) & (index <= _over_leaves(last, leaves)))
            x = tl.where(keep, x, -float("inf"))
    return x


@triton.jit
def _kept(source, at, leaf, conditions, spec: tl.constexpr):
    x, index = tile(source, at, leaf, LEAF // spec.vec, spec, True)
    return survivors(x, index, conditions, spec), index


@triton.jit
def _total(values, leaves: tl.constexpr):
    """[R, C, VEC] -> [rows]."""
    return tl.sum(by_row(tl.sum(tl.sum(values, 2), 1), leaves), 1)


@triton.jit
def _sums(
    source, at, conditions, pivot, center, above, scale, num_leaves,
    kind: tl.constexpr, exact: tl.constexpr, spec: tl.constexpr,
):  # fmt: skip
    """Of the survivors with a key >= above (exact: equal to it): (their mass, their number), [rows]."""
    leaves: tl.constexpr = spec.leaves
    bits: tl.constexpr = 32 if kind == TYPICAL_P else spec.bits
    mass, count = pivot * 0.0, (pivot * 0.0).to(tl.int32)
    r, c = _over_leaves(pivot, leaves), _over_leaves(center, leaves)
    b = _over_leaves(above, leaves)
    for leaf in range(0, num_leaves, leaves):
        x, _ = _kept(source, at, leaf, conditions, spec)
        key = _ordered(_key(x, r, c, kind), bits)
        taken = ((key == b) if exact else (key >= b)) & (x > -float("inf"))
        mass += _total(tl.where(taken, tl.exp2((x - r) * scale), 0.0), leaves)
        count += _total(taken.to(tl.int32), leaves)
    return mass, count


@triton.jit
def _largest(source, at, conditions, pivot, num_leaves, spec: tl.constexpr):
    """The largest surviving logit of each row."""
    leaves: tl.constexpr = spec.leaves
    top = pivot * 0.0 - float("inf")
    for leaf in range(0, num_leaves, leaves):
        x, _ = _kept(source, at, leaf, conditions, spec)
        top = tl.maximum(top, tl.max(by_row(tl.max(tl.max(x, 2), 1), leaves), 1))
    return top


@triton.jit
def _center(source, at, conditions, pivot, scale, num_leaves, spec: tl.constexpr):
    """The mean of x - pivot over the survivors: scaled, the distance from it is |log p + entropy|."""
    leaves: tl.constexpr = spec.leaves
    sum_exp, sum_t_exp = pivot * 0.0, pivot * 0.0
    r = _over_leaves(pivot, leaves)
    for leaf in range(0, num_leaves, leaves):
        x, _ = _kept(source, at, leaf, conditions, spec)
        e = tl.exp2((x - r) * scale)
        sum_exp += _total(e, leaves)
        sum_t_exp += _total(tl.where(e > 0, e * (x - r), 0.0), leaves)
    return tl.where(sum_exp > 0, sum_t_exp / sum_exp, 0.0)


@triton.jit
def _last_tie(
    source, at, conditions, pivot, center, bound, number, num_leaves,
    kind: tl.constexpr, spec: tl.constexpr,
):  # fmt: skip
    """Index of the survivor that is, in order, number `number` of those whose key is `bound`; or -1."""
    leaves: tl.constexpr = spec.leaves
    rows: tl.constexpr = spec.rows
    bits: tl.constexpr = 32 if kind == TYPICAL_P else spec.bits
    seen, last = bound.to(tl.int32) * 0, bound.to(tl.int32) * 0 - 1
    r, c = _over_leaves(pivot, leaves), _over_leaves(center, leaves)
    b = _over_leaves(bound, leaves)
    for leaf in range(0, num_leaves, leaves):
        x, index = _kept(source, at, leaf, conditions, spec)
        key = _ordered(_key(x, r, c, kind), bits)
        equal = tl.reshape(((key == b) & (x > -float("inf"))).to(tl.int32), [rows, x.numel // rows])
        order = tl.cumsum(equal, 1) + seen[:, None]
        found = (equal == 1) & (order == number[:, None])
        places = tl.reshape(tl.broadcast_to(index, x.shape), [rows, x.numel // rows])
        last = tl.maximum(last, tl.max(tl.where(found, places, -1), 1))
        seen += tl.sum(equal, 1)
    return last


@triton.jit
def _bound(
    source, at, conditions, pivot, filter_scale, num_leaves, kind: tl.constexpr,
    value: tl.constexpr, scaled: tl.constexpr, spec: tl.constexpr,
):  # fmt: skip
    """The condition of one filter, given those before it."""
    bits: tl.constexpr = 32 if kind == TYPICAL_P else spec.bits
    scale = filter_scale if scaled else LOG2E
    center, bound = pivot * 0.0, (pivot * 0.0).to(tl.uint32)
    last = (pivot * 0.0).to(tl.int32) + source.vocab
    if kind == MIN_P:
        center = _largest(source, at, conditions, pivot, num_leaves, spec)
        if value < 1:
            center += tl.log2(pivot * 0.0 + value) / scale
    else:
        if kind == TYPICAL_P:
            center = _center(source, at, conditions, pivot, scale, num_leaves, spec)
        mass, count = _sums(
            source, at, conditions, pivot, center, bound, scale, num_leaves, kind,
            False, spec,
        )  # fmt: skip
        limit = tl.minimum(count, value) if kind == TOP_K else mass * value
        for i in range(bits):
            candidate = bound | ((pivot * 0.0).to(tl.uint32) + (1 << 31) >> i)
            mass, count = _sums(
                source, at, conditions, pivot, center, candidate, scale,
                num_leaves, kind, False, spec,
            )  # fmt: skip
            enough = (count >= limit) if kind == TOP_K else (mass > limit)
            bound = tl.where(enough, candidate, bound)
        if kind != TOP_K:
            above, _ = _sums(
                source, at, conditions, pivot, center, bound + (1 << (32 - bits)), scale,
                num_leaves, kind, False, spec,
            )  # fmt: skip
            mass, count = _sums(
                source, at, conditions, pivot, center, bound, scale, num_leaves,
                kind, True, spec,
            )  # fmt: skip
            room = (limit - above) * count / tl.where(mass > 0, mass, 1.0)
            fit = tl.floor(tl.minimum(room, 2.0e9)).to(tl.int32)  # of the equal ones
            if not (spec.below and kind == TOP_P):
                fit += 1
            fit = tl.where((above == 0) & (fit < 1), 1, fit)
            some = (fit < count) & (mass > 0)
            if tl.sum(some.to(tl.int32), 0) > 0:
                tie = _last_tie(
                    source, at, conditions, pivot, center, bound, fit,
                    num_leaves, kind, spec,
                )  # fmt: skip
                last = tl.where(some, tie, last)
    return pivot, center, bound, last


@triton.jit
def find_conditions(source, at, pivot, filter_scale, num_leaves, spec: tl.constexpr):
    """A condition for each filter, found one after the other; `pivot` is the row's maximum."""
    filters: tl.constexpr = spec.filters
    conditions = ()
    for i in tl.static_range(len(filters)):
        new = _bound(
            source, at, conditions, pivot, filter_scale, num_leaves, filters[i][0],
            filters[i][1], filters[i][2], spec,
        )  # fmt: skip
        conditions = conditions + (new,)
    return conditions
