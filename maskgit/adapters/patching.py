"""What every adapter shares: replacing attributes, undoing it, the report, reading arguments."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ..kernels.common.arrays import as_index, as_scalar
from .fingerprint import AdapterError, signature_of, with_their_defaults

MARK = "_maskgit_handle"
LOCK = threading.RLock()  # of marks and reports, which threads share


@dataclass
class Report:
    """What a patch did, and what has run through it since.

    adapter: name of the adapter.  codebase: what it follows, with the commit.  version: what was
    recognised in the target.  replaced: names of the replaced attributes.  calls: how often they
    have been called.  notes: what differs from the original, as sentences.
    """

    adapter: str
    codebase: str
    version: str
    replaced: tuple[str, ...] = ()
    calls: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Add a sentence once."""
        with LOCK:
            if sentence not in self.notes:
                self.notes.append(sentence)

    def count(self) -> int:
        """Count a call; its number, from 0."""
        with LOCK:
            self.calls += 1
            return self.calls - 1


class Handle:
    """A patch that is in place: `report` tells what it does, `undo()` takes it back."""

    def __init__(self, target: Any, report: Report):
        self.target = target
        self.report = report
        self._saved: list[tuple[Any, str, bool, Any]] = []
        self._active = True
        self.thread = threading.get_ident()
        with LOCK:
            check_unpatched(target)
            self._set(target, MARK, self)

    def replace(self, name: str, value: Any, owner: Any = None) -> None:
        """Set an attribute of the target (or of an object inside it), remembering what it was."""
        owner = self.target if owner is None else owner
        self._set(owner, name, value)
        self.report.replaced += (name,)

    def replace_method(
        self, name: str, function: Callable[..., Any], owner: Any = None, count: bool = True
    ) -> None:
        """The same for a method: `function` gets the object as its first argument, calls are counted.

        What a caller leaves out has the default that the method has, not that of `function`, and
        `function` gets all by name; keywords that the method does not have are its own.  Without
        `count` it gets what it is called with, and calls are not counted.
        Copies of the object are not patched: they have the method that it had before.
        """
        owner = self.target if owner is None else owner
        self.replace(name, _Method(self, owner, name, function, count), owner)

    @property
    def is_active(self) -> bool:
        """Whether the patch is still in place."""
        return self._active

    def undo(self) -> None:
        """Restore everything; AdapterError if that has been done.  Calls that run go on to their end."""
        with LOCK:
            if not self._active:
                raise AdapterError(f"target: {name_of(self.target)} is not patched any more")
            self._active = False
            for owner, name, own, value in reversed(self._saved):
                if own:
                    setattr(owner, name, value)
                else:
                    delattr(owner, name)
            self._saved.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of the target do not carry its patch."""
        return type(None), ()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        own = name in vars(owner)
        self._saved.append((owner, name, own, vars(owner).get(name)))
        if isinstance(owner, ModuleType) or not hasattr(owner, "_modules"):
            setattr(owner, name, value)
        else:  # torch.nn.Module.__setattr__ would register a module or parameter
            object.__setattr__(owner, name, value)


class _Method:
    """Stands in the place of a method; the original once the patch is undone."""

    def __init__(
        self, handle: Handle, owner: Any, name: str, function: Callable[..., Any], count: bool
    ):
        self._handle, self._owner, self._count = handle, owner, count
        self._original, self._is_own = getattr(owner, name), name in vars(owner)
        ours = functools.partial(function, owner)
        self._ours = with_their_defaults(self._original, ours) if count else ours
        self.__name__, self.__doc__ = name, function.__doc__
        self.__signature__ = signature_of(self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._handle.is_active:
            return self._original(*args, **kwargs)
        if self._count:
            self._handle.report.count()
        return self._ours(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy of the owner holds: its class's method, bound to itself, or its own function."""
        if self._is_own:
            return _itself, (self._original,)
        return getattr, (self._owner, self.__name__)


def _itself(value: Any) -> Any:
    return value


def is_patched(target: Any) -> bool:
    """Whether a patch of the target is in place; a copy of a patched object is not patched."""
    handle = getattr(target, "__dict__", {}).get(MARK)
    return handle is not None and handle.target is target


def check_unpatched(target: Any) -> None:
    """AdapterError where a patch of the target is in place."""
    if is_patched(target):
        raise AdapterError(
            f"target: {name_of(target)} is patched already, for all threads; undo that first, or put one "
            "block around them all"
        )


def as_count(name: str, value: Any) -> int:
    """An integer of any library as Python's; ValueError unless it is one of at least 1."""
    try:
        return as_index(name, value, 1)
    except TypeError as error:
        raise ValueError(str(error)) from None


def as_number(name: str, value: Any) -> float:
    """A real number of any library as Python's; ValueError unless it is one, and finite."""
    try:
        return float(as_scalar(name, value))
    except TypeError:
        raise ValueError(f"{name}: expected a finite number, got {value!r}") from None


def nucleus(top_p: Any) -> float | None:
    """A `top_p` of the codebases as the rules': none from 1 on; at 0 and below the surest token is left."""
    if top_p is None or top_p >= 1:
        return None
    return max(as_number("top_p", top_p), 1e-30)


def draw_seeds(batch: int, generator: Any, device: Any) -> Any:
    """(B,) 64-bit integers on the device, from a torch generator or torch's own."""
    import torch

    where = device if generator is None else generator.device
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator, device=where)
    return seeds.to(device)


def guided_by_tensor(start: Any, cond: Any, uncond: Any, weight: float) -> Any:
    """start + weight (cond - uncond) for a weight that is a float32 tensor (1,), and so in float32.

    In half precision the difference alone is rounded to the dtype of the logits.
    """
    return start.float() + weight * (cond - uncond).float()


def without_logits(logits: Any, unscored: Any) -> Any:
    """(B, N) bool: where among the unscored positions all logits are -inf or NaN; None if nowhere.

    Waits for the device, and reads the logits again only where something is unscored.
    """
    if not bool(unscored.any()):
        return None
    dead = unscored & ~(logits > -float("inf")).any(-1)
    return dead if bool(dead.any()) else None


def name_of(target: Any) -> str:
    """The target in a message."""
    if isinstance(target, ModuleType):
        return f"the module {target.__name__}"
    kind = target if isinstance(target, type) else type(target)
    return f"{'' if isinstance(target, type) else 'an object of '}{kind.__module__}.{kind.__name__}"
