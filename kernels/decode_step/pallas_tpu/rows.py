"""Draw, score and log Z of rows of logits on a TPU: the row is read from HBM once and stays in VMEM.

For a row l (V,) at temperature T the candidate is the winner of three races (reference.py): over
leaves of 128 logits, 16 groups, 8 tokens.  With a reference r near the row's maximum and s = log2(e)/T,

    leaf race    largest  sum_leaf 2^(s (l - r)) / E     E exponential variates: no logarithm of the sum
    log Z        ln 2 (s r + log2 sum 2^(s (l - r)))
    greedy       largest l, each place keeping the first largest it has seen

Layout.  A register is 8 sublanes of 128 lanes.  Logits arrive with rows on sublanes; a sum over lanes
would occupy the cross-lane unit for longer than the memory needs to deliver them.  So each tile of 128
rows x one leaf is turned, and the leaf lies on sublanes, where sums are plain additions and what is
done once for a row or a leaf fills all lanes.  16-bit logits are turned by the matrix unit, times the
identity, which is exact.  Where a block has fewer than 128 rows, each row is dealt out to `parts` lanes,
leaf by leaf, and the lanes are merged at the end.

Passes over VMEM.  A first walk takes r from the first tile (for entropies a walk of its own, over tiles as
they lie, finds it) and looks for nothing odd.  Should a sum of the block come out as zero, huge or NaN (a
NaN, an infinity, a maximum e^38 above r), should a second logit be so close to the largest that their
rounded probabilities may be equal, where these are what counts (two bfloat16 numbers are not, beyond 2), or
does the rule filter, the block is walked again: for the maxima, for the filters' bounds
(filters.py), then with cleaned logits.  A last walk collects the winning leaf of each row.

Walks go by 16 tiles a turn of a loop, which share one address: with one for each, the scalar unit bound the
walks for the maximum and for the winning leaf.

Limits: a block of rows, twice, must fit in VMEM (launch.py).  Tokens less likely than e^-87 of
their row enter no sum, nor could they win: a Gumbel variate is at most 45.05.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...common.philox import LEAF
from .filters import find_conditions, survivors
from .races import Stats, Words, better, race_in_leaf, race_of_leaves
from .tiles import (
    BIG,
    FLOAT_MAX,
    LANES,
    PIECE,
    PIECES,
    Numbers,
    Rows,
    RowSpec,
    TileNumber,
    down,
    pieces,
    round_to,
    surer,
    two_of,
)

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
LEAST = -200.0  # 2^-200 is 0, and so is its product with -200; with -inf it is NaN
SEQUENCES = 8  # whose tokens share a block
NEAR = {"bfloat16": 0.00779, "float32": 1e-6}  # above log1p of a unit in the last place


def scored(
    x: jax.Array, xf: jax.Array, leaf: Any, number: TileNumber | None, rows: Rows
) -> jax.Array:
    """What the score's softmax is taken over."""
    spec = rows.spec
    return rows.without(xf if spec.score_filtered else x, leaf, spec.score_banned, number)


