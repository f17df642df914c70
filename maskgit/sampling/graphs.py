"""`generate(cuda_graph=True)`: the whole loop as one CUDA graph, kept for as long as its `forward`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from ..kernels.common.arrays import as_index, kind_of
from .result import GenerateResult

_WARM_UPS = 2  # the first compiles kernels and copies tables, the second fills the allocator's pool


class _Captured(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    graph: Any
    tokens: Any
    seeds: Any
    result: Any
    held: Any  # the arrays of the call, so that their memory and their ids stay theirs


_graphs: weakref.WeakKeyDictionary[Any, dict[Any, _Captured]] = weakref.WeakKeyDictionary()


def replayed(
    generate: Callable[..., GenerateResult], forward: Callable[[Any], Any], tokens: Any, seeds: Any,
    **options: Any,
) -> GenerateResult:  # fmt: skip
    """`generate(forward, tokens, seeds=seeds, **options)` from a graph that is captured once."""
    _check(tokens, options)
    options["prompt_length"] = one_length(options["prompt_length"])
    if seeds is not None:
        from ..kernels.decode_step.api import seeds_like

        seeds = seeds_like(seeds, tokens)
    known = _graphs.setdefault(getattr(forward, "__self__", forward), {})
    key = (
        getattr(forward, "__name__", ""), _form(tokens), _form(seeds),
        tuple((name, _signature(value)) for name, value in options.items()),
    )  # fmt: skip
    if key not in known:
        known[key] = _capture(generate, forward, tokens, seeds, options)
    captured = known[key]
    captured.tokens.copy_(tokens)
    if seeds is not None:
        captured.seeds.copy_(seeds)
    captured.graph.replay()
    result: GenerateResult = captured.result
    return result._replace(tokens=result.tokens.clone())


def _capture(
    generate: Callable[..., GenerateResult], forward: Any, tokens: Any, seeds: Any,
    options: dict[str, Any],
) -> _Captured:  # fmt: skip
    import torch

    own_tokens, own_seeds = tokens.clone(), None if seeds is None else seeds.clone()

    def run() -> Any:
        return generate(forward, own_tokens, seeds=own_seeds, **options)

    with torch.no_grad(), torch.cuda.device(tokens.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
    return _Captured(graph, own_tokens, own_seeds, result, options)


def _form(array: Any) -> Any:
    """What of an array that is copied in a graph depends on."""
    return None if array is None else (tuple(array.shape), str(array.dtype), str(array.device))


def _signature(value: Any) -> Any:
    """What of an option a graph depends on: its value, or which array it is."""
    if kind_of(value) is not None:
        return id(value), _form(value) if kind_of(value) == "torch" else tuple(value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(_signature(one) for one in value)
    return value


def _check(tokens: Any, options: dict[str, Any]) -> None:
    """ValueError for what a graph cannot hold."""
    if kind_of(tokens) != "torch" or tokens.device.type != "cuda":
        place = f"{kind_of(tokens)} on {getattr(tokens, 'device', 'the host')}"
        raise ValueError(f"cuda_graph: expected torch tokens on a CUDA device, got {place}")
    for name, why in (
        ("noise", "it is called once per step"),
        ("record", "its arrays would be overwritten"),
        ("progress", "a replay has no steps to show"),
    ):
        if options[name]:
            raise ValueError(f"{name}: expected none with cuda_graph=True, since {why}")
    if callable(options["scores"]):
        raise ValueError("scores: expected an array with cuda_graph=True, got a callable")


def one_length(given: Any) -> int:
    """A prompt's length of any library's integer as Python's; ValueError for one for each row."""
    if isinstance(given, (list, tuple)) or getattr(given, "ndim", 0) > 0:
        raise ValueError("prompt_length: expected one number with cuda_graph=True")
    return as_index("prompt_length", given)
