"""What holds for every adapter."""

import subprocess
import sys
import types

import pytest

from maskgit import adapters


@pytest.mark.parametrize("backend", ["cuda9", None, 3])
@pytest.mark.parametrize("adapter", adapters.supported())
def test_a_backend_that_there_is_not_is_refused_by_every_adapter(adapter, backend):
    """Also for an object that is no target of its: names come first."""
    target = types.SimpleNamespace()
    with pytest.raises(ValueError, match="backend: expected auto, "):
        adapters.patch(target, adapter, backend=backend)
    assert not vars(target)


def test_a_backend_is_checked_without_starting_a_framework():
    code = (
        "import sys, types; from maskgit import adapters\n"
        "for backend in ('auto', 'torch', 'cuda9'):\n"
        "    try: adapters.patch(types.SimpleNamespace(), 'titok', backend=backend)\n"
        "    except (ValueError, RuntimeError): pass\n"
        "print(sorted({'torch', 'jax', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"
