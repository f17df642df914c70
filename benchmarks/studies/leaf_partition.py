"""What leaf sums cost when a leaf is 128 contiguous logits, or 128 logits a fixed stride apart.

bf16 logits; max and sum of exp(l - max) alone ("none"), with float32 sums over contiguous leaves, or
over strided ones (columns equal mod L in a tile).  Counts instructions in Triton's SASS for sm_90
(not run) and bundles in the TPU compiler's final schedule ("error": Pallas interpret mode, 8 x 2048,
against float64).  Needs triton, jax and libtpu, no device.  leaf_partition.py --json OUT"""
# ruff: noqa: E402

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial, reduce
from importlib import metadata, util
from pathlib import Path

NEEDS = ("triton", "jax", "libtpu")
if lacking := [p for p in NEEDS if util.find_spec(p) is None]:
    sys.exit(f"leaf_partition: missing {', '.join(lacking)}; try: pip install {' '.join(NEEDS)}")
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

# HBM bytes/s and clock in Hz are assumptions; 1.5e9 = 197e12 / (4 MXUs x 2 x 128 x 128).
CHIPS = {"v5e": (819e9, 1.5e9), "v6e": (1640e9, 1.75e9)}
GPU_FORMS = ("none", "contiguous", "strided", "strided, lane max")
GPU_SIZES = ((1024, 1, 3), (1024, 4, 3), (8192, 4, 4), (8192, 8, 3))  # tile, warps, forms
TPU_FORMS = ("none", "strided", "reduce", "reduce3d", "fold")  # contiguous after "strided"
PACKED = ("transpose", "mxu_highest", "mxu_2pass", "mxu_3pass")  # out[g, l * rows + r]