def _full(value: float, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.full((PIECE, LANES), value, dtype)


def _maxima(rows: Rows) -> tuple[jax.Array, jax.Array]:
    """(largest logit, largest finite logit) of each row."""

    def body(number: TileNumber, carry: Any) -> Any:
        top, finite = carry
        for _, x in pieces(rows.tile(number, safe=True)):
            x = jnp.where(x == x, x, -jnp.inf)
            top = jnp.maximum(top, x)
            finite = jnp.maximum(finite, jnp.where(x < jnp.inf, x, -jnp.inf))
        return top, finite

    top, finite = rows.over_row(body, (_full(-jnp.inf),) * 2)
    return jnp.minimum(rows.largest(top), FLOAT_MAX), rows.largest(finite)


def _quick_reference(rows: Rows) -> jax.Array:
    """A logit near the row's maximum, [1, 128]: the first tile's; for an entropy one nearer.

    Which is a difference of two sums, and loses bits as the reference leaves the maximum.
    """
    if rows.spec.score == "neg_entropy":
        return rows.rough_maximum()
    return rows.largest(rows.tile(TileNumber(0, 0), safe=False))


def _largest_scored(rows: Rows, conditions: Any) -> jax.Array:
    def body(number: TileNumber, top: jax.Array) -> jax.Array:
        x, leaf = rows.clean(number), rows.leaf_of(number.value)
        y = scored(x, survivors(x, leaf, conditions, rows), leaf, number, rows)
        return functools.reduce(jnp.maximum, [v for _, v in pieces(y)], top)

    return rows.largest(rows.over_row(body, _full(-jnp.inf)))


def _first_best(best: Any, at: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """(largest key, lowest index that has it), [1, 128], of [32, 128] keys and codes."""
    below = rows.place[:PIECE] + PIECE * (at & PIECES - 1)
    index = rows.leaf_of(at >> PIECES.bit_length() - 1) * LEAF + below
    top = rows.largest(best)
    index = jnp.min(jnp.where(best == top, index, BIG), axis=0, keepdims=True)
    return rows.merged((top, index), surer)


def _noisy(x: jax.Array, noise: jax.Array, temperature: Any) -> jax.Array:
    """x + temperature g for injected noise; -inf where there is none."""
    y = x + temperature * noise
    return jnp.where((y == y) & (x > -jnp.inf) & (y < jnp.inf), y, -jnp.inf)


def _starts(spec: RowSpec, safe: bool) -> dict[str, jax.Array]:
    """What a walk carries along for each place of a piece."""
    by_probs = spec.draw == "greedy_probs"
    kept = (
        ("z", spec.needs_z and not spec.shared, 0.0),
        ("tz", spec.score == "neg_entropy", 0.0),
        ("mass", by_probs and safe, 0.0),
        ("near", by_probs and not safe and not spec.is_bfloat16, -jnp.inf),
        ("check", not spec.needs_z and spec.draw != "race" and not safe, 0.0),
        ("first", spec.score in ("top1_prob", "margin"), -jnp.inf),
        ("second", spec.score == "margin", -jnp.inf),
        ("top", spec.draw != "race", -jnp.inf),
        ("key", spec.draw == "noise", -jnp.inf),
    )
    start = {name: _full(value) for name, is_kept, value in kept if is_kept}
    codes = {f"{name}_at": _full(0, jnp.int32) for name in ("top", "key") if name in start}
    return start | codes


def _walk(
    rows: Rows, words: Any, reference: Any, score_reference: Any, conditions: Any, safe: bool
) -> Stats:
    """One walk over each row, exponentials relative to the references [1, 128]."""
    spec, n = rows.spec, rows.numbers
    race = spec.draw == "race"

    def body(number: TileNumber, carry: dict[str, Any]) -> dict[str, Any]:
        c, leaf = dict(carry), rows.leaf_of(number.value)
        infinite = safe or rows.may_be_infinite(number)
        x = rows.clean(number) if safe else rows.tile(number, safe=False)
        xf = survivors(x, leaf, conditions, rows)
        y = scored(x, xf, leaf, number, rows)
        arrays = (xf, y, rows.gumbel(number)) if spec.draw == "noise" else (xf, y)
        sums = []
        for q, xf, y, *noise in pieces(*arrays):
            if race:
                t = (xf - reference) * n.draw_scale
                e = jnp.exp2(t)
                sums.append(e)
            if ("z" in c or "tz" in c) and not (race and spec.shared):
                t = (y - score_reference) * n.score_scale
                e = jnp.exp2(t)
            if "z" in c:
                c["z"] += e
            if "tz" in c:
                c["tz"] += e * (jnp.maximum(t, LEAST) if infinite else t)
            if "second" in c:
                c["second"] = jnp.maximum(c["second"], jnp.minimum(c["first"], y))
            if "first" in c:
                c["first"] = jnp.maximum(c["first"], y)
            if "mass" in c:
                c["mass"] += jnp.exp2((xf - reference) * LOG2E)
            if "check" in c:
                c["check"] += xf * 0.0
            if "near" in c:
                below = jnp.where(xf == c["top"], -jnp.inf, jnp.minimum(xf, c["top"]))
                c["near"] = jnp.maximum(c["near"], below)
            if "top" in c:
                c["top"], c["top_at"] = better(xf, number.value * PIECES + q, c["top"], c["top_at"])
            if "key" in c:
                key = _noisy(xf, noise[0], n.temperature)
                c["key"], c["key_at"] = better(
                    key, number.value * PIECES + q, c["key"], c["key_at"]
                )
        if race:
            c["leaf"] = functools.reduce(jnp.add, sums)
        return c

    if race:
        c, found = race_of_leaves(rows, words, body, _starts(spec, safe))
    else:
        c, found = rows.over_row(body, _starts(spec, safe)), Stats()
        top, token = _first_best(c["top"], c["top_at"], rows)
        if spec.draw == "noise":
            key, chosen = _first_best(c["key"], c["key_at"], rows)
            token = jnp.where(key > -jnp.inf, chosen, token)
        found = found._replace(top=top, token=token)
        if "near" in c:
            near = jnp.where(c["top"] == top, c["near"], c["top"])
            found = found._replace(near=rows.largest(near))
        elif spec.draw == "greedy_probs" and not safe:  # no other bfloat16 lies nearer
            found = found._replace(near=top - jnp.abs(top) * 2.0**-8)
    for name in ("z", "tz", "mass", "check"):
        if name in c:
            found = found._replace(**{name: rows.total(c[name])})
    if "second" in c:
        first, second = rows.merged(down((c["first"], c["second"]), two_of), two_of)
        found = found._replace(first=first, second=second)
    elif "first" in c:
        found = found._replace(first=rows.largest(c["first"]))
    return found._replace(z=found.mass) if race and "z" not in c else found


def _first_of_probs(rows: Rows, conditions: Any, reference: Any, mass: Any) -> jax.Array:
    """Dream's argmax: the first token whose rounded probability is the largest one's, [1, 128]."""
    kind = rows.spec.rounding
    bound = round_to(1.0 / mass, kind)

    def body(number: TileNumber, first: jax.Array) -> jax.Array:
        leaf = rows.leaf_of(number.value)
        x = survivors(rows.clean(number), leaf, conditions, rows)
        p = round_to(jnp.exp2((x - reference) * LOG2E) / mass, kind)
        index = jnp.where(p >= bound, leaf * LEAF + rows.place, BIG)
        return jnp.minimum(first, jnp.min(index, axis=0, keepdims=True))

    first = rows.over_row(body, jnp.full((1, LANES), BIG, jnp.int32))
    return rows.merged((first,), lambda a, b: (jnp.minimum(a[0], b[0]),))[0]


def _chosen(
    rows: Rows, words: Any, conditions: Any, found: Stats, safe: bool
) -> tuple[jax.Array, jax.Array]:
    """(column, the logit that its score is of), [1, 128]."""
    spec, own = rows.spec, words.own
    is_own = own >= 0
    race = spec.draw == "race"
    is_quick_argmax = spec.draw == "greedy_probs" and not safe
    if (spec.draw == "greedy" or is_quick_argmax) and not spec.held:
        y = found.top
        for column in spec.score_banned:
            y = jnp.where(found.token == column, -jnp.inf, y)
        return found.token, y
    leaf = found.leaf if race else found.token >> 7
    if spec.held:
        leaf = jnp.where(is_own, own >> 7, leaf)
    x = rows.collected(leaf, safe)
    xf = survivors(x, leaf, conditions, rows)
    y = scored(x, xf, leaf, None, rows)
    token = found.token
    if race:
        n = rows.numbers
        inner = race_in_leaf(xf, words, found.waits, rows.scratch, n.draw_scale, n.step)
        token = leaf * LEAF + inner
    if spec.held:
        token = jnp.where(is_own, own, token)
    y = jnp.where(rows.place == token - leaf * LEAF, y, -jnp.inf)
    if not race:  # the leaf is in one of the row's lanes
        return token, rows.largest(y)
    y = jnp.max(y, axis=0, keepdims=True)
    key = found.race
    if spec.held:
        has = (leaf & spec.parts - 1) == rows.part
        key = jnp.where(is_own, jnp.where(has, 1.0, 0.0), key)
    _, _, token, y = rows.merged((key, leaf, token, y), surer)
    return token, y


def score_of(
    y: Any, reference: Any, z: Any, tz: Any, first: Any, second: Any, scale: Any, spec: RowSpec
) -> tuple[Any, Any]:
    """(score of a candidate whose logit is y, log Z), [1, 128], from what Stats says of the row."""
    kind = spec.rounding
    if not spec.needs_z:
        return round_to(y, kind) if spec.score == "logit" else y * 0.0, y * 0.0
    log_sum = jnp.log(z)
    t = (y - reference) * scale
    if spec.score == "logit":
        score = y
    elif spec.score == "prob":
        score = jnp.where(z == 0, 0.0, jnp.exp2(t) / z)
    elif spec.score == "log_prob":
        score = t * LN2 - log_sum
    elif spec.score == "top1_prob":
        score = jnp.exp2((first - reference) * scale) / z
    elif spec.score == "margin":
        one, two = (jnp.exp2((v - reference) * scale) / z for v in (first, second))
        score = round_to(one, kind) - round_to(two, kind)
    elif spec.score == "neg_entropy":
        score = tz * LN2 / z - log_sum
    else:
        score = jnp.zeros_like(z)
    if spec.score != "prob":
        score = jnp.where(z == 0, -jnp.inf, score)
    return round_to(score, kind), reference * scale * LN2 + log_sum


def _odd(found: Stats, spec: RowSpec) -> jax.Array:
    """1 where a quick walk has met what it does not look for.

    An entropy's sum is NaN where a finite logit came out as -inf, by guidance or by its scale.
    """
    odd = jnp.zeros((1, LANES), jnp.int32)
    for mass in (found.mass, found.z):
        if mass is not None:
            odd = odd | jnp.where((mass > 1e-17) & (mass < 1e17), 0, 1)
    for value in (found.top, found.tz, found.check):
        if value is not None:
            odd = odd | jnp.where(jnp.abs(value) < jnp.inf, 0, 1)
    if found.near is not None:  # whose probability may be rounded to the largest one's
        closest = NEAR[spec.rounding]
        odd = odd | jnp.where(found.near < found.top - closest, 0, 1)
    return odd


def _group(rows: Rows, words: Any, safe: bool) -> tuple[tuple[Any, Any, Any], jax.Array]:
    """((candidates or -1, scores, log Z), 1 where something odd turned up), [1, 128]."""
    spec = rows.spec
    alive = live = words.live
    if safe:
        top, finite = _maxima(rows)
        alive = live & (finite > -jnp.inf)
        reference = score_reference = jnp.where(top > -jnp.inf, top, 0.0)
        conditions = find_conditions(rows, reference)
        if spec.score_banned:
            shown = _largest_scored(rows, conditions)
            score_reference = jnp.where(shown > -jnp.inf, shown, reference)
    else:
        conditions = ()
        reference = score_reference = _quick_reference(rows)
    found = _walk(rows, words, reference, score_reference, conditions, safe)
    odd = jnp.where(live, 0 if safe else _odd(found, spec), 0)
    if spec.draw == "greedy_probs" and safe:
        token = _first_of_probs(rows, conditions, reference, found.mass)
        found = found._replace(token=token)
    token, y = _chosen(rows, words, conditions, found, safe)
    scale = rows.numbers.score_scale
    score, log_z = score_of(
        y, score_reference, found.z, found.tz, found.first, found.second, scale, spec
    )
    drawn = jnp.where(alive, token + spec.vocab_start, -1)
    is_scored = alive
    if spec.held:
        own = words.own
        drawn = jnp.where((own >= 0) & live, own + spec.vocab_start, drawn)
        is_scored = alive & (own < spec.vocab)
    score = jnp.where(is_scored, score, -jnp.inf)
    return (drawn, score, jnp.where(alive, log_z, -jnp.inf)), odd


def _spread(row: jax.Array, first: Any, spec: RowSpec) -> jax.Array:
    """Lanes [first, first + group) of a [1, 128] row, as often as they fit into 128."""
    if spec.parts == 1:
        return row
    row = pltpu.roll(row, (LANES - first) & LANES - 1, 1)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    shift = spec.group
    while shift < LANES:
        row = jnp.where(lane < shift, row, pltpu.roll(row, shift, 1))
        shift *= 2
    return row


def _words(fields: dict[str, Any], key: Any, at: Any, n: Any, length: int, spec: RowSpec) -> Words:
    """What the block's tokens say of rows n [1, 128]; `at`: sublane, first lane, offset in the lanes."""
    sequence, lanes, first = at

    def field(name: str) -> Any:
        if name not in fields:
            return None
        block = fields[name][:, pl.ds(pl.multiple_of(lanes, LANES), LANES)]
        mine = jax.lax.broadcasted_iota(jnp.int32, block.shape, 0) == sequence
        row = jnp.sum(jnp.where(mine, block, 0), axis=0, keepdims=True)
        return _spread(row, first, spec)

    live, own = n < length, jnp.full(n.shape, -1, jnp.int32)
    token, eligible, position = (field(name) for name in ("tokens", "eligible", "positions"))
    if token is not None:
        known = token != spec.mask_token_id
        if not spec.touches_known:
            live = live & ~known
        if spec.held:  # a column outside, on either side, is `vocab`
            column = token - spec.vocab_start
            own = jnp.where(known, jnp.where(column < 0, spec.vocab, column), -1)
    if eligible is not None:
        live = live & (eligible != 0)
    if key is None:
        key = tuple(field(name) for name in ("key0", "key1"))
    return Words(n if position is None else position, key, live, own)


def rows_kernel(
    *refs: Any, spec: RowSpec, names: tuple[str, ...], batch: int, length: int, has_noise: bool,
    keys: str,
) -> None:  # fmt: skip
    """Grid (8 sequences, one of them, a block of its rows): candidates, scores and perhaps log Z.

    After the scalars come a field of the rows for each of `names`, [sequences, N], then logits,
    unconditional logits and noise [rows, width].  keys: "scalars" of a sequence, or "fields" or "none".
    """
    step, scalars, *rest = refs
    seeds = rest.pop(0) if keys == "scalars" else None
    fields, rest = dict(zip(names, rest, strict=False)), rest[len(names) :]
    logits, *rest, scratch = rest
    uncond = rest.pop(0) if spec.guide else None
    noise = rest.pop(0) if has_noise else None
    five = [scalars[0, i] for i in range(5)]
    numbers = Numbers(five[0], five[1], five[2], five[3], five[4], step[0, 0])
    group, sequence, block = (pl.program_id(axis) for axis in range(3))
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    nothing = jnp.zeros((1, LANES), jnp.int32)
    key = None if keys == "fields" else (jnp.int32(0), jnp.int32(0))
    if seeds is not None:
        key = (seeds[sequence, 0], seeds[sequence, 1])

    def some(i: Any, odd: jax.Array, safe: bool) -> jax.Array:
        first = block * spec.rows + i * spec.group
        lanes = first & -LANES
        n = (lane & spec.group - 1) + first
        words = _words(fields, key, (sequence, lanes, first - lanes), n, length, spec)
        at = pl.multiple_of(i * spec.group, spec.group)
        rows = Rows((logits, uncond, noise, scratch), at, numbers, spec)
        results, is_odd = _group(rows, words, safe)
        place = slice(None), pl.ds(pl.multiple_of(lanes, LANES), LANES)
        shape = (rest[0].shape[0], LANES)
        mine = jax.lax.broadcasted_iota(jnp.int32, shape, 0) == sequence
        if spec.parts > 1:
            mine = mine & (lane >= first - lanes) & (lane < first - lanes + spec.group)
        for ref, result in zip(rest, results[: len(rest)], strict=True):
            ref[place] = jnp.where(mine, result, ref[place])
        return odd | is_odd

    def walk(safe: bool) -> jax.Array:
        groups = spec.rows // spec.group
        body = functools.partial(some, safe=safe)
        return jax.lax.fori_loop(0, groups, body, nothing, unroll=min(groups, 2))

    @pl.when(group * SEQUENCES + sequence < batch)
    def _sequence() -> None:
        if not spec.quick:
            walk(safe=True)
            return
        odd = walk(safe=False)

        @pl.when(jnp.max(odd) > 0)
        def _again() -> None:
            walk(safe=True)
