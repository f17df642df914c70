"""What the steps of diffusers' schedulers share: their options, seeds, and the classes they belong to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from .common import draw_seeds
from .fingerprint import AdapterError, check_version

# `calls` counts the steps since `set_timesteps`, which number the random numbers of a run.
DEFAULTS: dict[str, Any] = {"seeds": None, "backend": "auto", "report": None, "calls": 0}

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


def check_code(base: Any, trusted: bool) -> str:
    """The first release with the code of a scheduler class; AdapterError if it is not known."""
    replaced, relied = _NAMES[base.__name__]
    known, what = {"0.39": _DIGESTS[base.__name__]}, f"diffusers' {base.__name__}"
    return check_version(base, replaced, known, relied=relied, what=what, trusted=trusted)
