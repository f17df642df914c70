"""The scripts in examples/ run as they are, on tiny random models."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# script -> (what it needs, its arguments, the files it writes)
SCRIPTS = {
    "maskgit_image": (("torch",), ["--steps", "2", "--out", "x.png"], ["x.png"]),
    "llada_like": (("torch", "transformers"), ["--new-tokens", "8", "--steps", "4"], []),
    "amused_pipeline": (("torch", "diffusers"), ["--steps", "2", "--out", "x.png"], ["x.png"]),
    "own_loop": (("torch",), ["--steps", "3"], []),
    "jax_loop": (("jax",), ["--steps", "2"], []),
}


def test_every_script_is_here_and_named_in_the_readme():
    found = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    assert found == sorted(SCRIPTS)
    readme = (ROOT / "README.md").read_text()
    assert all(f"examples/{name}.py" in readme for name in found)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name, monkeypatch, tmp_path, capsys):
    needs, arguments, files = SCRIPTS[name]
    for package in needs:
        pytest.importorskip(package)
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert out.strip()
    assert "[MASK]" not in out
    if name == "own_loop":
        assert "--" in out.splitlines()[0]
        assert "--" not in out.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
