"""What importing costs: NumPy alone, in a fresh process that has nothing else."""

import subprocess
import sys

import pytest

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Block())
"""


def run(code, blocked=("torch", "jax", "jaxlib", "triton", "scipy", "sklearn", "PIL", "typer")):
    text = BLOCKED.format(blocked=set(blocked)) + code
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)


def test_import_and_use_with_numpy_alone():
    done = run("""
import numpy as np, maskgit
logits = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
tokens = np.full((2, 5), 7)
result = maskgit.generate(lambda t: logits, tokens, rule="maskgit", mask_token_id=7, num_steps=3,
                          seeds=[1, 2], backend="reference")
assert ((0 <= result.tokens) & (result.tokens < 7)).all()
assert "not installed" in maskgit.available_backends()["torch"]
assert not {"torch", "jax", "triton"} & set(sys.modules)
print("ok")
""")
    assert done.stdout == "ok\n", done.stderr


def test_numpy_arrays_do_not_import_torch_or_jax():
    done = run(
        """
import numpy as np, maskgit
maskgit.sample_tokens(np.zeros((1, 2, 5), np.float32), rule="llada")
assert not {"torch", "jax", "triton"} & set(sys.modules)
print("ok")
""",
        blocked=(),
    )
    assert done.stdout == "ok\n", done.stderr


def test_without_the_extension_auto_falls_back_and_says_so():
    done = run(
        """
sys.modules["maskgit._C"] = None
import numpy as np, maskgit, warnings
logits = np.zeros((1, 2, 5), np.float32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        maskgit.sample_tokens(logits, rule="llada")
    maskgit.sample_tokens(logits, rule="llada", backend="reference")
print(len(caught), caught[0].category.__name__, caught[0].message)
from maskgit.report.environment import collect
print(collect()["backends"]["cpp"]["reason"])
try:
    maskgit.sample_tokens(np.zeros((1, 2, 5), np.float32), rule="llada", backend="cpp")
except ValueError as error:
    print(error)
"""
    )
    warned, first, second = done.stdout.splitlines()
    assert warned.startswith(
        "1 RuntimeWarning backend: 'auto' takes 'reference' for numpy arrays, "
    )
    assert "was not built" in warned
    assert "was not built" in first
    assert second.startswith("backend: 'cpp' cannot run")


@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
def test_without_the_extension_frameworks_fall_back_with_a_word_too(library):
    pytest.importorskip(library.partition(".")[0])
    done = run(
        f"""
sys.modules["maskgit._C"] = None
import warnings, maskgit, {library} as xp
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        maskgit.sample_tokens(xp.zeros((1, 2, 5)), rule="llada")
print([str(c.message) for c in caught if c.category is RuntimeWarning])
""",
        blocked=(),
    )
    said = f"[\"backend: 'auto' takes '{library.partition('.')[0]}' for "
    assert done.stdout.startswith(said), done.stdout + done.stderr
    assert done.stdout.count("'auto'") == 1


def test_every_folder_with_code_is_a_package():
    from pathlib import Path

    root = Path(__file__).parents[2]
    folders = {
        p.parent for f in ("maskgit", "kernels", "benchmarks") for p in (root / f).rglob("*.py")
    }
    assert len(folders) > 5
    assert all((folder / "__init__.py").exists() for folder in folders)
