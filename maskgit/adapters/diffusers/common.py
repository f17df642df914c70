"""What the steps of diffusers' schedulers share: their options, seeds, and the classes they belong to."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from ..fingerprint import AdapterError, check_version
from ..patching import draw_seeds

DEFAULTS: dict[str, Any] = {"seeds": None, "backend": "auto", "report": None}


class _Local(threading.local):
    """What belongs to one thread's run, where threads share a scheduler.

    calls: per scheduler, the steps since `set_timesteps`, which number the random numbers of a run.
    given: the options of the call that is under way.
    """

    def __init__(self) -> None:
        self.calls: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.given: dict[str, Any] = {}


_LOCAL = _Local()

_UNIFORM = {"set_timesteps": "7bf4c29b34094d57", "_sample_from_logits": "f8fc9ea58841aa4c"}
_DIGESTS = {  # of the releases 0.39 to 0.42.1
    "AmusedScheduler": {
        "step": "a811b32592aad093",
        "set_timesteps": "1af5bdf0d51e1579",
        "mask_by_random_topk": "052458788f89aa9c",
        "gumbel_noise": "c87ac51f1bcd55f3",
    },
    "BlockRefinementScheduler": {
        "step": "6620f7bc2c3c0fb6",
        "set_timesteps": "8d86a638967d3ac0",
        "_sample_from_logits": "8ffbc0dfbf1d589f",
        "check_eos_finished": "db93e11818388236",
        "get_num_transfer_tokens": "6c228042d33c2c5d",
        "_top_p_filtering": "7a1edcf394323bd8",
        "_top_k_filtering": "588887da490c9875",
    },
    "EntropyBoundScheduler": {"step": "9db2bce08f34c52d"} | _UNIFORM,
    "DiscreteDDIMScheduler": {"step": "3cffe22957201b6a"} | _UNIFORM,
}
_BLOCK = ("get_num_transfer_tokens", "_top_p_filtering", "_top_k_filtering")
# What is replaced, and what is relied on.
_NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "AmusedScheduler": (("step", "set_timesteps"), ()),
    "BlockRefinementScheduler": (
        ("step", "set_timesteps", "_sample_from_logits", "check_eos_finished"),
        _BLOCK,
    ),
    "EntropyBoundScheduler": (("step", "set_timesteps"), ("_sample_from_logits",)),
    "DiscreteDDIMScheduler": (("step", "set_timesteps"), ("_sample_from_logits",)),
}


def stock_class(kind: Any) -> Any:
    """The class of diffusers' that a class is or derives from."""
    return next(k for k in kind.__mro__ if k.__module__.startswith("diffusers."))


def output_class(kind: Any) -> Any:
    """The output class that stands beside a scheduler class in diffusers."""
    base = stock_class(kind)
    output = getattr(sys.modules[base.__module__], f"{base.__name__}Output", None)
    if output is None:
        raise AdapterError(
            f"target: an unknown version of {base.__name__}, without its output class"
        )
    return output


def starting_again(stock: Callable[..., None]) -> Callable[..., None]:
    """A `set_timesteps` after which the random numbers of a run start again."""

    @functools.wraps(stock)  # pipelines look at its parameters
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        _LOCAL.calls[self] = 0

    return set_timesteps


@contextlib.contextmanager
def giving(**options: Any) -> Iterator[None]:
    """Inside, and in this thread, these options come before those of `install`."""
    before, _LOCAL.given = _LOCAL.given, options
    try:
        yield
    finally:
        _LOCAL.given = before


def options_of(self: Any) -> dict[str, Any]:
    """The options of a call: its own, and those of `install`."""
    options: dict[str, Any] = self.maskgit_options
    return options | _LOCAL.given


def seeds_of(self: Any, seeds: Any, batch: int, generator: Any, device: Any) -> Any:
    """(B,) seeds: the caller's, those of `install`, or drawn from the generator."""
    seeds = options_of(self)["seeds"] if seeds is None else seeds
    return draw_seeds(batch, generator, device) if seeds is None else seeds


def backend_of(self: Any, backend: str | None) -> str:
    """Count a step in the report; the backend to run it on."""
    report = self.maskgit_options["report"]
    if report is not None:
        report.count()
    return str(self.maskgit_options["backend"] if backend is None else backend)


def next_call(self: Any) -> int:
    """The number of this step since this thread's `set_timesteps`."""
    number = _LOCAL.calls.get(self, 0)
    _LOCAL.calls[self] = number + 1
    return number


def check_code(base: Any, trusted: bool) -> str:
    """The first release with the code of a scheduler class; AdapterError if it is not known."""
    replaced, relied = _NAMES[base.__name__]
    known, what = {"0.39": _DIGESTS[base.__name__]}, f"diffusers' {base.__name__}"
    return check_version(base, replaced, known, relied=relied, what=what, trusted=trusted)
