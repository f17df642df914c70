"""What is installed, under which name, and what every message says about it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from maskgit.kernels.common.extras import DISTRIBUTION, pip_install

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
KINDS = ("*.py", "*.md", "*.toml", "*.txt", "Makefile")
FOLDERS = ("maskgit", "kernels", "benchmarks", "docs", "examples", ".ci")


def texts():
    files = [path for kind in KINDS for path in ROOT.glob(kind)]
    files += [path for f in FOLDERS for kind in KINDS for path in (ROOT / f).rglob(kind)]
    return {path.relative_to(ROOT): path.read_text() for path in files}


def test_the_distribution_has_a_name_of_its_own():
    assert PROJECT["name"] == DISTRIBUTION == "maskgit-kernels"
    assert set(PROJECT["scripts"]) == {"maskgit"}
    assert pip_install("torch", "cli") == "pip install 'maskgit-kernels[torch,cli]'"


def test_nothing_names_the_other_distribution_or_an_extra_that_is_not_there():
    found = texts()
    assert len(found) > 100
    for path, text in found.items():
        stranger = re.search(r"(?<![\w.-])maskgit\[[a-z]|pip install[^`\n]* maskgit(?![\w-])", text)
        assert stranger is None, f"{path}: {stranger}"
        named = [
            e
            for group in re.findall(r"maskgit-kernels\[([^\]\"'{]+)\]", text)
            for e in group.split(",")
        ]
        calls = re.findall(r"pip_install\(([^)]*)\)", text)
        named += [e for call in calls for e in re.findall(r"[\"']([\w-]+)[\"']", call)]
        assert set(named) <= EXTRAS, f"{path}: {set(named) - EXTRAS}"


def test_the_source_distribution_has_every_source_on_every_machine(tmp_path):
    pytest.importorskip("setuptools")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    (listed,) = tmp_path.glob("*/SOURCES.txt")
    names = set(listed.read_text().split())
    code = [p for f in ("maskgit", "kernels", "benchmarks") for p in (ROOT / f).rglob("*.py")]
    wanted = {str(path.relative_to(ROOT)) for path in [*code, *(ROOT / "csrc").iterdir()]}
    assert "csrc/decode_step_neon.cpp" in wanted
    assert wanted | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_a_build_needs_nothing_of_a_framework():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert [re.match(r"[\w-]+", line)[0] for line in build] == ["setuptools", "pybind11"]
    included = {
        line for path in (ROOT / "csrc").iterdir() for line in path.read_text().splitlines()
        if line.startswith('#include "')
    }  # fmt: skip
    own = {f'#include "{path.name}"' for path in (ROOT / "csrc").iterdir()}
    assert included <= own, included - own
