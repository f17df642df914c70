"""The `maskgit` command, also as `python -m maskgit`.

Nothing but the standard library and NumPy is needed for `--version`, `env` and `presets`; for the rest,
one line says which extra has what is lacking.
"""

from __future__ import annotations

import os
import sys

from maskgit import __version__
from maskgit.kernels.common.extras import pip_install

# command -> the extra that has all it needs
EXTRAS = {
    "generate": "model", "edit": "model", "train": "model", "evaluate": "model", "audit": "cli",
    "bench": "bench", "profile": "profile",
}  # fmt: skip


def main() -> None:
    """Run the command in sys.argv; exits with 0, 1 (it failed) or 2 (it was called wrongly)."""
    code: int | str | None = 0
    try:
        if not _run_plainly(sys.argv[1:]):
            from maskgit.cli.main import app

            app(prog_name="maskgit")
    except ModuleNotFoundError as error:
        if os.environ.get("MASKGIT_TRACEBACK") == "1" or _is_ours(error.name):
            raise
        print(f"Error: {_lacking(sys.argv[1:], error)}", file=sys.stderr)
        code = 1
    except SystemExit as end:
        code = end.code
    except OSError as error:  # of printing: the commands catch their own
        code = _undelivered(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _undelivered(error)
    sys.exit(code)


def _undelivered(error: OSError) -> int:
    """One line about output that could not be written: a full disk; none where head has read enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        print(f"Error: the output could not be written: {error}", file=sys.stderr)
    return 1


def _run_plainly(words: list[str]) -> bool:
    """Whether it was a call that needs no command line library; if so, it has been run."""
    if words == ["--version"]:
        print(__version__)
    elif words[:1] in (["env"], ["presets"]) and set(words[1:]) <= {"--json"}:
        from maskgit.cli import environment, presets

        show = environment.show if words[0] == "env" else presets.show
        show(as_json="--json" in words)
    else:
        return False
    return True


def _is_ours(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] == "maskgit"


def _lacking(words: list[str], error: ModuleNotFoundError) -> str:
    command = next((word for word in words if not word.startswith("-")), "")
    what = f"maskgit {command}".strip()
    package = (error.name or "").partition(".")[0]
    needs = f"{what}: needs {package}" if package else f"{what}: {error}"
    return f"{needs}; {pip_install(EXTRAS.get(command, 'cli'))}"


if __name__ == "__main__":
    main()
