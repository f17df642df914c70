"""The documents: every command and snippet runs, every table is its result file, every link leads."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
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
    code = "from maskgit.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, *QUICKER.get(words[0], [])],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for flag in ("--out", "--strip"):
        if flag in words:
            assert (tmp_path / words[words.index(flag) + 1]).stat().st_size > 100


def test_the_commands_were_found():
    assert len(commands()) >= 6
    assert "make demo\nmake test\n" in blocks("")


def test_snippets_run():
    torch = pytest.importorskip("torch")
    names = {
        "forward": lambda tokens: torch.randn(*tokens.shape, 1024),
        "tokens": torch.full((2, 16), 1024),
    }
    first, second = blocks("python")
    exec(first, names)
    assert (names["result"].tokens < 1024).all()
    names |= {
        "tokens": torch.full((2, 16), 126336),
        "logits": torch.randn(2, 16, 126464),
        "counts": torch.tensor([16, 16]),
    }
    exec(second, names)
    assert names["step"].next_tokens.shape == (2, 16)


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
    from maskgit import StepRule
    from maskgit.schedule import SCHEDULES

    semantics = (ROOT / "docs" / "semantics.md").read_text()
    for name in StepRule.presets():
        assert f"`{name}`" in semantics
        assert f"`{name}`" in README
    assert all(name in semantics for name in SCHEDULES)
    assert np.all(
        [field in semantics for field in ("cut", "count_rows", "block_scope", "greedy_on")]
    )
