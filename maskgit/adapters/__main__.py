"""The digests of functions in a Python file, by which an adapter knows a version of a codebase.

    python -m maskgit.adapters generate.py generate --helpers add_gumbel_noise get_num_transfer_tokens

The file is read, not imported.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

from .fingerprint import code_of


def _definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """The functions of a file by name, methods as Class.method."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{prefix}{node.name}", node


def main(arguments: list[str] | None = None) -> None:
    """Print the digests of functions in a file, one a line."""
    parser = argparse.ArgumentParser("python -m maskgit.adapters", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", type=Path, help="a Python file")
    parser.add_argument("replaced", nargs="*", help="functions and Class.methods that are replaced")
    parser.add_argument("--helpers", nargs="*", default=[], help="functions that are relied on")
    parser.add_argument("--ids", action="store_true", help="token ids are read from the first one")
    given = parser.parse_args(arguments)
    try:
        tree = ast.parse(given.path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        parser.error(f"path: expected a Python file, got {given.path} ({error})")
    functions = dict(_definitions(tree))
    for place, name in enumerate((*given.replaced, *given.helpers)):
        if name not in functions:
            parser.error(f"replaced: expected one of {', '.join(functions)}, got {name}")
        defaults, ids = name in given.helpers, given.ids and place == 0
        code = code_of(functions[name], defaults=defaults, ids=ids)
        print(f"{name} {code.digest}" + (f" ids {', '.join(map(str, code.ids))}" if ids else ""))


if __name__ == "__main__":
    main()
