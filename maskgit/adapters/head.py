"""A model's last linear layer, left out of its forward passes where the model does nothing after it.

Nothing that a model says of itself tells that its head comes last: it may cut off a padded vocabulary,
cap or scale its logits, ban tokens, convert them.  So the head is replaced, for the length of a pass,
by a function that keeps what goes in and gives back one unwritten number, seen as (..., V) through
strides of 0: nothing is computed and nothing allocated.  Where the model returns just this view, its
head comes last, and the hidden states are all that is needed.

Where it returns another tensor, that may still be a copy (`contiguous`, a scale of 1).  One pass with
the head in place tells: are the logits returned those of the head, to the bit?  Then later passes have
what goes into the head in the place of what comes out, and must return it unchanged.  Otherwise the
model's own logits are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ..kernels.decode_step import StepResult, decode_step
from ..kernels.head_sample import decode_step_from_hidden
from .common import AdapterError

HIDDEN = "works on hidden states: the head is applied to the rows that are drawn alone"
Pass = Callable[[], Any]
Keep = Callable[
    [Any], Any
]  # gets what goes into the head; the dtype of what comes out, None: refused


class Head:
    """The head of a model during one run of its sampler; `weight` is None where logits are used."""

    def __init__(
        self, layer: Any, note: Callable[[str], None], *, wanted: bool = True, why: str = ""
    ):
        """`wanted`: whether hidden states may be used at all; `why` not, in words for the report."""
        self._layer: Any = None
        self._found: Any = None  # the way in which passes are run, once one has shown itself to do
        self._note = note
        why = obstacle(layer) if wanted else why or "that was asked for"
        if why:
            note(f"works on logits: {why}")
        else:
            self._layer = layer

    @property
    def is_used(self) -> bool:
        """Whether the layer is left out."""
        return self._layer is not None

    @property
    def weight(self) -> Any:
        """(V, D), or None."""
        return None if self._layer is None else self._layer.weight.detach()

    @property
    def bias(self) -> Any:
        """(V,), or None."""
        bias = None if self._layer is None else self._layer.bias
        return None if bias is None else bias.detach()

    def run(self, *passes: Pass) -> tuple[Any, ...]:
        """What goes into the head in each of these passes, or what they return where that differs."""
        import torch

        if self._layer is None:
            return tuple(forward() for forward in passes)
        seen: list[Any] = []

        def keep(hidden: Any) -> Any:
            seen.append(hidden.detach())
            plain = not torch.is_autocast_enabled(hidden.device.type)
            return hidden.dtype if plain and hidden.dtype == self._layer.weight.dtype else None

        for way in (self._found,) if self._found else (_returns_view, _returns_logits):
            seen.clear()
            try:
                does = all(way(self._layer, forward, keep) for forward in passes)
            except RuntimeError:  # a write into the view, or an error of the model's own
                break
            if does:
                self._use_hidden(_returns_view if way is _returns_view else _returns_hidden)
                return tuple(seen)
        return self._use_logits(passes)

    def rows(self, forward: Pass, wanted: Any) -> Any:
        """(R, V): the wanted rows of the (B, N, V) logits that the pass makes."""
        if self._layer is None:
            return forward()[wanted].detach()
        linear, rows = self._layer.forward, list[Any]()

        def keep(hidden: Any) -> Any:
            rows.append(linear(hidden[wanted]))
            return rows[0].dtype

        with contextlib.suppress(RuntimeError):
            if _returns_view(self._layer, forward, keep):
                self._use_hidden(_returns_view)
                return rows[0].detach()
        return self._use_logits([forward])[0][wanted].detach()

    def decode_step(self, out: Any, tokens: Any, uncond: Any = None, **options: Any) -> StepResult:
        """`maskgit.decode_step` on what `run` has returned."""
        if self._layer is None:
            return decode_step(out, tokens, uncond_logits=uncond, **options)
        return decode_step_from_hidden(
            out, self.weight, tokens, head_bias=self.bias, uncond_hidden=uncond, **options
        )

    def _use_hidden(self, way: Any) -> None:
        self._found = way
        self._note(HIDDEN)

    def _use_logits(self, passes: Any) -> tuple[Any, ...]:
        if self._found:
            raise AdapterError(
                "target: expected the head to come last in every pass, got one that changes its "
                "logits; patch with hidden_states=False"
            )
        self._layer = None
        self._note("works on logits: the model changes them after its head")
        return tuple(forward() for forward in passes)


def _returns_view(layer: Any, forward: Pass, keep: Keep) -> bool:
    """Whether a pass returns the very view that it gets in the place of logits."""
    given: list[Any] = []
    usable: list[bool] = []

    def stand_in(hidden: Any) -> Any:
        dtype = keep(hidden)
        usable.append(dtype is not None)
        one = layer.weight.new_empty(1, dtype=dtype)
        given.append(one.expand(*hidden.shape[:-1], len(layer.weight)))
        return given[-1]

    with replaced_forward(layer, stand_in):
        out = forward()
    if usable != [True] or type(out) is not type(given[0]):
        return False
    same = ("dtype", "shape", "device")
    return (
        all(getattr(out, name) == getattr(given[0], name) for name in same)
        and out.data_ptr() == given[0].data_ptr()
        and out.stride() == given[0].stride()
    )


def _returns_logits(layer: Any, forward: Pass, keep: Keep) -> bool:
    """Whether a pass returns a copy of its head's logits, to the bit."""
    return _returns_same(layer, forward, keep, layer.forward)


def _returns_hidden(layer: Any, forward: Pass, keep: Keep) -> bool:
    """Whether a pass without its head returns what goes into it, to the bit."""
    return _returns_same(layer, forward, keep, lambda hidden: hidden)


def _returns_same(layer: Any, forward: Pass, keep: Keep, function: Keep) -> bool:
    given: list[Any] = []
    usable: list[bool] = []

    def watched(hidden: Any) -> Any:
        usable.append(keep(hidden) is not None)
        given.append(function(hidden))
        return given[-1]

    with replaced_forward(layer, watched):
        out = forward()
    if usable != [True] or type(out) is not type(given[0]):
        return False
    kept = given[0]
    if out.dtype != kept.dtype or out.shape != kept.shape:
        return False
    return bool(((out == kept) | (out.isnan() & kept.isnan())).all())


def output_layer(model: Any) -> Any:
    """The last layer of a causal model, as Hugging Face's offer it, or None."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def obstacle(layer: Any) -> str:
    """Why the layer cannot be left out of a forward pass, "" where it can."""
    import torch

    if type(layer) is not torch.nn.Linear:
        return "the model has no plain linear head"
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return "the head is watched by hooks, or replaced"
    if torch.is_autocast_enabled(layer.weight.device.type):
        return "autocast is on"
    return ""


@contextlib.contextmanager
def replaced_forward(layer: Any, forward: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the layer does this instead."""
    if "forward" in vars(layer):
        raise AdapterError("target: expected the head's own forward, which is replaced already")
    object.__setattr__(layer, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(layer, "forward")
