"""What Triton's compiler makes of the kernels, for a GPU that need not be there.

The launches of a call are recorded on tensors without memory and compiled ahead of time: for NVIDIA
targets registers, spills and shared memory come from the binary, and from its disassembly (SASS) the
instructions of the loop that walks the logits, per logit; for AMD targets the registers and spills that
the assembly states.  Nothing is run and nothing is timed.

An H100 issues 29.7e12 lane-instructions a second (132 multiprocessors, 128 lanes, 1.755 GHz); at 3.0 TB/s
a bfloat16 logit has arrived every 19.8 instructions, a float32 logit every 39.5.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shapes import Shape

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
VARIANTS = ("seeds", "guided", "injected", "sample-tokens")  # of a step
_LEAF, _LINE = 128, 128  # logits of a leaf, bytes of a line of the cache
_BUDGET = 9.88  # instructions in which a byte arrives, see above
_POINTERS = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "int64": "i64",
    "int32": "i32", "uint8": "u8", "bool": "i1",
}  # fmt: skip


@dataclass
class Launch:
    """One recorded launch: the kernel and its arguments."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def spec(self) -> Any:
        """What the kernel is specialised for."""
        return next(
            (
                self.arguments[n]
                for n in ("spec", "finishing", "head", "A")
                if self.arguments.get(n) is not None
            ),
            None,
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is compiled for: equal keys are one kernel."""
        types, constants, attributes = _signature(self)
        return (
            self.name, tuple(types.items()), tuple((k, repr(v)) for k, v in constants.items()),
            tuple(attributes), tuple(self.options.items()),
        )  # fmt: skip


class _Recorder:
    """Stands in for a kernel and keeps what it would have been launched with."""

    def __init__(self, kernel: Any, into: list[Launch]) -> None:
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = ("num_warps", "num_stages", "maxnreg")
            options = {"num_warps": 4} | {n: kwargs.pop(n) for n in names if n in kwargs}
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.into.append(Launch(self.kernel.fn.__name__, self.kernel, named, options))

        return launch


@contextlib.contextmanager
def recording(*modules: Any) -> Iterator[list[Launch]]:
    """The launches that the kernels named *_kernel in these modules would have made."""
    launches: list[Launch] = []
    kept = []
    for module in modules:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            kept.append((module, name, getattr(module, name)))
            setattr(module, name, _Recorder(getattr(module, name), launches))
    try:
        yield launches
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)


def budget(launch: Launch) -> float:
    """Instructions that an H100 can issue while a logit arrives, and what is read beside it."""
    arrays = (launch.arguments.get(name) for name in ("logits", "uncond", "noise"))
    size: int = sum(a.element_size() for a in arrays if a is not None)
    return round(_BUDGET * size, 1)


def step_launches(rule: Any, shape: Shape, dtype: str, variant: str = "seeds") -> list[Launch]:
    """The launches of one `decode_step`: from seeds, with guidance too, or with the caller's noise.

    Variant "sample-tokens" is that function, of all rows and with log Z; none for scores that are not
    computed from logits, which it refuses.
    """
    import torch
    from maskgit.kernels.decode_step.inputs import StepInputs
    from maskgit.kernels.decode_step.rule.plan import resolve
    from maskgit.kernels.decode_step.triton_cuda import launch as triton_cuda

    def empty(*sizes: int, kind: Any = torch.int64) -> Any:
        return torch.empty(sizes, dtype=kind, device="meta")

    alone = variant == "sample-tokens"
    if alone and rule.score in ("random", "given"):
        return []
    sizes, kind = (shape.batch, shape.length), getattr(torch, dtype)
    plan = resolve(rule, 1, 8, sizes, dtype)
    injected = variant == "injected"
    noisy = injected and plan.row.draws
    x = StepInputs(
        logits=empty(*sizes, shape.vocab, kind=kind),
        tokens=None if alone else empty(*sizes), eligible=None, num_masked_at_start=empty(shape.batch),
        seeds=None if injected else empty(shape.batch), positions=None,
        token_gumbel=empty(*sizes, shape.vocab, kind=torch.float32) if noisy else None,
        choice_gumbel=empty(*sizes, kind=torch.float32) if injected else None,
        uncond_logits=empty(*sizes, shape.vocab, kind=kind) if variant == "guided" else None,
        guidance_scale=1.5, mask_token_id=-1 if alone else shape.vocab + 5,
        scores=empty(*sizes, kind=torch.float32) if rule.score == "given" else None,
        num_commit=empty(shape.batch) if rule.count == "given" else None,
    )  # fmt: skip
    call = triton_cuda.sample_tokens if alone else triton_cuda.decode_step
    with recording(triton_cuda) as launches:
        call(x, plan, dtype)
    return launches


def head_launches(rule: Any, rows: int, width: int, vocab: int, dtype: str) -> list[Launch]:
    """The launches of the fused head on (1, rows, width) hidden states; none for rules it leaves."""
    import torch
    from maskgit.kernels.decode_step.inputs import StepInputs
    from maskgit.kernels.decode_step.rule.plan import resolve
    from maskgit.kernels.head_sample.triton_cuda import launch as triton_cuda

    kind = getattr(torch, dtype)
    hidden = torch.empty((1, rows, width), dtype=kind, device="meta")
    weight = torch.empty((vocab, width), dtype=kind, device="meta")
    plan = resolve(rule, 1, 8, (1, rows), dtype)
    x = StepInputs(
        logits=None, tokens=torch.empty((1, rows), dtype=torch.int64, device="meta"), eligible=None,
        num_masked_at_start=None, seeds=torch.empty(1, dtype=torch.int64, device="meta"),
        positions=None, token_gumbel=None, choice_gumbel=None, uncond_logits=None,
        guidance_scale=0.0, mask_token_id=vocab + 5,
    )  # fmt: skip
    if not triton_cuda.fuses(x, plan, hidden, weight):
        return []
    with recording(triton_cuda) as launches:
        triton_cuda.sample_rows(x, plan, hidden, weight, None, None)
    return launches


def attention_launches(
    length: int, size: int, dtype: str, heads: int = 8, padded: bool = False
) -> list[Launch]:
    """The launch of attention on (2, length, heads, size)."""
    import torch
    from maskgit.kernels.attention.triton_cuda import launch as triton_cuda

    packed = torch.empty((2, length, 3, heads, size), dtype=getattr(torch, dtype), device="meta")
    padding = torch.empty((2, length), dtype=torch.bool, device="meta") if padded else None
    with recording(triton_cuda) as launches:
        q, k, v = packed.unbind(2)
        triton_cuda.attention(q, k, v, padding, 0.1)
    return launches


def norm_launches(width: int, dtype: str) -> list[Launch]:
    """The launch of residual_norm on (8, width)."""
    import torch
    from maskgit.kernels.residual_norm import triton_cuda

    x = torch.empty((8, width), dtype=getattr(torch, dtype), device="meta")
    with recording(triton_cuda) as launches:
        triton_cuda.residual_norm(x, x, x[0], x[0], 1e-12)
    return launches


def compiled(launch: Launch, target: str) -> dict[str, Any]:
    """What the compiler says of a launch: registers, spills, shared memory, instructions per logit."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if hasattr(triton, "knobs") and triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET: expected unset to compile kernels")
    launch = _on(launch, target)
    signature, constants, attributes = _signature(launch)
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    is_amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if is_amd else GPUTarget("cuda", int(target[3:]), 32)
    options = launch.options | {"enable_fp_fusion": True}
    if is_amd:
        options.pop("maxnreg", None)
    binary = triton.compile(source, target=gpu, options=options)
    facts = _amd(binary) if is_amd else _nvidia(binary)
    per_thread = _logits_per_thread(launch, 64 if is_amd else 32)
    if per_thread and facts.get("loop"):
        facts["instructions_per_logit"] = round(facts["loop"] / per_thread, 2)
    if launch.name == "sample_kernel":
        spec, size = launch.spec, launch.arguments["logits"].element_size()
        facts["lines_per_request"] = lines_per_request(
            binary.asm["ttgir"], spec.rows * spec.leaves * _LEAF, size
        )
    return {"kernel": launch.name, "target": target, "warps": options["num_warps"]} | facts


