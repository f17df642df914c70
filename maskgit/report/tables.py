"""Tables on a terminal: whole where they fit, else one figure a line, so that no number is ever cut."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

GAP = "  "


def width() -> int | None:
    """Columns of the terminal; None where the output goes to a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def say(text: str) -> None:
    """Print a sentence, wrapped for this terminal between words."""
    print("\n".join(_wrap(text, width())))


def show(
    headings: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", note: str = ""
) -> None:
    """Print `table` for this terminal on stdout."""
    print(table(headings, rows, width(), title, note))


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    limit: int | None,
    title: str = "",
    note: str = "",
) -> str:
    """Rows under their headings, or, where that is wider than `limit`, each row as `pairs`.

    Columns of figures (cells that begin with a digit or a sign, or are "-") are aligned to the right.
    """
    rows = [[*row, *[""] * (len(headings) - len(row))] for row in rows]
    columns = list(zip(headings, *rows, strict=True))
    sizes = [max(map(len, column)) for column in columns]
    lines = _wrap(title, limit) if title else []
    if limit is None or sum(sizes) + len(GAP) * (len(sizes) - 1) <= limit:
        right = [bool(rows) and all(map(_is_figure, column[1:])) for column in columns]
        for row in (headings, *rows):
            cells = zip(row, sizes, right, strict=True)
            lines.append(GAP.join(c.rjust(n) if r else c.ljust(n) for c, n, r in cells).rstrip())
    else:
        for row in rows:
            lines += [*pairs([(h, c) for h, c in zip(headings, row, strict=True) if c], limit), ""]
    return "\n".join(lines + (_wrap(note, limit) if note else []))


def pairs(facts: Sequence[tuple[str, str]], limit: int | None) -> list[str]:
    """A line for each (name, text); long texts go on under themselves, words and numbers whole."""
    indent = max((len(name) for name, _ in facts), default=0) + len(GAP)
    lines: list[str] = []
    for name, text in facts:
        room = None if limit is None else limit - indent
        longest = max(map(len, text.split()), default=0)
        if room is not None and longest > room:  # under its name, from the left edge
            lines += [name, *_wrap(text, limit)]
            continue
        first, *others = _wrap(text, room) or [""]
        lines += [f"{name:{indent}}{first}".rstrip(), *(" " * indent + line for line in others)]
    return lines


def _is_figure(cell: str) -> bool:
    return not cell or cell == "-" or cell[0].isdigit() or (cell[0] in "+-" and cell[1:2].isdigit())


def _wrap(text: str, limit: int | None) -> list[str]:
    if limit is None:
        return [text]
    return textwrap.wrap(text, max(limit, 1), break_long_words=False, break_on_hyphens=False)
