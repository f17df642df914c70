"""The decode step on NVIDIA GPUs: what the kernels are compiled for, and their launch.

Two kernels a step: `sample_kernel` (rows.py) reads the logits of the masked positions once and
leaves a candidate and a score each; `commit_kernel` (commit.py), one program a sequence, counts,
selects and re-masks.  Between them lie two numbers a position, and where few long
rows are shared between programs nine numbers a program, less than a thousandth of the logits.

Nothing waits for the device's work, and nothing is computed on the host from its values.  Tables of counts
are copied once per rule, step and T, so that a step that has run before can be captured in a graph.

With TRITON_INTERPRET=1 set before triton is imported the kernels run on CPU tensors, slowly, in
Triton's interpreter: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from ...common import philox
from ...common.triton_tools import as_bytes, flat, multiprocessors, on, options
from ...common.tuning import tuned
from ..inputs import StepInputs
from ..rule.plan import CommitPlan, RowPlan, StepPlan
from .commit import MOST_POSITIONS, commit_kernel, merge_kernel
from .finish import NUM_PARTS
from .rows import sample_kernel
from .select import Bounds, CommitSpec, in_three
from .tiles import RowSpec

_FILTERS = {"top_k": 1, "top_p": 2, "min_p": 3, "typical_p": 4}
_OTHERS = {"factor": 13, "entropy_bound": 12}  # log2 of places of a comparison; more would spill
_SHORT = 16  # leaves of a row that one warp takes
_NEEDS_NO_Z = ("logit", "random", "given")


def decode_step(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(next_tokens, candidate_tokens, confidence), each (B, N); `dtype` is that of the logits."""
    batch, length = x.tokens.shape
    if length > MOST_POSITIONS:
        raise ValueError(
            f"tokens: backend 'triton' expected at most {MOST_POSITIONS} positions, got {length}"
        )
    device, n = x.tokens.device, plan.numbers
    tokens = x.tokens.contiguous()
    next_tokens = torch.empty(tokens.shape, dtype=tokens.dtype, device=device)
    candidates = torch.empty(tokens.shape, dtype=tokens.dtype, device=device)
    kind = torch.float64 if plan.commit.is_wide else torch.float32
    confidence = torch.empty(tokens.shape, dtype=kind, device=device)
    if batch * length == 0:
        return next_tokens, candidates, confidence
    rows, commit = _launches(plan, dtype, _layout(x), device)
    given = tokens, as_bytes(x.eligible), seed_words(x.seeds), flat(x.positions)
    values = numbers(x, plan, rows.sizes[2])
    with on(device):
        if x.drawn is None:
            drawn, score, parts = _temporary(
                batch * length, rows.spec.splits, rows.spec.wide, device
            )
            _sample(rows, x, given, (drawn, score, None, parts), values)
        else:
            drawn, score, parts = x.drawn.contiguous(), x.scores.contiguous(), None
        table = _table(plan, device) if n.table.size else None
        commit_kernel[(batch,)](
            x.logits, x.uncond_logits, *given, drawn, score, parts, *rows.sizes, *rows.strides, *values,
            next_tokens, candidates, confidence, flat(x.choice_gumbel), flat(x.scores),
            flat(x.num_masked_at_start), flat(x.num_commit), table, n.table.size, batch,
            n.choice_temperature, n.commit_fraction, n.commit_below, n.remask_below, n.remask_chance,
            _bounds(plan), finishing=commit.finishing, spec=commit.spec, **commit.options,
        )  # fmt: skip
    return next_tokens, candidates, confidence


