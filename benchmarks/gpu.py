"""All that needs an NVIDIA GPU, in one go and within nine minutes: tests, sanitizer, benchmarks.

    make gpu                      or: python benchmarks/gpu.py [--only tests sanitizer step ...]
    make gpu-tune                 what the tile sizes should be (gpu_tune.py)

Needs a checkout, torch, triton, and for the tests pytest, scipy and hypothesis; nothing is installed, and
pytest-xdist is used where it is there.  Every row is written to
benchmarks/results/<device>/<name>.json as soon as it is measured, so that a run that is cut off keeps what
it has; at the end all goals are printed with what was measured (gpu_goals.py).  How it times: gpu_timing.py.

--smoke does the benchmarks at toy sizes wherever it runs, to see that they run; its times mean nothing.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.util
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
         "tests/test_residual_norm.py", "tests/test_head_sample.py", "tests/test_commit.py",
         "tests/test_given_scores.py"]  # fmt: skip
CONTRACT = ["tests/test_contract.py", "tests/test_semantics.py", "-k", "triton"]
TUNE_PROCESSES = 8  # that compile what is to be timed
Row = dict[str, Any]


def main() -> None:
    """Run the phases in order until the time is up."""
    staged = stage()
    from maskgit.benchmarks import gpu_goals, gpu_tune
    from maskgit.benchmarks.gpu_benches import BENCHES, bench_probe
    from maskgit.benchmarks.gpu_timing import Bench, machine

    parser = argparse.ArgumentParser(description="Tests, sanitizer and benchmarks on a GPU")
    phases = ["tests", "sanitizer", *BENCHES]
    also = ["probe", *gpu_tune.TUNERS]
    parser.add_argument("--only", nargs="+", choices=[*phases, *also], default=phases)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tuned", type=Path, default=ROOT / "kernels", help="where tuned/ goes")
    parser.add_argument("--compile-share", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    started = time.monotonic()
    import torch

    device = "cpu" if given.smoke and not torch.cuda.is_available() else "cuda"
    if device == "cpu":  # Triton's kernels run in its interpreter then
        os.environ |= {"TRITON_INTERPRET": "1", "MASKGIT_BACKEND": "triton"}
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu: expected an NVIDIA GPU, torch finds none; --smoke runs toy sizes on the CPU")
    if given.compile_share is not None:
        share = gpu_tune.Sharded(device, given.compile_share, TUNE_PROCESSES)
        for phase in given.only:
            list(gpu_tune.TUNERS[phase][1](share))
        return
    about = machine(device) | {"triton": _version("triton"), "date": time.strftime("%Y-%m-%d")}
    name = about["device"].lower().replace(" ", "-")
    folder = given.out / name
    tuning = [phase for phase in given.only if phase in gpu_tune.TUNERS]
    if tuning and device == "cuda" and not given.smoke:
        compile_together(tuning)
    benches = (
        BENCHES | {"probe": bench_probe} | {n: tune for n, (_, tune) in gpu_tune.TUNERS.items()}
    )
    for phase in given.only:
        left = LIMIT - (time.monotonic() - started)
        if left < 20:
            print(f"{phase}: left out, the time is up")
        elif phase == "tests":
            if not given.smoke:
                save(folder, phase, about, run_tests(staged, left))
        elif phase == "sanitizer":
            if not given.smoke:
                save(folder, phase, about, run_sanitizer(left))
        else:
            bench = Bench(device, given.smoke, time.monotonic() + left)
            rows: list[Row] = []
            for row in benches[phase](bench):
                rows.append(row)
                save(folder, phase, about, rows)
                print(phase, json.dumps(row), flush=True)
            if phase in gpu_tune.TUNERS and rows:
                print(gpu_tune.write(gpu_tune.TUNERS[phase][0], name, rows, given.tuned))
    print(gpu_goals.table(folder))


def stage() -> Path:
    """A folder with the packages as they are installed, for as long as this runs; imports come from there."""
    folder = Path(tempfile.mkdtemp(prefix="maskgit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(ROOT / "maskgit", folder / "maskgit", ignore=shutil.ignore_patterns("*.so"))
    for name in ("kernels", "benchmarks"):
        into = folder / "maskgit" / name
        shutil.copytree(ROOT / name, into, dirs_exist_ok=True)
    shutil.copytree(ROOT / "tests", folder / "tests")
    marks = "\n".join(f"  {name}: see pyproject.toml" for name in ("cuda", "tpu", "slow"))
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{marks}\n")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return folder


def save(folder: Path, name: str, about: Row, rows: Any) -> None:
    """Write what there is so far, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.json"
    part.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    part.replace(folder / f"{name}.json")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def run_tests(staged: Path, left: float) -> list[Row]:
    """The tests that need a GPU, and the contract's on Triton; in several processes where xdist is there.

    Most of the time goes into compiling kernels, which processes share through Triton's cache.
    """
    spread = []
    if importlib.util.find_spec("xdist"):
        spread = ["-n", str(min(12, os.cpu_count() or 1)), "--maxfail", "30"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *spread]
    return [
        _timed([*command, *TESTS], min(left / 3, 120), staged),
        _timed([*command, *CONTRACT], min(left / 3, 120), staged),
    ]


def run_sanitizer(left: float) -> list[Row]:
    """compute-sanitizer over one small call of every kernel: bad accesses, races in shared memory."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return [{"tool": "compute-sanitizer", "rc": None, "tail": "not installed"}]
    script = [sys.executable, str(Path(__file__).resolve()), "--only", "probe", "--out"]
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = (
        "1"  # or bad accesses end in the allocator's pool
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            _timed(
                [tool, "--tool", kind, "--error-exitcode", "9", *script, folder], min(left / 4, 60)
            )
            for kind in ("memcheck", "racecheck")
        ]
    del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]
    return rows


def compile_together(tuners: list[str]) -> None:
    """Fill Triton's cache with what the tuners are going to time, in several processes."""
    script = [sys.executable, str(Path(__file__).resolve()), "--only", *tuners]
    running = [
        subprocess.Popen([*script, "--compile-share", str(i)], stdout=subprocess.DEVNULL)
        for i in range(TUNE_PROCESSES)
    ]
    for process in running:
        process.wait()


def _timed(command: list[str], seconds: float, folder: Path = ROOT) -> Row:
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False
        )
        rc, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        rc, text = -1, out.decode(errors="replace") if isinstance(out, bytes) else out
        text += f"\ncut off after {seconds:.0f} s"
    print(text[-3000:], flush=True)
    lines = text.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "command": " ".join([Path(command[0]).name, *command[1:]]), "rc": rc,
        "seconds": round(time.monotonic() - start, 1), "failed": failed[:50],
        "tail": lines[-1] if lines else "",
    }  # fmt: skip


if __name__ == "__main__":
    main()
