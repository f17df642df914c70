"""All that needs an NVIDIA GPU, in one go and within nine minutes: tests, sanitizer, benchmarks.

    make gpu                      or: python benchmarks/gpu/main.py [--only tests sanitizer step ...]
    make gpu-contract             every preset and field of the contract on the GPU
    make gpu-tune                 what the tile sizes should be (tune.py)

Needs a checkout, torch, triton, and for the tests pytest, scipy and hypothesis; nothing is installed, and
pytest-xdist is used where it is there.  Every row is written to
benchmarks/results/<device>/<name>.json as soon as it is measured, so that a run that is cut off keeps what
it has; at the end all goals are printed with what was measured (goals.py).  Each benchmark is a
process of its own with a limit of time, so that a fault of the device or a hang takes no other with it.
How it times: timing.py.

--smoke does the benchmarks at toy sizes wherever it runs, to see that they run; its times mean nothing.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 530.0  # seconds for everything
_BACKENDS = ("cuda", "triton", "attention", "residual_norm", "head_sample")
TESTS = [f"tests/backends/test_{name}.py" for name in _BACKENDS]
TESTS += ["tests/contract/test_commit.py", "tests/contract/test_given_scores.py"]
CONTRACT = ["tests/contract/test_contract.py", "tests/contract/test_semantics.py", "-k", "triton"]
# seconds that each gets at least
GRACE = 30.0  # seconds beyond its own limit after which a benchmark is ended
RESERVED = {"step": 60, "head": 40, "attention": 40, "maskgit": 60, "tokens": 15}
# of tests: jax would take three quarters of the GPU's memory in each of their processes
ALONE = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
TUNE_PROCESSES = 8  # that compile what is to be timed
Row = dict[str, Any]


def main() -> None:
    """Run the phases in order until the time is up."""
    staged = stage()
    from maskgit.benchmarks.gpu import goals, tune
    from maskgit.benchmarks.gpu.benches import BENCHES, bench_probe
    from maskgit.benchmarks.gpu.timing import Bench, machine
    from maskgit.kernels.common.tuning import device_name

    parser = argparse.ArgumentParser(description="Tests, sanitizer and benchmarks on a GPU")
    phases = ["tests", "sanitizer", *BENCHES]
    also = ["contract", "probe", *tune.TUNERS]
    parser.add_argument("--only", nargs="+", choices=[*phases, *also], default=phases)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tuned", type=Path, default=ROOT / "kernels", help="where tuned/ goes")
    parser.add_argument("--compile-share", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--seconds", type=float, help=argparse.SUPPRESS
    )  # of the one benchmark here
    given = parser.parse_args()
    started = time.monotonic()
    import torch

    device = "cpu" if given.smoke and not torch.cuda.is_available() else "cuda"
    if device == "cpu":  # Triton's kernels run in its interpreter then
        os.environ |= {"TRITON_INTERPRET": "1", "MASKGIT_BACKEND": "triton"}
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu: expected an NVIDIA GPU, torch finds none; --smoke runs toy sizes on the CPU")
    if given.compile_share is not None:
        share = tune.Sharded(device, given.compile_share, TUNE_PROCESSES)
        for phase in given.only:
            list(tune.TUNERS[phase][1](share))
        return
    about = machine(device) | {"triton": _version("triton"), "date": time.strftime("%Y-%m-%d")}
    name = "cpu" if device == "cpu" else device_name(torch.device("cuda"))
    folder = given.out / name
    benches = BENCHES | {"probe": bench_probe} | {n: found for n, (_, found) in tune.TUNERS.items()}
    if given.smoke or given.seconds is not None:  # here: toy sizes, or one benchmark of a whole run
        for phase in [phase for phase in given.only if phase in benches]:
            bench = Bench(device, given.smoke, time.monotonic() + (given.seconds or LIMIT))
            rows, is_sound = measure(benches[phase](bench), folder, phase, about)
            if phase in tune.TUNERS and is_sound and not bench.is_over():
                print(tune.write(tune.TUNERS[phase][0], name, rows, given.tuned))
        if given.seconds is None:
            print(goals.table(folder))
        return
    checks = {"tests": TESTS, "contract": CONTRACT}
    script = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    for phase in given.only:
        left = LIMIT - (time.monotonic() - started)
        if left < 20:
            print(f"{phase}: left out, the time is up")
        elif phase in checks:
            save(folder, phase, about, [run_tests(staged, checks[phase], left)])
        elif phase == "sanitizer":
            save(folder, phase, about, run_sanitizer(left))
        else:
            if phase in tune.TUNERS:
                compile_together(phase)
            later = sum(RESERVED.get(n, 0) for n in given.only[given.only.index(phase) + 1 :])
            seconds = max(20.0, left - later)
            command = [*script, "--seconds", f"{seconds:.0f}", "--only", phase]
            apart(command, seconds + GRACE, folder, phase, about)
    print(goals.table(folder))


def apart(command: list[str], seconds: float, folder: Path, phase: str, about: Row) -> None:
    """Run a benchmark in a process of its own; where that ends badly its file says so, beside its rows."""
    file = folder / f"{phase}.json"
    before = file.stat().st_mtime_ns if file.exists() else None
    process = subprocess.Popen(command, start_new_session=True)
    try:
        rc = process.wait(seconds)
        error = f"ended with {rc}" if rc else ""
    except subprocess.TimeoutExpired:
        error = f"cut off after {seconds:.0f} s"
    finally:
        _kill(process)
    if not error:
        return
    print(f"{phase}: {error}", flush=True)
    is_new = file.exists() and file.stat().st_mtime_ns != before
    kept = json.loads(file.read_text()) if is_new else {}
    save(folder, phase, about | {"error": kept.get("error", error)}, kept.get("rows", []))


def _kill(process: subprocess.Popen[Any]) -> None:
    """End a process, and all that it has started, which would be in the way of timings."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure(found: Any, folder: Path, phase: str, about: Row) -> tuple[list[Row], bool]:
    """(rows, whether none failed) of a benchmark, each kept as it comes; a failure ends it alone."""
    rows: list[Row] = []
    try:
        for row in found:
            rows.append(row)
            save(folder, phase, about, rows)
            print(phase, json.dumps(row), flush=True)
    except Exception as error:  # kept with the rows: the other benchmarks go on
        traceback.print_exc()
        save(folder, phase, about | {"error": f"{type(error).__name__}: {error}"[:500]}, rows)
        return rows, False
    return rows, True


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
    (folder / "pytest.ini").write_text(
        f"[pytest]\npythonpath = tests tests/contract\nmarkers =\n{marks}\n"
    )
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