def sample_tokens(x: StepInputs, plan: StepPlan, dtype: str) -> tuple[Any, Any, Any]:
    """(candidate or -1, score, log_z), each (B, N)."""
    shape, device = x.logits.shape[:2], x.logits.device
    kind = torch.float64 if plan.row.is_wide else torch.float32
    drawn = torch.empty(shape, dtype=torch.int64, device=device)
    score = torch.empty(shape, dtype=kind, device=device)
    log_z = torch.empty(shape, dtype=kind, device=device)
    if drawn.numel() == 0:
        return drawn, score, log_z
    rows = _row_launch(plan, dtype, _layout(x), device, True)
    given = flat(x.tokens), as_bytes(x.eligible), seed_words(x.seeds), flat(x.positions)
    values = numbers(x, plan, rows.sizes[2])
    with on(device):
        out = drawn, score, log_z, _shares(drawn.numel(), rows.spec.splits, kind, device)
        _sample(rows, x, given, out, values)
        if rows.merged is not None:  # programs shared rows
            merge_kernel[(-(-drawn.numel() // rows.merged.rows),)](
                x.logits, x.uncond_logits, *given, *out, *rows.sizes, *rows.strides, *values,
                finishing=rows.merged, **options(4, 168),
            )  # fmt: skip
    return drawn, score, log_z


def _sample(
    rows: RowLaunch, x: StepInputs, given: tuple[Any, ...], out: tuple[Any, ...],
    values: tuple[Any, ...],
) -> None:  # fmt: skip
    """Launch `sample_kernel`."""
    sample_kernel[rows.grid](
        x.logits, x.uncond_logits, x.token_gumbel, *given, *out, *rows.sizes, *rows.strides,
        *rows.noise_strides, *values, spec=rows.spec, **rows.options,
    )  # fmt: skip


class Layout(NamedTuple):
    """How the rows of a call lie in memory, as far as a launch depends on it; strides in elements.

    misalignment: logits between a multiple of 16 bytes and the first; is_twin: rows of neighbours lie
    equally far from such a multiple in the unconditional logits too.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...] = (0, 0, 0)
    misalignment: int = 0
    uncond_strides: tuple[int, ...] | None = None
    is_twin: bool = False
    noise_strides: tuple[int, ...] | None = None


def _layout(x: StepInputs) -> Layout:
    if x.logits is None:
        return Layout((*x.tokens.shape, 0))
    logits, uncond, noise = x.logits, x.uncond_logits, x.token_gumbel
    return Layout(
        logits.shape,
        logits.stride(),
        logits.data_ptr() % 16 // logits.element_size(),
        None if uncond is None else uncond.stride(),
        uncond is not None and _lie_alike(logits, uncond),
        None if noise is None else noise.stride(),
    )


class RowLaunch(NamedTuple):
    """What calls of one layout share: the specialisation of `sample_kernel`, its grid, its strides.

    sizes: rows, N, V; strides: of the logits, their misalignment, of the unconditional ones; merged: the
    specialisation of `merge_kernel`, where programs share rows.
    """

    spec: RowSpec
    grid: tuple[int, int]
    sizes: tuple[int, int, int]
    strides: tuple[int, ...]
    noise_strides: tuple[int, ...]
    options: dict[str, int]
    merged: RowSpec | None


@lru_cache(maxsize=4096)
def _row_launch(
    plan: StepPlan, dtype: str, layout: Layout, device: torch.device, wants_z: bool
) -> RowLaunch:
    batch, length, vocab = layout.shape
    num_rows, strides = batch * length, layout.strides
    none = (0, 0, 0)
    uncond_strides, noise_strides = layout.uncond_strides or none, layout.noise_strides or none
    every = (*strides, layout.misalignment, *uncond_strides)
    if not vocab:  # candidates are given
        return RowLaunch(RowSpec(), (0, 0), (num_rows, length, 0), every, none, {}, None)
    vec = 128 // torch.finfo(getattr(torch, dtype)).bits
    shifted = strides[2] == 1 and bool(layout.misalignment or any(s % vec for s in strides[:2]))
    is_guided = layout.uncond_strides is not None
    spec = _row_spec(plan.row, layout.noise_strides is not None, is_guided, dtype, wants_z)
    heavy = spec.wide or spec.score == "margin" or spec.draw in ("greedy_probs", "noise")
    tiling = tiles(num_rows, vocab, strides[2] == 1, heavy, dtype, device)
    # rows that start anywhere: Triton 3.6 wants 230 registers, 3.9 from 168 to 200
    crowded = _is_crowded(spec) or shifted
    splits = tiling["splits"] if spec.quick else 1
    spec = dataclasses.replace(
        spec, rows=tiling["rows"], leaves=tiling["leaves"], vec=vec, splits=splits,
        dense=strides[2] == 1, shifted=shifted, ragged=shifted or vocab % vec != 0,
        twin=layout.is_twin,
    )  # fmt: skip
    return RowLaunch(
        spec,
        (-(-num_rows // spec.rows), splits),
        (num_rows, length, vocab),
        every,
        noise_strides,
        options(tiling["warps"], 255 if crowded else tiling["registers"]),
        dataclasses.replace(spec, rows=4) if splits > 1 else None,
    )


class CommitLaunch(NamedTuple):
    """What calls of one layout share: the specialisations of `commit_kernel`."""

    spec: CommitSpec
    finishing: RowSpec | None
    options: dict[str, int]


@lru_cache(maxsize=4096)
def _launches(
    plan: StepPlan, dtype: str, layout: Layout, device: torch.device
) -> tuple[RowLaunch, CommitLaunch]:
    """Those of a step."""
    rows, length = _row_launch(plan, dtype, layout, device, False), layout.shape[1]
    block = max(16, 1 << (length - 1).bit_length())
    spec, finishing = _commit_spec(plan.commit, block), None
    if rows.spec.splits > 1:
        together = 16 if _is_crowded(rows.spec) else 32  # rows whose leaf fits into registers
        finishing = dataclasses.replace(rows.spec, rows=min(block, together))
    return rows, CommitLaunch(spec, finishing, _commit_options(spec, finishing is not None))


def _is_crowded(spec: RowSpec) -> bool:
    """Whether each place of a tile has two exponentials or two logits."""
    return spec.guide > 0 or (spec.draw == "race" and spec.needs_z and not spec.shared)


def _lie_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether rows of neighbours lie equally far from a multiple of 16 bytes in both."""
    apart = (
        (s - t) * a.element_size() for s, t in zip(a.stride()[:2], b.stride()[:2], strict=True)
    )
    distances = (a.data_ptr() - b.data_ptr(), *apart)
    return a.stride(2) == b.stride(2) == 1 and all(n % 16 == 0 for n in distances)


def _commit_options(spec: CommitSpec, shared: bool) -> dict[str, int]:
    """Few warps where ranks are found by bisection: each of its sums is exchanged between all."""
    if shared:
        return options(8, 255)
    if spec.ranks or spec.count in ("all", "bernoulli"):
        return options(max(1, min(16, spec.block // 32)), 128)
    each = (
        256 if spec.count == "runs" or spec.wide else 512
    )  # positions of a warp that do not spill
    return options(max(1, min(16, spec.block // each)), 255)


def row_spec(x: StepInputs, plan: StepPlan, dtype: str, guided: bool, wants_z: bool) -> RowSpec:
    """What of a RowSpec follows from the plan and the noise."""
    return _row_spec(plan.row, x.token_gumbel is not None, guided, dtype, wants_z)


@lru_cache(maxsize=1024)
def _row_spec(row: RowPlan, noise: bool, guided: bool, dtype: str, wants_z: bool) -> RowSpec:
    filters = tuple(
        (_FILTERS[name], min(int(value), 2**31 - 1) if name == "top_k" else float(value), divides)
        for name, value, divides in row.filters
    )
    draw = "greedy_probs" if row.greedy_on_probs and not row.is_wide else "greedy"
    if row.draws:
        draw = "noise" if noise else "race"
    apart = (filters and not row.score_filtered) or row.score_banned
    return RowSpec(
        guide=row.guide if guided else 0,
        banned=row.banned,
        ban_mask=row.bans_mask,
        filters=filters,
        bits=32 if guided else {"bfloat16": 16, "float16": 19, "float32": 32}[dtype],
        below=row.nucleus_below,
        draw=draw,
        score=row.score,
        score_filtered=row.score_filtered,
        score_banned=row.score_banned,
        needs_z=wants_z or row.score not in _NEEDS_NO_Z,
        wide=row.is_wide,
        rounding=row.score_dtype if row.score_dtype in ("float32", "float64") else "logits",
        shared=bool(draw == "race" and row.same_temperature and not apart and not row.is_wide),
        held=row.holds,
        touches_known=row.touches_known,
    )


@lru_cache(maxsize=1024)
def _bounds(plan: StepPlan) -> Bounds:
    """The plan's bounds as the commit kernel takes them."""
    n = plan.numbers
    values = n.threshold, n.threshold_slack, n.low_threshold, n.edit_threshold, n.factor
    return Bounds(*(in_three(value) for value in values))


@lru_cache(maxsize=4096)
def _commit_spec(how: CommitPlan, block: int) -> CommitSpec:
    """What the commit kernel is compiled for at this step."""
    return CommitSpec(
        block=block,
        others=max(1, min(32, (1 << _OTHERS.get(how.count, 14)) // block)),
        count=how.count,
        cut=how.cut,
        count_rows=how.count_rows,
        base_is_positions=how.base_is_positions,
        clamps=how.clamps,
        source=how.source,
        uses_noise=how.uses_noise,
        adds_noise=how.adds_noise,
        threshold_strict=how.threshold_strict,
        has_slack=how.has_slack,
        least_is_quota=how.least_is_quota,
        factor_tail=how.factor_tail,
        revise=how.revises,
        touches_known=how.touches_known,
        edits=how.edits,
        remasks=how.remasks,
        remasks_by_score=how.remasks_by_score,
        skip_mask_token=how.skips_mask,
        wide=how.is_wide,
        compared_in=how.compared_in if how.count == "factor" or how.has_slack else "",
    )


def numbers(x: StepInputs, plan: StepPlan, vocab: int) -> tuple[Any, ...]:
    """mask_token_id, its column, vocab_start, step, guidance, temperature and the scales."""
    n, start = plan.numbers, plan.row.vocab_start
    column = int(x.mask_token_id) - start
    high, low = n.score_scale, 0.0
    if plan.row.is_wide:
        high = float(np.float32(1.0 / n.score_temperature))
        low = 1.0 / n.score_temperature - high
    return (
        int(x.mask_token_id), column if 0 <= column < vocab else -1, start, n.step,
        float(x.guidance_scale), n.sample_temperature, n.draw_scale, high, low, n.filter_scale,
    )  # fmt: skip


def tiles(
    num_rows: int, vocab: int, dense: bool, heavy: bool, dtype: str, device: torch.device
) -> dict[str, int]:
    """rows and leaves of a tile, programs that share a row, warps, registers of a thread.

    A tile has 16 KB, in 16 bits 64 logits a thread: few enough for registers, and enough that each
    thread has no more than one leaf's variate to make.  Half of it where a walk keeps more (`heavy`)
    and where a tile holds several short rows.  Short rows have a warp each, which waits for no other, where
    nothing else has been measured.  Few long rows are shared until every multiprocessor has some programs.
    """
    leaves = -(-vocab // philox.LEAF)
    fields = {"rows": 1, "leaves": 32 if dtype == "float32" else 64, "splits": 1, "warps": 4,
              "programs": 4, "registers": 168}  # fmt: skip
    chosen = tuned("decode_step", device, {"dtype": dtype, "leaves": leaves})
    fields |= chosen
    if heavy:
        fields["leaves"] = max(1, fields["leaves"] // 2)
    wanted = fields.pop("programs") * multiprocessors(device)
    if not dense:  # V-major: neighbouring positions are neighbours in memory
        return fields | {"rows": 32, "leaves": 1, "warps": 4, "registers": 168}
    if leaves <= _SHORT and not chosen and multiprocessors(device) > 1:
        own = min(fields["leaves"] // fields["warps"], 1 << (leaves - 1).bit_length())
        return fields | {"rows": 1, "leaves": max(1, own), "warps": 1, "splits": 1}
    size = fields["rows"] * fields["leaves"]
    fields["leaves"] = min(fields["leaves"], 1 << (leaves - 1).bit_length())
    rows = size // fields["leaves"]
    if rows > 1 and not heavy:
        rows, size = rows // 2, size // 2
    while rows > 1 and num_rows // rows < wanted:
        rows //= 2
    fields["rows"] = rows
    fields["warps"] = max(1, fields["warps"] * rows * fields["leaves"] // size)
    splits = 1
    while splits < 64 and 2 * splits * fields["leaves"] <= leaves and splits * num_rows < wanted:
        splits *= 2
    return fields | {"splits": splits if rows == 1 else 1}


def _temporary(rows: int, splits: int, wide: bool, device: torch.device) -> tuple[Any, Any, Any]:
    """Candidates, scores and the shares of rows, between the two kernels of a step."""
    kind, integer = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    drawn = torch.empty(rows, dtype=integer, device=device)
    score = torch.empty(rows, dtype=kind, device=device)
    return drawn, score, _shares(rows, splits, kind, device)


def _shares(rows: int, splits: int, kind: torch.dtype, device: torch.device) -> Any:
    """What programs that share rows leave of them; None where none do."""
    if splits == 1:
        return None
    return torch.empty(NUM_PARTS * splits * rows, dtype=kind, device=device)


def seed_words(seeds: torch.Tensor | None) -> torch.Tensor | None:
    """(B,) int64 of seeds, which may come as (B, 2) words."""
    if seeds is None:
        return None
    if seeds.ndim == 2:
        words = seeds.to(torch.int64)
        return (words[:, 0] & 0xFFFFFFFF) | (words[:, 1] << 32)
    return (seeds.view(torch.int64) if seeds.dtype == torch.uint64 else seeds.long()).contiguous()


def _table(plan: StepPlan, device: torch.device) -> torch.Tensor:
    """The table of counts on the device; one that a graph has read stays there for good."""
    table = _device_table(plan, str(device))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[id(table)] = table
    return table


_captured: dict[int, torch.Tensor] = {}


@lru_cache(maxsize=4096)
def _device_table(plan: StepPlan, device: str) -> torch.Tensor:
    """The table, copied once; this waits for that copy alone, after which every stream may read it."""
    table = torch.from_numpy(plan.numbers.table)
    if torch.device(device).type != "cuda":
        return table
    with torch.cuda.stream(_copies(device)):
        return table.to(device)


@lru_cache(maxsize=16)
def _copies(device: str) -> torch.cuda.Stream:
    """A stream for copies from the host."""
    return torch.cuda.Stream(device)
