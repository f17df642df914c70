"""Shared fixtures: which backends run here, as arrays of which kind, and poisoned memory."""

import importlib.util
import os

import numpy as np
import pytest


def _interpret_triton():
    """Where there is no GPU Triton's kernels run in its interpreter, which its import must know."""
    if importlib.util.find_spec("torch") and importlib.util.find_spec("triton"):
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")


_interpret_triton()
# so that tests of a mesh of chips find one: must be there before jax is first used
_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

from maskgit.kernels.common.backends import is_interpreting  # noqa: E402

import maskgit  # noqa: E402

BACKENDS = [name for name, reason in maskgit.available_backends().items() if reason is None]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the slow tests")


def pytest_collection_modifyitems(config, items):
    """Without --all (make test-all) the slow tests are left out; a skip is a test that cannot run here."""
    if config.getoption("--all"):
        return
    slow = [item for item in items if "slow" in item.keywords or _is_interpreted(item)]
    config.hook.pytest_deselected(items=slow)
    left_out = {id(item) for item in slow}
    items[:] = [item for item in items if id(item) not in left_out]


def _is_interpreted(item):
    """Whether a test of all backends is at Triton's, in its interpreter: seconds for each step.

    What of these always runs is in files of their own, test_triton.py and test_attention.py.
    """
    given = getattr(item, "callspec", None)
    is_all = item.path.name not in ("test_triton.py", "test_attention.py")
    named = [v for v in given.params.values() if isinstance(v, str)] if given is not None else []
    return is_all and "triton" in named and is_interpreting()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("MASKGIT_BACKEND", "MASKGIT_CHECK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """np.empty gives NaN or the most negative integer, so that a missed store shows."""
    empty = np.empty

    def poisoned(*args, **kwargs):
        array = empty(*args, **kwargs)
        if array.dtype.kind == "f":
            array.fill(np.nan)
        elif array.dtype.kind == "i":
            array.fill(np.iinfo(array.dtype).min)
        return array

    monkeypatch.setattr(np, "empty", poisoned)


@pytest.fixture(autouse=True)
def _few_compiled_programs(request):
    """XLA's programs stay mapped in memory; thousands of them exhaust the kernel's limit of maps."""
    yield
    if "jax" in request.node.nodeid or "pallas" in request.node.nodeid:
        global _since_cleared
        _since_cleared += 10 if "pallas" in request.node.nodeid else 1
        if _since_cleared >= 40:
            import jax

            jax.clear_caches()
            _since_cleared = 0


_since_cleared = 0


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param
