"""What a patch changes on an object for the length of a call, so that other threads do not meet it.

An object is shared: while one thread is in a pass, others run it as it is, patch it, copy it.  So a
replaced method asks who calls.  The first thread that comes sets a `_Switch` in its place and the last one
that goes takes it away; in between each thread has its own stack of replacements, and without one the
object's own method.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

_LOCK = threading.RLock()
_EVALUATED: dict[int, list[Any]] = {}  # by id, while in use: how many threads, and the mode before


class _Switch:
    """Stands in the place of a method: each thread's own replacement, the method for all others."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name, self._local = owner, name, threading.local()
        self._own: Any = vars(owner).get(name)  # None: the method is the class's
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():  # what is compiled stays, for all threads
            return self.original(*args, **kwargs)
        return (self.stack or [self.original])[-1](*args, **kwargs)

    @property
    def stack(self) -> list[Callable[..., Any]]:
        """The replacements of this thread, the innermost last."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        found: list[Callable[..., Any]] = self._local.stack
        return found

    @property
    def original(self) -> Callable[..., Any]:
        """What the owner does without replacements."""
        if self._own is not None:
            return self._own  # type: ignore[no-any-return]
        return getattr(type(self._owner), self._name).__get__(self._owner)  # type: ignore[no-any-return]

    def enter(self, function: Callable[..., Any]) -> None:
        """Replace the method for this thread."""
        self.users += 1
        self.stack.append(function)

    def leave(self) -> None:
        """Take the replacement back, and with the last one this object, unless something lies on it."""
        self.stack.pop()
        self.users -= 1
        if self.users == 0 and vars(self._owner).get(self._name) is self:
            if self._own is None:
                object.__delattr__(self._owner, self._name)
            else:
                object.__setattr__(self._owner, self._name, self._own)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy of the owner holds: the method, bound to the copy."""
        if self._own is not None:
            return _itself, (self._own,)
        return getattr, (self._owner, self._name)


def _itself(value: Any) -> Any:
    return value


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, and in this thread alone, the method of that name does this instead."""
    with _LOCK:
        switch = vars(owner).get(name)
        if not isinstance(switch, _Switch):
            switch = _Switch(owner, name)
            object.__setattr__(owner, name, switch)
        switch.enter(function)
    try:
        yield
    finally:
        with _LOCK:
            switch.leave()


def is_own(owner: Any, name: str) -> bool:
    """Whether the method is its class's, whatever threads replace it for themselves."""
    found = vars(owner).get(name)
    if found is None or (isinstance(found, _Switch) and found.original == _method(owner, name)):
        return True
    return bool(found == _method(owner, name))  # as copies have it that were made meanwhile


def _method(owner: Any, name: str) -> Any:
    return getattr(type(owner), name).__get__(owner)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside, the model is in eval mode; after the last thread it is in the mode before the first."""
    with _LOCK:
        entry = _EVALUATED.setdefault(id(model), [0, model.training])
        entry[0] += 1
        model.eval()
    try:
        yield
    finally:
        with _LOCK:
            entry[0] -= 1
            if not entry[0]:
                del _EVALUATED[id(model)]
                model.train(entry[1])
