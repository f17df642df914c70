"""Every Python snippet of the documents runs as printed, one after the other in one namespace.

What a snippet takes as given (a model, tokens, another codebase) is declared here, by a line of it.
"""

import contextlib
import inspect
import re
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

TORCH_MODEL = """
import torch
class Model(torch.nn.Module):  # with parameters, and in the mode it comes in
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(1025, 1024)
    def forward(self, tokens):
        return self.table(tokens)
forward, tokens = Model(), torch.full((2, 16), 1024)
"""
LLADA = "import torch, maskgit; tokens = torch.full((2, 16), 126336)"
JAX = """
import jax, maskgit, numpy as np
import jax.numpy as jnp
tokens = jnp.full((4, 8), 1024)
seeds = jnp.zeros((4, 2), jnp.uint32)
logits = jax.random.normal(jax.random.key(0), (4, 8, 1024))
forward = lambda tokens: logits
"""
BACKEND = """
from typing import Any
from maskgit.kernels.decode_step.rule.plan import StepPlan
from maskgit.kernels.decode_step.inputs import StepInputs
"""
# (document, a line of the snippet) -> what it is given
GIVEN = {
    ("README.md", "forward,"): TORCH_MODEL,
    ("README.md", "num_masked_at_start=counts,"): LLADA
    + "; logits = torch.randn(2, 16, 126464); counts = torch.tensor([16, 16])",
    ("README.md", "hidden, head.weight,"): LLADA
    + "; hidden, head = torch.randn(2, 16, 8), torch.nn.Linear(8, 126464)",
    ("layouts.md", "rng = np.random.default_rng(0)"): (
        "import numpy as np, maskgit; from maskgit import layouts"
    ),
    ("tpu.md", "mesh = jax.sharding.Mesh("): JAX,
    ("adding_a_backend.md", "def decode_step("): BACKEND,
}
SLOW = ("tpu.md",)  # compiles whole loops


def snippets(path):
    """(heading above it, code) of every fenced block of Python."""
    heading = ""
    for piece in re.split(r"^(## [^\n]*|```python\n.*?^```)$", path.read_text(), flags=re.M | re.S):
        if piece.startswith("## "):
            heading = piece[3:].strip()
        elif piece.startswith("```python"):
            yield heading, piece.removeprefix("```python\n").removesuffix("```")


def stand_ins(monkeypatch):
    """Modules of the codebases that the adapters patch: any attribute, any call."""
    for name in ("generate", "modeling", "modeling.modules", "maskgit.libml"):
        module = MagicMock(name=name)
        module.generate_with_dual_cache.return_value = ("out", 8)
        module.sampling.sample.return_value = ("images", 64)
        monkeypatch.setitem(sys.modules, name, module)


def stub_of(heading):
    """A fast_sampler that checks its options against the adapter that the section is about."""

    @contextlib.contextmanager
    def fast_sampler(target, adapter=None, **options):
        from maskgit.adapters.registry import module_of

        module = module_of(adapter or heading or "llada")
        inspect.signature(module.install).bind(target, **options)
        yield types.SimpleNamespace(report="llada")

    return fast_sampler


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow) if p.name in SLOW else p
     for p in DOCUMENTS if any(snippets(p))],
    ids=lambda p: p.name,
)  # fmt: skip
def test_snippets_run(path, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    import maskgit.adapters

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(maskgit, "__path__", list(maskgit.__path__))
    stand_ins(monkeypatch)
    names = {"maskgit": maskgit} if path.name == "adapters.md" else {}
    used = set()
    for heading, code in snippets(path):
        for (document, line), setup in GIVEN.items():
            if document == path.name and line in code:
                exec(setup, names)
                used.add((document, line))
        if "fast_sampler" in code:
            section = heading if path.name == "adapters.md" else "llada"
            monkeypatch.setattr(maskgit.adapters, "fast_sampler", stub_of(section))
            for name in _unknown(code, names):
                names[name] = MagicMock(name=name)
        exec(compile(code, f"{path.name}: {heading}", "exec"), names)
    assert used == {key for key in GIVEN if key[0] == path.name}, "a declaration that nothing uses"


def _unknown(code, names):
    """Names that a snippet reads and nobody has bound: those of the other codebase."""
    tree = compile(code, "", "exec")
    bound = set(re.findall(r"^\s*(?:import|from \S+ import) (\w+)", code, re.M)) | set(names)
    bound |= set(re.findall(r"^\s*(\w+)(?:, \w+)* =", code, re.M)) | set(dir(__builtins__))
    return [name for name in tree.co_names if name not in bound and f".{name}" not in code]


def test_the_first_snippet_gives_tokens_without_gradients():
    """As README prints it, with a model that has parameters: results are ordinary tensors."""
    torch = pytest.importorskip("torch")
    names = {}
    exec(TORCH_MODEL, names)
    code = next(code for _, code in snippets(ROOT / "README.md") if "forward," in code)
    exec(code, names)
    tokens = names["result"].tokens
    assert (tokens < 1024).all()
    assert not tokens.is_inference()
    assert torch.is_grad_enabled()
    torch.nn.Embedding(1024, 2)(tokens).sum().backward()
