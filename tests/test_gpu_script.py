"""`make gpu` at toy sizes, wherever the tests run: that it runs, and writes what it measures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


def script(*arguments):
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_runs_and_keeps_its_rows(tmp_path):
    done = script("--smoke", "--out", tmp_path, "--only", "step", "graph", "head")
    assert done.returncode == 0, done.stderr[-2000:]
    files = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")}
    assert sorted(files) == ["graph.json", "head.json", "step.json"]
    for report in files.values():
        assert report["torch"]
        assert len(report["rows"]) >= 2
    assert all(row["maskgit"] > 0 for row in files["step.json"]["rows"])


def test_without_a_gpu_it_says_so(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = script("--out", tmp_path, "--only", "step")
    assert done.returncode == 1
    assert "expected an NVIDIA GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
