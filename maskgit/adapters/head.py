"""A model's last linear layer, left out of its forward passes where the model does nothing after it.

Nothing that a model says of itself tells that its head comes last: it may cut off a padded vocabulary,
cap or scale its logits, ban tokens, convert them, remember them.  So in every pass the head gives a
stand-in for the logits: a tensor of their shape and dtype without memory of its own, that may be looked at
(shape, dtype, device) and passed on, and on which any operation is an error.  Where the model returns the
stand-in itself its head comes last, and what went into the head is all that is needed.  Where it does not,
the first pass is run again as it is, and the model's own logits are used from then on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from ..kernels.decode_step import StepResult, decode_step
from ..kernels.head_sample import decode_step_from_hidden
from .fingerprint import AdapterError

HIDDEN = "works on hidden states: the head is applied to the rows that are drawn alone"
Pass = Callable[[], Any]
# Gets what goes into the head; returns the dtype of what comes out, None to refuse.
Keep = Callable[[Any], Any]
# What may be asked of a stand-in, and what gives it back where that changes nothing of it.
_LOOKS = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_leaf", "grad_fn", "names", "size", "dim", "ndimension", "numel", "nelement",
    "element_size", "itemsize", "nbytes", "is_floating_point", "is_complex", "is_quantized", "get_device",
    "__len__", "__hash__", "is_contiguous",
}  # fmt: skip
_CONVERTS = {
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "type",
    "cpu",
    "cuda",
    "detach",
    "contiguous",
}


class _TouchedError(Exception):
    """The model has done something with its logits."""


class Head:
    """The head of a model during one run of its sampler; `weight` is None where logits are used."""

    def __init__(
        self, layer: Any, note: Callable[[str], None], *, wanted: bool = True, why: str = ""
    ):
        """`wanted`: whether hidden states may be used at all; `why` not, in words for the report."""
        self._layer: Any = None
        self._note, self._is_last = note, False
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

        seen: list[Any] = []

        def keep(hidden: Any) -> Any:
            seen.append(hidden.detach())
            plain = not torch.is_autocast_enabled(hidden.device.type)
            return hidden.dtype if plain and hidden.dtype == self._layer.weight.dtype else None

        if self._layer is not None and all(self._is_last_in(one, keep) for one in passes):
            self._use_hidden()
            return tuple(seen)
        self._use_logits()
        return tuple(forward() for forward in passes)

    def rows(self, forward: Pass, wanted: Any) -> Any:
        """(R, V): the wanted rows of the (B, N, V) logits that the pass makes."""
        if self._layer is None:
            return forward()[wanted].detach()
        linear, rows = self._layer.forward, list[Any]()

        def keep(hidden: Any) -> Any:
            rows.append(linear(hidden[wanted]))
            return rows[0].dtype

        if self._is_last_in(forward, keep):
            self._use_hidden()
            return rows[0].detach()
        self._use_logits()
        return forward()[wanted].detach()

    def decode_step(self, out: Any, tokens: Any, uncond: Any = None, **options: Any) -> StepResult:
        """`maskgit.decode_step` on what `run` has returned."""
        if self._layer is None:
            return decode_step(out, tokens, uncond_logits=uncond, **options)
        return decode_step_from_hidden(
            out, self.weight, tokens, head_bias=self.bias, uncond_hidden=uncond, **options
        )

    def _is_last_in(self, forward: Pass, keep: Keep) -> bool:
        """Whether a pass returns the very stand-in that its head gave, once."""
        layer, given, usable = self._layer, list[Any](), list[bool]()

        def stand_in(hidden: Any) -> Any:
            dtype = keep(hidden)
            usable.append(dtype is not None)
            one = layer.weight.new_empty(1, dtype=dtype)
            shape = (*hidden.shape[:-1], len(layer.weight))
            given.append(one.expand(shape).as_subclass(_stand_in_class()))
            return given[-1]

        try:
            with replaced_forward(layer, stand_in):
                out = forward()
        except AdapterError:
            raise
        except Exception as error:  # of a touch, or of the model's own, which comes again without
            if self._is_last and not isinstance(error, _TouchedError):
                raise
            return False
        return usable == [True] and out is given[0]

    def _use_hidden(self) -> None:
        self._is_last = True
        self._note(HIDDEN)

    def _use_logits(self) -> None:
        if self._layer is None:
            return
        if self._is_last:
            raise AdapterError(
                "target: expected the head to come last in every pass, got one that changes its "
                "logits; patch with hidden_states=False"
            )
        self._layer = None
        self._note("works on logits: the model does more with them after its head")


@cache
def _stand_in_class() -> Any:
    """The class of stand-ins: a tensor that may be looked at, and nothing else."""
    import torch

    class StandIn(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(func, "__name__", "")
            if name == "__get__":
                name = getattr(func.__self__, "__name__", "")
            own = args[0] if args else None
            if name in _LOOKS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))
            if name in _CONVERTS and isinstance(own, cls):
                with torch._C.DisableTorchFunctionSubclass():
                    probe = torch.empty(0, dtype=own.dtype, device=own.device)
                    out = func(probe, *args[1:], **(kwargs or {}))
                    same = getattr(out, "dtype", None) == own.dtype and out.device == own.device
                if same and not (kwargs or {}).get("copy"):
                    return own
            raise _TouchedError(name)

    return StandIn


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
