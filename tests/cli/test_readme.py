"""The documents: every command and snippet runs, every table is its result file, every link leads."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a command of the README is given besides, so that it does not take minutes
QUICKER = {
    "bench": ["--samples", "2", "--seconds", "0.2", "--no-memory"],
    "evaluate": ["--per-class", "20"],
}


def blocks(language):
    """Fenced blocks whose opening fence names `language`."""
    pieces = re.split(
        r"^```(\w*)\n", README, flags=re.MULTILINE
    )  # text, tag, block, tag, text, ...
    return [pieces[i + 1] for i in range(1, len(pieces), 4) if pieces[i] == language]


def commands():
    lines = [line for block in blocks("") for line in block.splitlines()]
    inline = re.findall(r"`(maskgit [^`\n]+)`", README.replace("\n", " "))
    found = [line for line in (*lines, *inline) if line.startswith("maskgit ")]
    return sorted({line for line in found if not line.startswith("maskgit train")})


@pytest.mark.parametrize("command", commands())
def test_commands_run(command, tmp_path):
    pytest.importorskip("torch")
    words = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "maskgit", *words, *QUICKER.get(words[0], [])],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for flag in ("--out", "--strip"):
        if flag in words:
            assert (tmp_path / words[words.index(flag) + 1]).stat().st_size > 100


def test_the_commands_were_found():
    assert len(commands()) >= 6
    assert "make demo\nmake test\n" in blocks("")


def test_make_bench_collects_its_cases():
    """What `make bench` calls, up to running it."""
    pytest.importorskip("torch")
    pytest.importorskip("pytest_benchmark")
    recipe = re.search(
        r"^bench:.*\n\t\$\(BIN\)/python (.+)$", (ROOT / "Makefile").read_text(), re.M
    )
    done = subprocess.run(
        [sys.executable, *shlex.split(recipe[1]), "--collect-only", "-q"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    collected = int(re.search(r"(\d+) tests collected", done.stdout)[1])
    files = [path.name for path in (ROOT / "benchmarks").glob("bench_*.py")]
    assert collected >= 20
    assert files
    assert all(f"benchmarks/{name}::" in done.stdout for name in files)


def test_all_adapters_are_named():
    from maskgit.adapters import supported

    listed = (ROOT / "docs" / "adapters.md").read_text()
    for name in supported():
        assert f"`{name}`" in README
        assert f"## {name}\n" in listed


def test_tables_are_their_result_files():
    from maskgit.benchmarks import report

    for path in (ROOT / name for name in report.DOCUMENTS):
        assert "<!-- table:" in path.read_text()
        assert report.render(path.read_text()) == path.read_text(), f"{path.name} is out of date"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_every_preset_and_schedule_is_documented():
    from maskgit.kernels.decode_step.rule.schedules import SCHEDULES

    from maskgit import StepRule

    semantics = (ROOT / "docs" / "semantics.md").read_text()
    table = semantics.split("\n## Presets\n")[1]
    rows = re.findall(r"^\| `([\w-]+)` \|", table, flags=re.MULTILINE)
    for name in StepRule.presets():
        assert name in rows
    assert f"{len(StepRule.presets())} presets\n([table](docs/semantics.md#presets))" in README
    assert f"{len(StepRule.presets())} presets." in semantics
    assert all(name in semantics for name in SCHEDULES)
    for field in dataclasses.fields(StepRule):
        assert field.name in semantics


def test_every_recorded_run_is_in_the_row_of_its_preset():
    semantics = (ROOT / "docs" / "semantics.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (.*) \|$", semantics, flags=re.MULTILINE))
    rules = json.loads((ROOT / "tests" / "golden" / "rules.json").read_text())
    for name, rule in rules.items():
        if rule == {"layout": "uniform"}:  # no rule of masked positions
            continue
        run, preset = (name, rule) if isinstance(rule, str) else (f"*{name}*", rule["preset"])
        assert run in rows[preset].split(", "), f"{run} is not in the row of {preset}"
