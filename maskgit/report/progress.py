"""Progress on stderr: a bar on a terminal, else a line at once and then one a minute."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Any

SECONDS = 60.0  # between lines where there is no terminal


class Progress:
    """Counts to `total` (None: only tells what is being done); with `show` false it says nothing.

    A terminal gets tqdm's bar, or one line that is overwritten.  Elsewhere there are lines: the first at
    once, then one a minute, and where things are counted the last at the end.
    """

    def __init__(
        self, what: str, total: int | None = None, *, initial: int = 0, show: bool = True
    ) -> None:
        self._what, self._total, self._show = what, total, show
        self._first = self._count = initial
        self._note = ""
        self._began = self._due = time.monotonic()
        self._said = -1  # the count of the last line
        self._is_live = show and sys.stderr.isatty()
        self._bar: Any = None
        if self._is_live and total is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, desc=what, mininterval=0.5)
        elif show:
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._is_live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        elif self._show and kind is None and self._total is not None and self._said != self._count:
            self._line()

    def update(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` says what is being done now, or how it goes."""
        self._count += count
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._show and (self._is_live or time.monotonic() >= self._due):
            self._line()

    def tell(self, note: str) -> None:
        """What is being done now."""
        self.update(0, note)

    def _line(self) -> None:
        parts = [self._note] if self._note else []
        if self._total is not None:
            seconds = max(time.monotonic() - self._began, 1e-9)
            rate = (
                f" ({(self._count - self._first) / seconds:.3g}/s)"
                if self._count > self._first
                else ""
            )
            parts.insert(0, f"{self._count} of {self._total}{rate}")
        text = f"{self._what}: {', '.join(parts) or 'started'}"
        if self._is_live:
            room = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:room]}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
        self._due, self._said = time.monotonic() + SECONDS, self._count