def run_tests(staged: Path, tests: list[str], left: float) -> Row:
    """Tests that need a GPU; in several processes where xdist is there.

    Most of the time goes into compiling kernels, which processes share through Triton's cache.
    """
    spread = ["-v"]
    if importlib.util.find_spec("xdist"):
        spread += ["-n", str(min(14, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        spread += ["--timeout", "60"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *spread, *tests]
    return _timed(command, min(left - 10, 150 if tests is TESTS else LIMIT), staged)


def run_sanitizer(left: float) -> list[Row]:
    """compute-sanitizer over one small call of every kernel: bad accesses, races in shared memory."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return [{"tool": "compute-sanitizer", "rc": None, "tail": "not installed"}]
    # or bad accesses end in the allocator's pool
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, str(Path(__file__).resolve()), "--only", "probe", "--out", folder]
        rows = [_timed(script, min(left / 4, 60))]  # alone, which also compiles
        for kind in ("memcheck", "racecheck"):
            watched = [tool, "--tool", kind, "--error-exitcode", "9", *script]
            rows.append(_timed(watched, min(left / 4, 60)))
    del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]
    return rows


def compile_together(tuner: str) -> None:
    """Fill Triton's cache with most of what the tuner is going to time, in several processes."""
    script = [sys.executable, str(Path(__file__).resolve()), "--only", tuner]
    running = [
        subprocess.Popen([*script, "--compile-share", str(i)], stdout=subprocess.DEVNULL)
        for i in range(TUNE_PROCESSES)
    ]
    for process in running:
        try:
            process.wait(100)
        except subprocess.TimeoutExpired:
            process.kill()


def _timed(command: list[str], seconds: float, folder: Path = ROOT) -> Row:
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, env=os.environ | ALONE,
        )  # fmt: skip
        try:
            rc = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            rc = -1
            output.write(f"\ncut off after {seconds:.0f} s\n")
        output.seek(0)
        text = output.read()
    print(text[-3000:], flush=True)
    lines = text.strip().splitlines()
    failed = [line for line in lines if "FAILED" in line or line.startswith("ERROR")]
    return {
        "command": " ".join([Path(command[0]).name, *command[1:]]), "rc": rc,
        "seconds": round(time.monotonic() - start, 1), "passed": sum("PASSED" in line for line in lines),
        "failed": failed[:50], "tail": lines[-1] if lines else "",
    }  # fmt: skip


if __name__ == "__main__":
    main()
