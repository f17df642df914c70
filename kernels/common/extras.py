"""What to install: the name of the distribution and its extras (pyproject.toml), for messages."""

from __future__ import annotations

DISTRIBUTION = "maskgit-kernels"  # the import and the command are `maskgit`


def pip_install(*extras: str) -> str:
    """The command that installs the extras, also into an environment that has the package already."""
    return f"pip install '{DISTRIBUTION}[{','.join(extras)}]'"