def lines_per_request(ttgir: str, logits: int, size: int) -> int:
    """Lines of 128 bytes that the lanes of a warp touch in one load of a tile of so many logits, at most.

    By the layout of the pointers, of which each lane has 16 bytes; 4 where neighbours are neighbours.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.MULTILINE))
    most = 0
    for shape, layout in re.findall(
        r"tt\.load .* : tensor<((?:\d+x)+)!tt\.ptr<\w+>, (#\w+)>", ttgir
    ):
        sizes = [int(n) for n in shape.split("x")[:-1]]
        if math.prod(sizes) == logits:
            places = _places_of_lanes(layouts[layout], sizes)
            lines = {place * size // _LINE for place in (_at(place, sizes) for place in places)}
            most = max(most, len(lines))
    return most


def _at(place: list[int], sizes: list[int]) -> int:
    """Where in a row an element of a tile lies, whose first axis is leaves and whose others are a leaf."""
    at = 0
    for index, size in zip(place[1:], sizes[1:], strict=True):
        at = at * size + index
    return place[0] * _LEAF + at


def _places_of_lanes(layout: str, sizes: list[int]) -> list[list[int]]:
    """The first element of each of 32 lanes, by a blocked or a linear layout."""
    if layout.startswith("#ttg.linear"):
        found = re.search(r"lane = \[(.*?\])\]", layout)
        bases = [[int(n) for n in b.split(",")] for b in re.findall(r"\[([\d, ]+)\]", found[1])]  # type: ignore[index]
        lanes = [[0] * len(sizes)]
        for base in bases:
            lanes += [[a ^ b for a, b in zip(lane, base, strict=True)] for lane in lanes]
        return lanes
    each, threads, order = (
        [int(n) for n in re.search(rf"{name} = \[([\d, ]+)\]", layout)[1].split(",")]  # type: ignore[index]
        for name in ("sizePerThread", "threadsPerWarp", "order")
    )
    lanes = []
    for lane in range(math.prod(threads)):
        place = [0] * len(sizes)
        for axis in order:
            place[axis] = lane % threads[axis] * each[axis] % sizes[axis]
            lane //= threads[axis]
        lanes.append(place)
    return lanes


def _on(launch: Launch, target: str) -> Launch:
    """The launch as that target gets it: before Hopper the head takes one leaf at a time."""
    if launch.name != "head_kernel" or target not in ("sm_80", "gfx942"):
        return launch
    head = dataclasses.replace(launch.arguments["head"], pair=False)
    arguments = launch.arguments | {"head": head}
    return dataclasses.replace(launch, arguments=arguments)


def _signature(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and divisibility of the arguments, as Triton's own launcher finds them."""
    types: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_number and value == 1 and not plain):
            types[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        if isinstance(value, tuple):
            types[parameter.name] = _types(value)
            continue
        if isinstance(value, float):
            types[parameter.name] = "fp32"
        elif is_number:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            types[parameter.name] = "*" + _POINTERS[str(value.dtype).removeprefix("torch.")]
        if not plain and not isinstance(value, float) and _place(value) % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _types(values: Any) -> Any:
    """The types of a tuple of numbers, or of tuples of them."""
    types = [_types(value) if isinstance(value, tuple) else "fp32" for value in values]
    return type(values)(*types) if hasattr(values, "_fields") else tuple(types)


def _place(value: Any) -> int:
    """What a launcher looks at: a number, or where a tensor lies; without memory, in its storage."""
    if isinstance(value, int):
        return value
    is_meta = value.device.type == "meta"
    return int(value.storage_offset() * value.element_size() if is_meta else value.data_ptr())


def _logits_per_thread(launch: Launch, lanes: int) -> float:
    """Logits that each thread takes in one turn of the walk; 0 for kernels without one."""
    spec = launch.spec
    if launch.name != "sample_kernel":
        return 0.0
    return float(spec.rows * spec.leaves * 128 / (launch.options["num_warps"] * lanes))


def _nvidia(binary: Any) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True
        )
        listing = subprocess.run(
            [tools / "nvdisasm", "-c", file], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage.stdout + usage.stderr)
    registers, stack, shared = (int(n) for n in found[-1])
    loops = _loops(listing)
    return {
        "registers": registers,
        "spill_bytes": stack if re.search(r"\bSTL\b", listing) else 0,
        "shared_bytes": max(shared, int(binary.metadata.shared)),
        "loop": loops[0] if loops else 0,
    }


def _loops(listing: str) -> list[int]:
    """Lengths, in instructions, of the loops in a SASS listing, in program order."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L[\w]+):", line)
        if label:
            labels[label.group(1)] = len(instructions)
            continue
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if found:
            instructions.append(found.group(1))
    loops = []
    for at, text in enumerate(instructions):
        target = re.search(r"BRA.*?`\((\.L\w+)\)", text)
        start = labels.get(target.group(1), at + 1) if target else at + 1
        if start < at:  # not the last instruction of all, a branch to itself
            loops.append(at - start + 1)
    return loops


def _amd(binary: Any) -> dict[str, Any]:
    text = binary.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": 4 * number("vgpr_spill_count"),  # scalars go to lanes of a vector register
        "shared_bytes": int(binary.metadata.shared),
        "loop": 0,
    }
