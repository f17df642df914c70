"""Interleaved timing: every provider takes its turn in every round, so that drift hits them alike.

Works on the host clock.  On a device, pass `sync`: it is called before the clock is read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# A sample shorter than this is a mean over several calls: the clock and its call cost ~0.1 us.
_SHORTEST_SAMPLE_S = 200e-6


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the samples of one provider, in the order taken."""

    samples: tuple[float, ...]
    calls_per_sample: int

    @property
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        """The sample below which a `share` of them lies (nearest rank)."""
        ranked = sorted(self.samples)
        return ranked[min(int(share * len(ranked)), len(ranked) - 1)]


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    *,
    samples: int = 30,
    seconds_each: float = 5.0,
    warm_up: int = 2,
    sync: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Timing]:
    """Time each callable, round-robin.

    Args:
        calls: by name, a callable that is given a running number, by which it picks the one of
            its rotated inputs that was used longest ago.
        samples: the samples wanted of each, at least 1.
        seconds_each: a budget: a slow provider takes fewer samples, at least 5 (and no more than
            `samples`), spread evenly over the rounds.
        warm_up: calls of each that are not timed, at least 1.
        sync: waits for the device.
        progress: told the name of what is being warmed up, then of the round.
    """
    turn = dict.fromkeys(calls, 0)

    def once(name: str, count: int) -> float:
        call, first = calls[name], turn[name]
        turn[name] = first + count
        sync()
        began = time.perf_counter()
        for i in range(first, first + count):
            call(i)
        sync()
        return (time.perf_counter() - began) / count

    counts, wanted = {}, {}
    for name in calls:
        progress(f"warm-up {name}")
        cost = min(once(name, 1) for _ in range(max(warm_up, 1)))
        counts[name] = max(1, round(_SHORTEST_SAMPLE_S / max(cost, 1e-9)))
        affordable = int(seconds_each / max(cost * counts[name], 1e-9))
        wanted[name] = max(min(samples, 5), min(samples, affordable))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(samples):
        progress(f"round {i + 1} of {samples}")
        start = i % max(len(names), 1)  # nobody always follows the same neighbour's cache
        for name in names[start:] + names[:start]:
            if (i + 1) * wanted[name] // samples > len(taken[name]):
                taken[name].append(once(name, counts[name]))
    return {name: Timing(tuple(taken[name]), counts[name]) for name in names}
