"""The message for a name that is none of the legal ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, legal: Iterable[str], got: object) -> str:
    """ "what: expected a, b, c, got 'd'", and the legal name that was probably meant, if there is one."""
    names = list(legal)
    return f"{what}: expected {', '.join(names)}, got {got!r}{did_you_mean(names, got)}"


def did_you_mean(legal: Iterable[str], got: object) -> str:
    """ " (did you mean 'x'?)" for the nearest legal name, or nothing."""
    if not isinstance(got, str):
        return ""
    folded = {name.casefold(): name for name in legal}
    near = difflib.get_close_matches(got.casefold(), folded, n=1, cutoff=0.6)
    return f" (did you mean {folded[near[0]]!r}?)" if near else ""
