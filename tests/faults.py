"""Faults that the tests must find: each is put into a copy of the tree, alone, and its tests must fail.

    python tests/faults.py                 all, one line each; exits with 1 if one is not found
    python tests/faults.py --only 3 17     some of them
    python tests/faults.py --suite         against everything that `make test` runs, hours

A fault is a line that stands once in a file, what it becomes, and the tests that are quickest to see it.
One of a clause of the contract and a backend at least: ties, clamps, counts, key words, the last column,
dead rows, NaN, thresholds, rounding, noise, what is static in a compiled program.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
IGNORED = (".git", ".venv", "build", "*.egg-info", "__pycache__", ".mypy_cache", ".ruff_cache")


class Fault(NamedTuple):
    """`old` becomes `new` in `file`; `tests` are pytest's arguments."""

    file: str
    old: str
    new: str
    tests: str


def contract(backend: str, more: str = "") -> str:
    """The contract tests of a backend."""
    return f"tests/contract/test_contract.py -k '{backend}{f' and ({more})' if more else ''}'"


STEP = "kernels/decode_step/"
FAULTS = (
    # the door
    Fault(STEP + "door.py", ".max() < top:", ".max() <= top:", "tests/contract/test_errors.py"),
    Fault(STEP + "door.py", "if count < least:", "if count + 1 < least:", "tests/contract/test_arguments.py"),
    Fault("kernels/common/arrays.py", "x.device, x.requires_grad)", "x.device)", "tests/contract/test_arguments.py -k once"),
    # a rule at a step
    Fault(STEP + "rule/tables.py", "(step < base % num_steps)", "(step <= base % num_steps)", "tests/contract/test_schedule.py"),
    Fault(STEP + "rule/tables.py", '{"floor": np.floor,', '{"floor": np.ceil,', "tests/contract/test_golden.py -k reference-maskgit"),
    Fault(STEP + "rule/counts.py", "np.minimum(target, limit - 1) if", "np.minimum(target, limit) if", contract("cpp", "preset")),
    Fault(STEP + "rule/tables.py", "return 1.0 - masked(after) / masked(before)", "return masked(after) / masked(before)", "tests/contract/test_golden.py -k 'reference-md4'"),
    Fault(STEP + "rule/plan.py", "return 1.0 - (step + 1) / num_steps", "return 1.0 - step / num_steps", "tests/contract/test_golden.py -k reference-maskgit"),
    Fault(STEP + "rule/plan.py", '"all" if is_last and rule', '"all" if rule', "tests/contract/test_golden.py -k reference-amused"),
    Fault(STEP + "rule/plan.py", "threshold=rounded(rule.threshold, compared_in)", "threshold=rule.threshold", "tests/contract/test_thresholds.py"),
    Fault(STEP + "rule/plan.py", "edit_threshold=rounded(rule.edit_threshold or 0.0, compared_in)", "edit_threshold=rule.edit_threshold or 0.0", "tests/contract/test_thresholds.py"),
    Fault(STEP + "rule/plan.py", "return min(value, _MAX_TEMPERATURE) if", "return value if", "tests/contract/test_temperatures.py"),
    Fault(STEP + "rule/plan.py", "size = batch * length if rule", "size = length if rule", "tests/contract/test_golden.py -k 'reference-vampnet or reference-dream'"),
    Fault(STEP + "rule/plan.py", "scaled = scaled or name", "scaled = scaled and name", "tests/contract/test_golden.py tests/contract/test_semantics.py -k 'reference or filter'"),
    # the judge
    Fault(STEP + "reference.py", "row[np.isnan(row)] = -np.inf", "row[np.isnan(row)] = np.inf", "tests/contract/test_semantics.py tests/contract/test_contract.py -k 'cpp or semantics'"),
    Fault(STEP + "reference.py", "ranked[::-1][stay[b]] if stay[b]", "ranked[::-1][stay[b] - 1] if stay[b]", "tests/contract/test_golden.py -k reference-maskgit"),
    Fault(STEP + "reference.py", "ends = how.factor_tail and", "ends = not how.factor_tail and", "tests/contract/test_golden.py -k reference-fast-dllm-factor"),
    Fault(STEP + "reference.py", "eligible = x.eligible & (~known | how.revises)", "eligible = x.eligible & ~known", "tests/contract/test_golden.py -k reference-soundstorm"),
    # plain torch
    Fault(STEP + "plain/commit.py", "exact = eligible & (rank < now - stay)", "exact = eligible & (rank <= now - stay)", contract("torch", "preset")),
    Fault(STEP + "plain/torch_ref.py", "nan_to_num(-math.inf, _FLOAT_MAX, -math.inf)", "nan_to_num(_FLOAT_MAX, _FLOAT_MAX, -math.inf)", contract("torch")),
    Fault(STEP + "plain/torch_ref.py", "if whole < vocab:", "if whole + 1 < vocab:", "tests/contract/test_semantics.py -k plain_maximum"),
    Fault(STEP + "plain/torch_ref.py", "return leaf * LEAF + token * GROUPS + group", "return leaf * LEAF + group * PER_GROUP + token", contract("torch", "preset")),
    Fault(STEP + "plain/torch_ref.py", "within = (total if below else total - ranked) <= limit", "within = total <= limit", contract("torch")),
    Fault(STEP + "plain/commit.py", 'base = np.broadcast_to(now.sum(), now.shape) if how.count_rows == "mean" else now', "base = now", contract("torch", "preset")),
    Fault(STEP + "plain/commit.py", "np.minimum(target, limit - 1) if", "np.minimum(target, limit) if", contract("torch")),
    # plain jax
    Fault(STEP + "plain/commit.py", "np.cumsum(eligible & ~follows, -1)", "np.cumsum(eligible, -1)", contract("torch", "preset or field")),
    Fault(STEP + "plain/jax_ref.py", "largest.at[rows, group].max(values)", "largest.at[rows, group].min(values)", "tests/contract/test_golden.py -k 'jax and dinfer'"),
    Fault(STEP + "plain/jax_ref.py", "return jnp.where(odd, -jnp.inf, row)", "return row", contract("jax")),
    Fault(STEP + "plain/commit.py", "confidence >= floor)", "confidence > floor)", contract("jax")),
    Fault(STEP + "plain/commit.py", "elif noise is not None and how.adds_noise:", "elif False:", contract("jax", "preset")),
    # what a compiled program is told apart by
    Fault(STEP + "dispatch.py", 'static_argnames=("mask_token_id", "row", "commit", "dtype"))', 'static_argnames=("mask_token_id", "row", "commit", "dtype", "numbers"))', "tests/backends/test_jax_switches.py -k share"),
    Fault(STEP + "rule/plan.py", "return Arguments(np.uint32(step),", "return Arguments(np.uint32(0),", contract("jax", "preset")),
    Fault(STEP + "dispatch.py", "jnp.asarray(np.stack(numbers))[plan.index]", "jnp.asarray(np.stack(numbers))[0]", "tests/backends/test_jax_switches.py -k traced"),
    # words of keys, positions, checks
    Fault(STEP + "inputs.py", "torch.stack([wide & 0xFFFFFFFF, (wide >> 32) & 0xFFFFFFFF], dim=1)", "torch.stack([(wide >> 32) & 0xFFFFFFFF, wide & 0xFFFFFFFF], dim=1)", contract("torch", "preset")),
    Fault("kernels/common/philox/stream.py", "STREAM_CHOICE = ", "STREAM_CHOICE = 0 * ", "tests/contract/test_philox.py tests/contract/test_semantics.py tests/contract/test_sampling.py"),
    Fault(STEP + "door.py", "0 <= min(counts) <= max(counts) <= length", "0 <= min(counts)", "tests/contract/test_arguments.py -k every_call"),
    Fault(STEP + "door.py", "masked & eligible).sum(1)", "masked).sum(1)", "tests/contract/test_arguments.py tests/sampling/test_generate.py"),
    Fault("kernels/common/rounding.py", "(bits + 0x7FFF + ((bits >> 16) & 1))", "(bits + 0x8000)", "tests/contract/test_thresholds.py tests/contract/test_semantics.py tests/contract/test_contract.py -k bfloat16"),
    # C++
    Fault("csrc/select.cpp", "confidence > other.confidence : position < other.position", "confidence > other.confidence : position > other.position", contract("cpp")),
    Fault("csrc/select.cpp", "if (clamp == kKeepOne) target = std::max<int64_t>(target, 1);", "", contract("cpp", "preset")),
    Fault("csrc/select.cpp", "float(total) / float(p.batch)", "float(total) / float(p.batch + 1)", contract("cpp", "preset")),
    Fault("csrc/select.cpp", "p.threshold_strict ? falling[i] > bound", "!p.threshold_strict ? falling[i] > bound", "tests/contract/test_thresholds.py -k cpp"),
    Fault("csrc/draw-inl.h", "return begin + token * kGroups + group;", "return begin + group * kPerGroup + token;", contract("cpp", "preset")),
    # the head
    Fault("kernels/head_sample/chunked.py", "seeds=None if x.seeds is None else x.seeds[number // length]", "seeds=None if x.seeds is None else x.seeds[number * 0]", "tests/backends/test_head_sample.py"),
    Fault("kernels/head_sample/chunked.py", "else (number % length)[:, None]", "else (number * 0)[:, None]", "tests/backends/test_head_sample.py"),
    # Triton, in its interpreter
    Fault(STEP + "triton_cuda/tiles.py", "return tl.fma(x - u, guidance, u)", "return u + guidance * (x - u)", "tests/backends/test_triton.py -k overflows"),
    Fault(STEP + "triton_cuda/select.py", "(other[None, :] < n[:, None])", "(other[None, :] > n[:, None])", "tests/backends/test_triton.py"),
    Fault(STEP + "triton_cuda/select.py", "tl.cumsum(equal.to(tl.int32), 0) <= room", "tl.cumsum(equal.to(tl.int32), 0) < room", "tests/backends/test_triton.py"),
    Fault(STEP + "triton_cuda/tiles.py", "return tl.minimum(tl.where(x == x, x, -float(\"inf\")), FLOAT_MAX)", "return tl.minimum(tl.where(x == x, x, FLOAT_MAX), FLOAT_MAX)", "tests/backends/test_triton.py"),
    Fault(STEP + "triton_cuda/tiles.py", "x = tl.where((index >= 0) & (index < vocab), x, -float(\"inf\"))", "x = tl.where((index >= 0) & (index <= vocab), x, -float(\"inf\"))", "tests/backends/test_triton.py"),
    # Pallas, in its simulator
    Fault(STEP + "pallas_tpu/commit.py", "return jnp.maximum(now - target, 0)\n    limit", "return jnp.maximum(now - target - 1, 0)\n    limit", "tests/backends/test_pallas.py --all -k 'every_preset and llada'"),
    Fault(STEP + "pallas_tpu/commit.py", "commit = competes & (commit | (rank == 0))", "commit = competes & commit", "tests/backends/test_pallas.py --all -k 'runs or hierarchy'"),
    # loops
    Fault("maskgit/sampling/trajectory.py", "library.where(drawn, -spread, 0.0)", "library.where(drawn, spread, 0.0)", "tests/sampling/test_trajectory.py"),
)  # fmt: skip


