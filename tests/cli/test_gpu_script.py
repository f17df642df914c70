"""`make gpu` at toy sizes, wherever the tests run: that it runs, and writes what it measures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from maskgit.benchmarks.gpu import goals
from maskgit.benchmarks.gpu import main as gpu
from maskgit.kernels.common import tuning

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def script(*arguments):
    return subprocess.run(
        [sys.executable, "benchmarks/gpu/main.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def results(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*/*.json")}


def test_it_runs_and_keeps_its_rows(tmp_path):
    benches = ["step", "graph", "head", "attention", "tokens", "probe"]
    done = script("--smoke", "--out", tmp_path, "--only", *benches)
    assert done.returncode == 0, done.stderr[-2000:]
    files = results(tmp_path)
    assert sorted(files) == sorted(benches)
    for name, report in files.items():
        assert report["torch"]
        assert report["rows"]
        assert all(row.get("maskgit", 1.0) > 0 for row in report["rows"]), name
    assert all(row["candidate_tokens"] == 0 for row in files["tokens"]["rows"])
    table = done.stdout[done.stdout.index("| benchmark |") :]
    assert "draw + score over greedy + score" in table
    assert (
        "N 257, head 48: the best of torch's backends over auto | >= 0.97 x | not measured yet"
        in table
    )


ENDS = {  # a benchmark that keeps a row and then, in a process of its own,
    "hangs": "time.sleep(600)",
    "leaves a process that hangs": (
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
    ),
    "is killed": "os.kill(os.getpid(), 9)",
    "fails": "sys.exit(3)",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_benchmark_that_does_not_end_takes_no_other_with_it(how, tmp_path):
    gpu.save(tmp_path, "head", {}, [{"of": "an earlier run"}])
    code = "import json, os, pathlib, subprocess, sys, time\n"
    keep = f"pathlib.Path({str(tmp_path / 'step.json')!r}).write_text(json.dumps(dict(rows=[1])))\n"
    for phase, last in (("step", keep + ENDS[how]), ("head", "sys.exit(4)"), ("graph", "pass")):
        gpu.apart([sys.executable, "-c", code + last], 2.0, tmp_path, phase, {"device": "x"})
    files = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert files["step"]["rows"] == [1]  # what it had measured stays
    assert files["step"]["device"] == "x"
    assert ("cut off" if "hang" in how else "ended with") in files["step"]["error"]
    assert files["head"] == {"device": "x", "error": "ended with 4", "rows": []}
    assert "graph" not in files


def test_what_the_tests_are_run_with(monkeypatch, tmp_path):
    """jax is kept from the GPU, and one failure, or thirty, from ending the others."""
    seen = {}

    class Process:
        pid = -1

        def __init__(self, command, env, **_):
            seen.update(env, command=command)

        def wait(self, seconds=None):
            return 0

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    gpu.run_tests(tmp_path, gpu.TESTS, 100.0)
    assert seen["JAX_PLATFORMS"] == "cpu"
    assert "--maxfail" not in seen["command"]


@pytest.mark.slow
def test_whole_generations(tmp_path):
    done = script("--smoke", "--out", tmp_path, "--only", "maskgit")
    assert done.returncode == 0, done.stderr[-2000:]
    assert results(tmp_path)["maskgit"]["rows"][0]["eager"] > 0


def test_tuning_writes_what_the_kernels_read(tmp_path, monkeypatch):
    tuners = ["tune-step", "tune-head", "tune-attention"]
    done = script("--smoke", "--out", tmp_path / "out", "--tuned", tmp_path, "--only", *tuners)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(results(tmp_path / "out")) == sorted(tuners)
    for op in ("decode_step", "head_sample", "attention"):
        entries = json.loads((tmp_path / op / "tuned" / "cpu.json").read_text())
        assert all(set(entry) == {"when", "use"} for entry in entries)
    assert {entry["use"]["wins"] for entry in entries} <= {0, 1}
    monkeypatch.setattr(tuning, "_entries", lambda op, name: entries)
    nearest = tuning._nearest("attention", "a device", (("dtype", "bfloat16"), ("keys", 17)))
    assert nearest == entries[0]["use"]


def test_goals_are_judged_by_their_worst_row(tmp_path):
    rows = [
        {"shape": [256, 126464], "dtype": "bfloat16", "mode": mode, "bytes": 64749568,
         "maskgit": seconds, "share_of_copy": 0.9, "extra_share": 0.001, "compiled": 4 * seconds,
         "float64 Gumbel": "out of memory"}
        for mode, seconds in (("greedy", 1e-4), ("draw", 1.2e-4))
    ]  # fmt: skip
    rows.append(rows[0] | {"dtype": "float32", "share_of_copy": 0.5})
    (tmp_path / "step.json").write_text(json.dumps({"device": "a GPU", "rows": rows}))
    table = goals.table(tmp_path)
    assert "share of a copy's rate | >= 0.88 | 0.5 (missed) |" in table
    assert (
        "| draw + score over greedy + score, V >= 8192, bfloat16 | <= 1.1 x | 1.2 x (missed) |"
        in table
    )
    assert "| torch.compile over draw + score, bfloat16 | >= 3 x | 4 x |" in table
    assert (
        "| LLaDA's float64 draw over draw + score, bfloat16 | >= 40 x | not measured yet |" in table
    )
    assert table.endswith("device a GPU.\n")


def test_without_a_gpu_it_says_so(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = script("--out", tmp_path, "--only", "step")
    assert done.returncode == 1
    assert "expected an NVIDIA GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
