"""Long work: what it says while it runs, when it is stopped, when the disk is full, however many steps."""

import errno
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from maskgit.kernels.decode_step.rule.plan import _resolved, resolve
from maskgit.kernels.decode_step.rule.schedules import linspace
from typer.testing import CliRunner

import maskgit
from maskgit import StepRule
from maskgit.cli.main import app
from maskgit.report import progress
from maskgit.report.progress import Progress

HUGE = 10**9


def test_a_pipe_gets_a_line_at_once_and_one_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("work", 1000) as bar:
        for _ in range(150):
            now[0] += 1.0
            bar.update(note="loss=1.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "work: 0 of 1000", "work: 60 of 1000 (1/s), loss=1.5", "work: 120 of 1000 (1/s), loss=1.5",
        "work: 150 of 1000 (1/s), loss=1.5",
    ]  # fmt: skip
    with Progress("bench") as bar:
        for i in range(100):
            now[0] += 1.0
            bar.tell(f"round {i}")
    assert capsys.readouterr().err.splitlines() == ["bench: started", "bench: round 59"]
    with Progress("work", 3, show=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_bench_says_something_at_once_and_each_result_when_it_is_there(monkeypatch):
    pytest.importorskip("torch")
    from maskgit.benchmarks import decode_step

    def run(*args, done, progress, **options):
        progress("inputs")
        done(stored["runs"][0])
        raise OSError("the second broke")

    path = Path(__file__).parents[2] / "benchmarks/results/xeon-2-threads/decode_step.json"
    stored = json.loads(path.read_text())
    monkeypatch.setattr(decode_step, "run", run)
    result = CliRunner().invoke(app, ["bench", "decode-step"])
    assert result.stderr.splitlines() == ["bench: started", "Error: the second broke"]
    assert "maskgit cpp" in result.stdout
    assert result.exit_code == 1


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_full_disk_costs_no_measurement(as_json, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    from maskgit.benchmarks import cli

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(cli, "atomic_write", full)
    words = [
        "--shape",
        "2x8",
        "--samples",
        "1",
        "--seconds",
        "0.01",
        "--no-memory",
        "--mode",
        "greedy",
    ]
    out = ["--out", str(tmp_path / "x.json")]
    result = CliRunner().invoke(app, ["bench", "decode-step", *words, *out, *as_json])
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr.splitlines()[-1]
    if as_json:
        assert json.loads(result.stdout)["runs"]
    else:
        assert "maskgit cpp" in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    for words in (["presets"], ["presets", "--help"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "maskgit", *words],
                stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1, done.stderr
        assert "No space left" in done.stderr


def test_an_interrupt_says_where_the_state_is(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    from maskgit.training import loop

    step = loop.train_step
    stop = [7]

    def interrupted(task, state):
        if state.step == stop[0]:
            raise KeyboardInterrupt
        return step(task, state)

    monkeypatch.setattr(loop, "train_step", interrupted)
    out = tmp_path / "t.safetensors"
    words = [
        "train",
        "tokenizer",
        "--out",
        str(out),
        "--steps",
        "9",
        "--checkpoint-every",
        "3",
        "--quiet",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 130
    assert result.stderr == (
        f"Stopped. tokenizer: stopped at step 7 of 9; the state of step 6 is in {out}: add --resume to go "
        "on from there\n"
    )
    stop[0] = 6
    again = CliRunner().invoke(app, [*words, "--resume"])
    assert "stopped at step 6 of 9; the state of step 6 is in" in again.stderr
    stop[0] = 2
    assert "no state was written yet" in CliRunner().invoke(app, words).stderr
    stop[0] = -1
    assert CliRunner().invoke(app, [*words, "--resume"]).exit_code == 0


def test_a_step_of_many_takes_no_memory_that_grows_with_them():
    _resolved.cache_clear()
    tracemalloc.start()
    for rule in map(StepRule.preset, StepRule.presets()):
        for step in (0, HUGE // 2, HUGE - 1):
            if "compound" not in (
                rule.choice_anneal,
                rule.sample_anneal,
            ):  # a product: no array, but slow
                resolve(rule, step, HUGE, (1, 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize("rule", ["llada", "threshold", "bd3lm", "maskgit-fixed"])
def test_the_loop_ends_with_its_work(rule):
    logits = np.random.default_rng(0).normal(size=(2, 6, 9)).astype(np.float32)
    result = maskgit.generate(
        lambda tokens: logits, np.full((2, 6), 9), rule=rule, mask_token_id=9, num_steps=HUGE,
        seeds=[1, 2], backend="reference",
    )  # fmt: skip
    assert result.num_forwards <= 12
    assert (result.tokens != 9).all()


def test_an_entry_of_a_grid_is_torchs():
    torch = pytest.importorskip("torch")
    for start, end, count in ((0, 1, 2), (0, 1, 13), (1, 1e-5, 1001), (1, 0.001, 257)):
        whole = torch.linspace(start, end, count).numpy()
        got = [linspace(start, end, count, i) for i in range(count)]
        np.testing.assert_array_equal(whole, np.array(got))
