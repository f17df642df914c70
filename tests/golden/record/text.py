"""What the recorders of the text codebases share: a model that keeps its calls, and imports.

The codebases call a model as `model(tokens, ...).logits`; `Model` answers with the stub's logits
and keeps tokens and logits, so that the state before each step is known without touching the loop.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from common import Recorder, Stub


class Model:
    """The stub as a torch model of `dtype`; `calls` is a list of (tokens, logits as float32)."""

    device = torch.device("cpu")

    def __init__(self, stub: Stub, dtype: str = "float32"):
        self.stub, self.dtype = stub, getattr(torch, dtype)
        self.calls: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, x: Any = None, *_: Any, **named: Any) -> Any:
        x = named.get("input_ids", x)
        logits = torch.from_numpy(self.stub(x)).to(self.dtype)
        self.calls.append((x.numpy().copy(), logits.float().numpy().copy()))
        return SimpleNamespace(logits=logits)


def fake(*names: str) -> None:
    """Stand-ins for modules that sampling does not need, whatever is imported from them."""
    for name in names:
        sys.modules.setdefault(name, MagicMock(name=name))


def load(path: Path, name: str = "upstream") -> Any:
    """The Python file at `path` as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def extract(path: Path, *names: str, **scope: Any) -> SimpleNamespace:
    """Functions, or methods as "Class.method", of a file that can't be imported, run in `scope`."""
    tree = ast.parse(path.read_text())
    scope |= {"torch": torch, "np": np, "F": torch.nn.functional, "__name__": "upstream"}
    future = ast.parse("from __future__ import annotations").body
    for name in names:
        nodes = tree.body
        for part in name.split("."):
            node = next(n for n in nodes if getattr(n, "name", None) == part)
            nodes = getattr(node, "body", [])
        exec(compile(ast.Module([*future, node], []), str(path), "exec"), scope)
    return SimpleNamespace(**{n.split(".")[-1]: scope[n.split(".")[-1]] for n in names})


def branch(path: Path, name: str, pair: str) -> Any:
    """The branch of a method "Class.method" that unpacks `pair`: from its variables to them after it."""
    tree: Any = ast.parse(path.read_text())
    for part in name.split("."):
        tree = next(n for n in tree.body if getattr(n, "name", None) == part)
    body = next(
        n.body
        for n in ast.walk(tree)
        if isinstance(n, ast.If) and ast.unparse(n.body[0]).strip("(").startswith(pair)
    )
    code = compile(ast.Module(body, []), str(path), "exec")

    def run(**scope: Any) -> SimpleNamespace:
        exec(code, scope)
        return SimpleNamespace(**scope)

    return run


def prompts(stub_ids: int, mask: int, rows: int, length: int, seed: int, holes: int = 2) -> Any:
    """(rows, length) known tokens with some masks left in all rows but the first."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, stub_ids - 1, (rows, length))
    for b in range(1, rows):
        out[b, rng.choice(length, holes, replace=False)] = mask
    return torch.from_numpy(out)


def add(recorder: Recorder, before: np.ndarray, after: np.ndarray, **arrays: Any) -> None:
    """One step; noise is kept in float32, as it is replayed."""
    for name in ("token_gumbel", "choice_gumbel", "scores"):
        if arrays.get(name) is not None:
            arrays[name] = np.asarray(arrays[name], np.float32)
    recorder.step(tokens=before, expected=after, **arrays)