def copied(folder: Path) -> Path:
    """A copy of the tree, without what git does not know."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*IGNORED), symlinks=True)
    return tree


def laid_out(tree: Path) -> Path:
    """The package as it is installed, first on the path of a test's process."""
    site = tree / "build" / "faults"
    shutil.rmtree(site, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(tree / "maskgit", site / "maskgit", ignore=ignored)
    for source, target in (("kernels", "kernels"), ("benchmarks", "benchmarks")):
        ignored = shutil.ignore_patterns("__pycache__")
        place = site / "maskgit" / target
        shutil.copytree(tree / source, place, ignore=ignored, dirs_exist_ok=True)
    shutil.copy(tree / "maskgit/kernels/__init__.py", site / "maskgit/kernels/__init__.py")
    return site


def run(tree: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """The tests on the tree, until the first that fails."""
    environment = os.environ | {"PYTHONPATH": str(laid_out(tree)), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-P",  # the tree itself is not laid out as installed
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *shlex.split(tests),
    ]
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def found(tree: Path, fault: Fault, tests: str) -> tuple[bool, str]:
    """Whether the tests fail with the fault in the tree, and which was the first."""
    path = tree / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file}: expected {fault.old!r} once, got {text.count(fault.old)}")
    path.write_text(text.replace(fault.old, fault.new))
    is_native = fault.file.startswith("csrc")
    try:
        if is_native:
            build(tree)
        done = run(tree, tests)
    finally:
        path.write_text(text)
        if is_native:
            shutil.copy(next((ROOT / "maskgit").glob("_C*.so")), tree / "maskgit")
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"{fault.file}: pytest ended with {done.returncode}: {done.stdout[-2000:]}"
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, failed[0] if failed else ""


def build(tree: Path) -> None:
    """The C++ core of the tree."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)


def main() -> int:
    """Print a line for each fault; 1 if one is not found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", help="numbers of faults")
    parser.add_argument("--suite", action="store_true", help="all of make test for each of them")
    options = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        for number in options.only or range(len(FAULTS)):
            fault, begin = FAULTS[number], time.monotonic()
            is_found, test = found(tree, fault, "tests" if options.suite else fault.tests)
            missed += not is_found
            said = "found" if is_found else "NOT FOUND"
            seconds = time.monotonic() - begin
            print(
                f"{number:3} {said:9} {seconds:5.0f} s  {fault.file}: {fault.new.strip()[:60]}  {test}",
                flush=True,
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
