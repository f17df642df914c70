"""What the steps of diffusers' schedulers share: their options, seeds, and the classes they belong to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from .common import AdapterError, draw_seeds

# `calls` counts the steps since `set_timesteps`, which number the random numbers of a run.
DEFAULTS: dict[str, Any] = {"seeds": None, "backend": "auto", "report": None, "calls": 0}


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
        self.maskgit_options = self.maskgit_options | {"calls": 0}

    return set_timesteps


def seeds_of(self: Any, seeds: Any, batch: int, generator: Any, device: Any) -> Any:
    """(B,) seeds: the caller's, those of `install`, or drawn from the generator."""
    seeds = self.maskgit_options["seeds"] if seeds is None else seeds
    return draw_seeds(batch, generator, device) if seeds is None else seeds


def backend_of(self: Any, backend: str | None) -> str:
    """Count a step in the report; the backend to run it on."""
    report = self.maskgit_options["report"]
    if report is not None:
        report.calls += 1
    return str(self.maskgit_options["backend"] if backend is None else backend)


def next_call(self: Any) -> int:
    """The number of this step since `set_timesteps`."""
    number = int(self.maskgit_options["calls"])
    self.maskgit_options = self.maskgit_options | {"calls": number + 1}
    return number
