"""The command in installs that lack something: it works, or one line names the extra to install."""

import json
import subprocess
import sys

import pytest

from maskgit.__main__ import EXTRAS
from maskgit.cli.main import app

COMMAND_LINE = {"typer", "click", "rich", "tqdm"}
MODEL = {"torch", "PIL", "scipy", "sklearn", "safetensors"}
OTHERS = {"jax", "jaxlib", "libtpu", "triton", "matplotlib", "pytest", "pytest_benchmark"}
# what is not there, and which of the calls below work all the same
INSTALLS = {
    "numpy": (COMMAND_LINE | MODEL | OTHERS, ()),
    "torch": (COMMAND_LINE | MODEL - {"torch"} | OTHERS, ()),
    "cli": (MODEL | OTHERS, ("audit",)),
    "cli and torch": (MODEL - {"torch"} | OTHERS, ("audit", "bench")),
}
CALLS = {
    "generate": ["--per-class", "1", "--out", "x.png"],
    "edit": ["test:0", "--inpaint", "0,0,4,4", "--out", "x.png"],
    "train": ["digits", "--steps", "1", "--tokenizer-steps", "1", "--out", "w.safetensors"],
    "evaluate": ["--per-class", "2", "--steps", "1"],
    "audit": ["--logits", "logits.npy", "--rule", "llada"],
    "bench": [
        "decode-step",
        "--shape",
        "2x8",
        "--samples",
        "1",
        "--seconds",
        "0.01",
        "--no-memory",
    ],
    "profile": [],
}
# Runs every call in a process of its own that refuses to import what is not there.
DRIVER = """
import contextlib, io, json, os, sys
blocked, calls = json.loads(sys.argv[1])
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import numpy as np
np.save("logits.npy", np.zeros((1, 2, 5), np.float32))
from maskgit.__main__ import main
done = []
for call in calls:
    sys.argv = ["maskgit", *call]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):  # as the interpreter does at its end
                print(code, file=err)
                code = 1
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


def test_every_command_is_called():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    names |= {group.name for group in app.registered_groups}
    assert set(CALLS) == set(EXTRAS) == names - {"env", "presets"}


@pytest.mark.parametrize("install", INSTALLS)
def test_commands_work_or_name_their_extra(install, tmp_path):
    blocked, working = INSTALLS[install]
    plain = [["--version"], ["env"], ["env", "--json"], ["presets"], ["presets", "--json"]]
    calls = plain + [[name, *rest] for name, rest in CALLS.items()] + [[], ["--help"]]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([sorted(blocked), calls])],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for call, (code, out, err) in zip(calls, json.loads(done.stdout), strict=True):
        name = call[0] if call else ""
        if call in plain or name in working:
            assert code == 0, (call, err)
            assert out
        elif name in EXTRAS or "typer" in blocked:
            assert code == 1, (call, out, err)
            assert err.count("\n") == 1, err
            assert err.startswith("Error: ")
            assert f"pip install 'maskgit-kernels[{EXTRAS.get(name, 'cli')}]'" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logits.npy"]
