"""`decode_step_from_hidden` on NVIDIA GPUs: what the fused head is compiled for, and its launch.

Four kernels a step: list the rows that take part, head and draw (head.py), merge and finish, and
the decode step's commit.  Extra memory: six numbers and 128 logits for each program's rows, at most
20 MB or 0.6 KB a row, whatever V is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ...common.backends import is_interpreting
from ...common.triton_tools import as_bytes, flat, multiprocessors, on, options
from ...common.tuning import tuned
from ...decode_step import dispatch
from ...decode_step.inputs import StepInputs, taking_part, to_gpu
from ...decode_step.rule.plan import StepPlan
from ...decode_step.triton_cuda import launch as step_kernels
from .. import chunked
from .head import NUM_PARTS, HeadSpec, finish_kernel, head_kernel, list_kernel

_FINISHED = 4  # rows that a program of `finish_kernel` takes


def decode_step(
    x: StepInputs, plan: StepPlan, hidden: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None, backend: str,
) -> tuple[tuple[Any, Any, Any], Any]:  # fmt: skip
    """What chunked.py's function of that name does; nothing waits for the device."""
    x = to_gpu(x, hidden)
    place = x.tokens.device
    hidden, weight = hidden.to(place), weight.to(place)
    bias = None if bias is None else bias.to(place)
    wanted = taking_part(plan.row, x.tokens, x.mask_token_id, x.eligible)
    if chunked.chooses_first(plan):  # such a rule draws for no known token
        wanted = wanted & (x.tokens == x.mask_token_id) & chunked.chosen(x, plan, hidden, backend)
    drawn, score = sample_rows(x, plan, hidden, *chunked.codebook(plan, weight, bias), wanted)
    scores = x.scores if plan.row.score == "given" else score
    out = dispatch.call(
        "decode_step", x._replace(drawn=drawn, scores=scores), plan, hidden, backend
    )
    return out, wanted & (drawn < 0)


def fuses(x: StepInputs, plan: StepPlan, hidden: Any, weight: Any) -> bool:
    """Whether the fused head can do what the rule asks for."""
    no_product = is_interpreting() and hidden.dtype == torch.bfloat16
    if no_product or hidden.dtype == torch.float64:
        return False
    spec = step_kernels.row_spec(x, plan, dtype="float32", guided=False, wants_z=False)
    plain = not (spec.filters or spec.score_banned or spec.wide or spec.held)
    aligned = all(a.stride(-1) == 1 and a.stride(-2) % 8 == 0 for a in (hidden, weight))
    return plain and spec.draw in ("race", "greedy") and aligned


def sample_rows(
    x: StepInputs, plan: StepPlan, hidden: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None, wanted: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(candidates or -1, scores), (B, N), of the rows that take part and that `wanted` admits."""
    batch, length, width = hidden.shape
    num_rows, vocab, device = batch * length, weight.shape[0], hidden.device
    drawn = torch.empty((batch, length), dtype=torch.int32, device=device)
    score = torch.empty((batch, length), dtype=torch.float32, device=device)
    if num_rows == 0:
        return drawn, score
    dtype = str(hidden.dtype).removeprefix("torch.")
    spec = step_kernels.row_spec(x, plan, dtype=dtype, guided=False, wants_z=False)
    tiling = tiles(num_rows, width, dtype, spec.score == "margin", device)
    # of the entropy the sums would not fit as well
    pair = bool(tiling["pair"]) and not tiling["swap"] and spec.score != "neg_entropy"
    registers = 255 if spec.score in ("margin", "neg_entropy") else tiling["registers"]
    head = HeadSpec(
        tiling["rows"], tiling["depth"], bool(tiling["swap"]), pair,
        width % tiling["depth"] == 0, tiling["programs"], dataclasses.replace(spec, rows=_FINISHED),
    )  # fmt: skip
    entries = max(head.programs, -(-num_rows // head.rows)) * head.rows
    listed = torch.empty(num_rows + 1, dtype=torch.int32, device=device)
    count = listed[num_rows:]
    parts = torch.empty(NUM_PARTS * entries, dtype=torch.float32, device=device)
    leaf_logits = torch.empty(entries * 128, dtype=torch.float32, device=device)
    mask, column, start, step, _, _, draw, scale, _, _ = step_kernels.numbers(x, plan, vocab)
    seeds, positions = step_kernels.seed_words(x.seeds), flat(x.positions)
    hidden = hidden.reshape(num_rows, width)
    with on(device):
        list_kernel[(1,)](
            flat(x.tokens), as_bytes(wanted), listed, count, drawn, score,
            num_rows, mask, block=1024, touches_known=plan.row.touches_known, num_warps=4,
        )  # fmt: skip
        head_kernel[(head.programs,)](
            hidden, weight, bias, listed, count, seeds, positions, parts, leaf_logits, entries,
            length, width, vocab, hidden.stride(0), weight.stride(0), column, step, draw, scale,
            head=head, num_stages=tiling["stages"],
            **options(tiling["warps"], registers),
        )  # fmt: skip
        finish_kernel[(-(-num_rows // _FINISHED),)](
            hidden, listed, count, seeds, positions, parts, leaf_logits, drawn, score, entries,
            length, vocab, column, start, step, draw, scale,
            most=1 << (head.programs - 1).bit_length(), head=head, **options(4, 168),
        )  # fmt: skip
    return drawn, score


def tiles(
    num_rows: int, width: int, dtype: str, heavy: bool, device: torch.device
) -> dict[str, int]:
    """Rows, depth and order of the product, programs, warps, registers and stages of its pipeline.

    `heavy`: the epilogue keeps the two largest of each row as well.  Many rows take two leaves at a time
    where tensor cores read both operands from shared memory: the rows are read from L2 half as often.
    """
    few, least = num_rows <= 64, num_rows <= 16 or heavy
    wide = 2 if dtype == "float32" else 1
    fields = {
        "rows": (16 if least else 32) if few else 128 // wide,
        "depth": 16 if wide == 2 else 64,  # float32 operands lie in registers
        "swap": int(few),
        "pair": int(not few and wide == 1 and _is_hopper(device)),
        "programs": 2 * multiprocessors(device),
        "warps": 4 if few and least else 8,
        "stages": 4 if few and wide == 1 else 3,
        "registers": 255,
    }
    regime = "few" if few else "many"
    fields |= tuned(
        "head_sample", device, {"dtype": dtype, "regime": regime, "rows": num_rows, "width": width}
    )
    if heavy:
        fields["rows"] = min(fields["rows"], 16 if few else 128)
    if device.type == "cpu":  # the interpreter: few programs, small products
        fields |= {"programs": 3, "rows": min(fields["rows"], 32), "depth": 32}
    return fields


def _is_hopper(device: torch.device) -> bool:
    """Whether products read shared memory: Hopper and later; tensors without memory are an H100's."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