@triton.jit
def gpu_kernel(x, mx, tot, leaf, stride, TILE: tl.constexpr, FORM: tl.constexpr, S: tl.constexpr):
    """One program, one tile of a row; the last form walks 128 x S columns, 8 leaves a thread."""
    L: tl.constexpr = TILE // 128
    o = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    x += tl.program_id(0).to(tl.int64) * stride + tl.program_id(1) * TILE
    if FORM < 3:
        v = tl.load(x + tl.arange(0, TILE)).to(tl.float32) * 1.4426950408889634
        m = tl.max(v, 0)
        tl.store(mx + o, m)
        e = tl.exp2(v - m)
        if FORM > 0:
            e = tl.sum(tl.reshape(e, (L, 128) if FORM == 1 else (128, L)), FORM % 2)
            tl.store(leaf + o * L + tl.arange(0, L), e)
        tl.store(tot + o, tl.sum(e, 0))
    else:
        m = tl.full((S,), -1e30, tl.float32)
        acc = tl.zeros((S,), tl.float32)
        cols = tl.arange(0, TILE // S)[:, None] * S + tl.arange(0, S)[None, :]
        for t in range(128 * S // TILE):
            v = tl.load(x + t * TILE + cols).to(tl.float32) * 1.4426950408889634
            new = tl.maximum(m, tl.max(v, 0))
            acc = acc * tl.exp2(m - new) + tl.sum(tl.exp2(v - new[None, :]), 0)
            m = new
        tl.store(leaf + o * S + tl.arange(0, S), acc)
        tl.store(mx + o * S + tl.arange(0, S), m)


def gpu_row(form, tile, warps):
    """Compile one Triton form for sm_90 and count its instructions (of a loop: one turn)."""
    const = {"TILE": tile, "FORM": form, "S": warps * 256}
    types = {"x": "*bf16", **dict.fromkeys(("mx", "tot", "leaf"), "*fp32"), "stride": "i64"}
    types |= dict.fromkeys(const, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    source = triton.compiler.ASTSource(gpu_kernel, types, const, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target, {"num_warps": warps, "enable_fp_fusion": True})
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.check_output([tool, "-sass", "-res-usage", file.name], text=True)
    line = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9.]+)([^;]*);"
    code = [(int(a, 16), op, rest) for a, op, rest in re.findall(line, text)]
    low, high = 0, max(a for a, op, _ in code if op == "EXIT")
    if form == 3:
        jumps = [(a, re.search(r"0x(\w+)", r)) for a, op, r in code if op == "BRA" and a < high]
        low, high = next((int(t[1], 16), a) for a, t in jumps if t and int(t[1], 16) < a)
    ops = Counter(op.split(".")[0] for a, op, _ in code if low <= a <= high)
    reg, stack, local = (int(re.findall(rf"{k}:(\d+)", text)[0]) for k in ("REG", "STACK", "LOCAL"))
    row = {"target": "sm_90", "form": GPU_FORMS[form], "tile": tile, "warps": warps}
    row["instructions_per_logit"] = round(ops.total() * warps * 32 / tile, 2)
    row |= {"registers": reg, "stack_bytes": stack + local}
    return row | {"per_thread": {k: ops[k] for k in ("SHFL", "BAR", "LDS", "STS", "FADD", "MUFU")}}


def tpu_body(x, mx, out, *, form):
    """A block of rows: pass one for the row maximum, pass two for exp and its sums."""
    rows, n = x.shape[0], x.shape[1] // 128
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, 128), 1)
    chunk = lambda a: x[:, a * 128 : (a + 1) * 128].astype(jnp.float32)  # noqa: E731
    e = lambda a: jnp.exp(chunk(a) - m)  # noqa: E731

    def total(get, op):  # eight accumulators: a single one would wait for itself
        return reduce(op, [reduce(op, [get(a) for a in range(i, n, 8)]) for i in range(8)])

    def product(v):  # lane sums by the MXU; ones are exact in bfloat16
        dot, s = partial(jnp.einsum, "ik,jk->ij", preferred_element_type="float32"), 0.0
        if form == "mxu_highest":
            return dot(jnp.ones((8, 128)), v, precision="highest")
        for _ in range(int(form[4])):
            part = v.astype(jnp.bfloat16)
            v -= part.astype(jnp.float32)
            s += dot(jnp.ones((8, 128), jnp.bfloat16), part)
        return s

    def fold(a, h):  # a transposing tree over 2 h leaves: each roll serves one pair of vectors
        low, v = (fold(a, h // 2), fold(a + h, h // 2)) if h > 1 else (e(a), e(a + 1))
        take = (lane & h) == 0
        return jnp.where(take, low, v) + pltpu.roll(jnp.where(take, v, low), h, 1)

    m = total(chunk, jnp.maximum).max(1, keepdims=True)
    mx[...] = jnp.broadcast_to(m, mx.shape)
    if form in PACKED:
        for g, a in enumerate(range(0, n, 128 // rows)):
            v = jnp.concatenate([e(a + i) for i in range(128 // rows)], 0)
            out[g] = v.T.sum(0) if form == "transpose" else product(v)[0]
        return
    if form in ("none", "strided", "fold"):
        v = fold(0, n // 2) if form == "fold" else total(e, jnp.add)
        for d in [d for d in (64, 32, 16, 8) if form != "none" and d >= n]:
            v += pltpu.roll(v, d, 1)  # fewer than 128 leaves: fold the lanes
        v = jnp.broadcast_to(v.sum(1, keepdims=True), v.shape) if form == "none" else v
    elif form == "reduce3d":
        v = jnp.exp(x[...].astype(jnp.float32) - m).reshape(rows, n, 128).sum(-1)
        v = jnp.concatenate([v] * (128 // n), 1)
    else:
        get = lambda a: jnp.where((lane & (n - 1)) == a, e(a).sum(1, keepdims=True), 0.0)  # noqa: E731
        v = total(get, jnp.add)
    out[...] = v


def tpu_call(form, rows, cols, steps, interpret=False):
    """The Pallas call over steps blocks of rows x cols."""
    shapes = [(steps, h, 128) for h in (rows, rows * cols // 16384 if form in PACKED else rows)]
    specs = [pl.BlockSpec((None, *s[1:]), lambda i: (i, 0, 0)) for s in shapes]
    kw = {"grid": (steps,), "in_specs": [pl.BlockSpec((rows, cols), lambda i: (i, 0))]}
    kw |= {"out_shape": [jax.ShapeDtypeStruct(s, "float32") for s in shapes], "out_specs": specs}
    kw |= {"name": f"{form}_{cols}", "interpret": interpret}
    return pl.pallas_call(partial(tpu_body, form=form), **kw)


def error(form, rows=8, cols=2048):
    """Largest relative error of the leaf sums in interpret mode against float64."""
    x = jnp.asarray(np.random.default_rng(0).normal(0, 3, (rows, cols)), "bfloat16")
    got = np.asarray(tpu_call(form, rows, cols, 1, True)(x)[1][0], np.float64)
    e, n = np.asarray(x, np.float64), cols // 128
    e = np.exp(e - e.max(1, keepdims=True))
    want = e.reshape(rows, 128, n).sum(1) if form == "strided" else e.reshape(rows, n, 128).sum(2)
    want = e.sum(1, keepdims=True) if form == "none" else want
    got = got.reshape(n, rows).T if form in PACKED else got[:, : want.shape[1]]
    return float(np.max(np.abs(got / want - 1)))


def tpu_row(dump, chip, form, cols, rows=8, steps=64):
    """Compile one Pallas form for one chip and read its schedule."""
    topology = topologies.get_topology_desc(f"{chip}:2x2", platform="tpu")
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    x = jax.ShapeDtypeStruct((steps * rows, cols), "bfloat16", sharding=place)
    row = {"target": chip, "form": form, "rows": rows, "columns": cols, "error": error(form)}
    jax.jit(tpu_call(form, rows, cols, steps)).lower(x).compile()
    tails = "schedule-analysis_final_bundles", "[0-9]-final_hlo-static-per-bundle-utilization"
    text, use = (max(dump.glob(f"*-{form}_{cols}.*{t}.txt")).read_text() for t in tails)
    names, table = re.findall(r"[A-Z:]+", use.splitlines()[1]), use.split("UTILIZATION:")[1]
    sums = [sum(map(int, c)) for c in zip(*map(str.split, table.split("\n")[1:-1]), strict=True)]
    bundles, kilo = int(re.search(r"total scheduled bundles:\s+(\d+)", text)[1]), rows * cols / 1024
    row |= {"bundles_per_step": bundles, "bundles_per_1024_logits": round(bundles / kilo, 2)}
    row["share_of_dma_time"] = round(bundles / CHIPS[chip][1] * CHIPS[chip][0] / kilo / 2048, 2)
    return row | {"per_1024": {k: round(v / kilo, 2) for k, v in zip(names, sums, strict=True)}}


def main():
    """Compile, print and write."""
    if len(sys.argv) != 3 or sys.argv[1] != "--json":
        sys.exit("usage: leaf_partition.py --json OUT")
    found = {"label": "from the compiler's output, not a run", "assumed_bytes_per_s_and_hz": CHIPS}
    found |= {"versions": {p: metadata.version(p) for p in NEEDS}, "rows": []}
    with tempfile.TemporaryDirectory() as tmp:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={tmp} --xla_jf_dump_llo_text=true"
        jobs = [partial(gpu_row, f, t, w) for t, w, forms in GPU_SIZES for f in range(forms)]
        for chip, cols in ((chip, cols) for cols in (16384, 2048) for chip in CHIPS):
            jobs += [partial(tpu_row, Path(tmp), chip, form, cols) for form in TPU_FORMS + PACKED]
        for job in jobs:
            found["rows"].append(job())
            print(*found["rows"][-1].values(), flush=True)
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
