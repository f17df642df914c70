"""All that needs an NVIDIA GPU, in one go and within nine minutes: tests, sanitizer, benchmarks.

    make gpu                      or: python benchmarks/gpu.py [--only tests sanitizer step ...]

Needs a checkout, torch, triton and pytest; nothing is installed.  Every row is written to
benchmarks/results/<device>/<name>.json as soon as it is measured, so that a run that is cut off keeps what
it has.  Times are medians of CUDA-event timings; "cold" rotates inputs that together exceed the L2 cache;
"share" is of a copy (or of a bfloat16 product) timed in the same minute on the same device.

--smoke does the benchmarks at toy sizes wherever it runs, to see that they run; its times mean nothing.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 530.0  # seconds for everything
TESTS = ["tests/test_cuda.py", "tests/test_triton.py", "tests/test_attention.py",
         "tests/test_residual_norm.py"]  # fmt: skip
Row = dict[str, Any]


def main() -> None:
    """Run the phases in order until the time is up."""
    stage()
    from maskgit.benchmarks.gpu_benches import BENCHES, Bench

    parser = argparse.ArgumentParser(description="Tests, sanitizer and benchmarks on a GPU")
    phases = ["tests", "sanitizer", *BENCHES]
    parser.add_argument("--only", nargs="+", choices=phases, default=phases)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    started = time.monotonic()
    import torch

    device = "cpu" if given.smoke and not torch.cuda.is_available() else "cuda"
    if device == "cpu":  # Triton's kernels run in its interpreter then
        os.environ["TRITON_INTERPRET"] = "1"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu: expected an NVIDIA GPU, torch finds none; --smoke runs toy sizes on the CPU")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    folder = given.out / name.lower().replace(" ", "-")
    run_of = {"tests": run_tests, "sanitizer": run_sanitizer}
    for phase in given.only:
        left = LIMIT - (time.monotonic() - started)
        if left < 20:
            print(f"{phase}: left out, the time is up")
        elif phase in run_of:
            if not given.smoke:
                save(folder, phase, name, run_of[phase](left))
        else:
            bench = Bench(device, given.smoke, time.monotonic() + left)
            rows: list[Row] = []
            for row in BENCHES[phase](bench):
                rows.append(row)
                save(folder, phase, name, rows)
                print(phase, json.dumps(row), flush=True)


def stage() -> None:
    """Lay the packages out as they are installed, for as long as this runs, and import from there."""
    folder = Path(tempfile.mkdtemp(prefix="maskgit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(ROOT / "maskgit", folder / "maskgit", ignore=shutil.ignore_patterns("*.so"))
    for name in ("kernels", "benchmarks"):
        into = folder / "maskgit" / name
        shutil.copytree(ROOT / name, into, dirs_exist_ok=True)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def save(folder: Path, name: str, device: str, rows: Any) -> None:
    """Write what there is so far, whole or not at all."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "device": device, "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": _version("triton"), "date": time.strftime("%Y-%m-%d"), "rows": rows,
    }  # fmt: skip
    part = folder / f".{name}.json"
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(folder / f"{name}.json")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def run_tests(left: float) -> list[Row]:
    """The tests that need a GPU, and the contract's on Triton."""
    rows = []
    for arguments in (
        [*TESTS],
        ["tests/test_contract.py", "tests/test_semantics.py", "-k", "triton"],
    ):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        rows.append(_timed(command, min(left / 3, 150)))
    return rows


def run_sanitizer(left: float) -> list[Row]:
    """compute-sanitizer on small steps: out-of-bounds accesses, and races in shared memory."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"tool": "compute-sanitizer", "rc": None, "tail": "not installed"}]
    test = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_triton.py",
        "-k",
        "layouts or head",
    ]
    return [
        _timed(
            [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, *test],
            min(left / 4, 60),
        )
        for kind in ("memcheck", "racecheck")
    ]


def _timed(command: list[str], seconds: float) -> Row:
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        rc, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        rc, text = -1, str(error.stdout or "") + f"\ncut off after {seconds:.0f} s"
    row = {
        "command": " ".join(command[1:]),
        "rc": rc,
        "seconds": round(time.monotonic() - start, 1),
    }
    print(text[-1500:], flush=True)
    return row | {"tail": text.strip().splitlines()[-1] if text.strip() else ""}


if __name__ == "__main__":
    main()
