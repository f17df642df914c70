"""Every table, at every width: no number is cut or broken, and all of them are there."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from maskgit.cli import audit as cli_audit
from maskgit.cli import environment
from maskgit.cli import profile as cli_profile
from maskgit.cli import train as cli_train
from maskgit.report import tables

ROOT = Path(__file__).parents[2]
WIDTHS = (40, 60, 80, 200)


def words(text):
    """Every run of characters without a space that has a digit in it: a number cut is another."""
    return Counter(word for word in text.split() if re.search(r"\d", word))


def evaluate(monkeypatch):
    report = {
        "classifier_test_accuracy": 0.97,
        "rows": [
            {"name": f"{t} steps", "accuracy": 0.98765, "cas": 1.0, "frechet": 12345.678,
             "precision": 0.5, "recall": 0.1234}
            for t in (1, 8, 256)
        ],
    }  # fmt: skip
    return lambda: cli_train._print_scores(report)


def bench(monkeypatch):
    from maskgit.benchmarks import cli

    stored = json.loads((ROOT / "benchmarks/results/xeon-2-threads/decode_step.json").read_text())
    refused = {
        "provider": "maskgit torch",
        "usual": False,
        "passed": False,
        "gate": "7 of 64 wrong",
    }
    stored["runs"][0]["results"].append(refused)
    return lambda: (
        [cli._print_entry(e) for e in stored["runs"]] and cli._print_stamp(stored["environment"])
    )


def shapes(monkeypatch):
    from maskgit.benchmarks import cli

    return lambda: cli._print_shapes(False)


def profile(monkeypatch):
    found = json.loads((ROOT / "benchmarks/results/compiler/sm_90.json").read_text())["kernels"]
    found = [k | {"for": f"{k['rule']} {k['shape']} {k['dtype']}"} for k in found]
    return lambda: cli_profile._print_table("from the compiler", cli_profile.COLUMNS, found)


def audit(monkeypatch):
    from maskgit import audit_ties

    logits = np.zeros((2, 300, 400), np.float32)
    report = audit_ties(logits, rule="llada", num_steps=7, step=0, dtype="bfloat16")
    assert not report.is_clean
    return lambda: cli_audit._print(report, 3)


def env(monkeypatch):
    from maskgit.report.environment import facts

    report = facts() | {"backends": {"pallas": {"available": False, "reason": "no " * 40}}}
    monkeypatch.setattr(environment, "collect", lambda: report)
    return lambda: environment.show(as_json=False)


@pytest.mark.parametrize("make", [evaluate, bench, shapes, profile, audit, env])
def test_no_number_is_cut(make, monkeypatch, capsys):
    show = make(monkeypatch)
    monkeypatch.setattr(tables, "width", lambda: None)
    show()
    whole = words(capsys.readouterr().out)
    assert len(whole) > 3
    for columns in WIDTHS:
        monkeypatch.setattr(tables, "width", lambda columns=columns: columns)
        show()
        printed = capsys.readouterr().out
        got = words(printed)
        assert not whole - got, (columns, whole - got)
        assert "\N{HORIZONTAL ELLIPSIS}" not in printed
        longest = max(map(len, re.split(r"\s", printed)))
        assert all(len(line) <= max(columns, longest) for line in printed.splitlines()), columns


def test_the_width_is_the_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "57")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert tables.width() == 57
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert tables.width() is None


def test_figures_stand_under_each_other():
    text = tables.table(("name", "ms"), [("a", "1.5"), ("bc", "12.5")], 80, title="t", note="n")
    assert text == "t\nname    ms\na      1.5\nbc    12.5\nn"
    assert tables.table(("id", "ms", "of"), [("a", "1.5", "x")], 8) == "id  a\nms  1.5\nof  x\n"


def test_nobody_makes_tables_of_their_own():
    for folder in ("maskgit", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "rich.table" not in path.read_text(), path
