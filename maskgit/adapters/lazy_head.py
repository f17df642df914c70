"""A model's last linear layer, left out of its forward passes where the model does nothing after it.

Nothing that a model says of itself tells that its head comes last: it may cut off a padded vocabulary,
cap or scale its logits, ban tokens, convert them, remember them.  So in every pass the head gives a
stand-in for the logits: a tensor of their shape and dtype without memory, that may be looked at (shape,
dtype, device) and passed on.  Any other operation has the logits made and works on them, so that a pass is
what it always was, whatever the model does: Python's operations in `__torch_function__`, those that do not
pass there (TorchScript, vmap, C++) in `__torch_dispatch__`, and who reaches for memory gets an error and not
numbers; that pass is run again with the head.  Where the model returns the stand-in itself, untouched, its
head comes last, and what went into the head, copied then, is all that is needed.  From the first pass on in
which it does not, its own logits are used, and also where it keeps the first pass's stand-in.  A stand-in
that anyone keeps is turned into the logits that it stands for.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from ..kernels.decode_step import StepResult, decode_step
from ..kernels.head_sample import decode_step_from_hidden
from .switch import is_own, replaced

HIDDEN = "works on hidden states: the head is applied to the rows that are drawn alone"
CHANGED = "works on logits: the model does more with them after its head"
REMEMBERED = "works on logits: the model keeps them after its passes"
_ONCE = (
    "raised in a pass without the head; in training mode a model is not run again with it: call eval(), "
    "or patch with hidden_states=False"
)
Pass = Callable[[], Any]
# Gets what goes into the head; returns what is needed of it and the dtype of what comes out, None to refuse.
Keep = Callable[[Any], tuple[Any, Any]]
# What may be asked of a stand-in, and what gives it back where that changes nothing of it.
_LOOKS = {
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "names",
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "itemsize", "nbytes",
    "is_floating_point", "is_complex", "is_quantized", "get_device", "__len__", "__hash__",
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
        layer = self._layer
        if layer is None:
            return tuple(forward() for forward in passes)
        return self._watched(layer, passes, partial(_input, layer))[1]

    def rows(self, forward: Pass, wanted: Any) -> Any:
        """(R, V): the wanted rows of the (B, N, V) logits that the pass makes."""
        layer = self._layer
        if layer is None:
            return forward()[wanted].detach()

        def keep(hidden: Any) -> tuple[Any, Any]:
            rows = _linear(layer, hidden[wanted])
            return rows, rows.dtype

        is_hidden, (out,) = self._watched(layer, (forward,), keep)
        return (out if is_hidden else out[wanted]).detach()

    def decode_step(self, out: Any, tokens: Any, uncond: Any = None, **options: Any) -> StepResult:
        """`maskgit.decode_step` on what `run` has returned."""
        if self._layer is None:
            return decode_step(out, tokens, uncond_logits=uncond, **options)
        return decode_step_from_hidden(
            out, self.weight, tokens, head_bias=self.bias, uncond_hidden=uncond, **options
        )

    def _watched(
        self, layer: Any, passes: tuple[Pass, ...], keep: Keep
    ) -> tuple[bool, tuple[Any, ...]]:
        """(True, what `keep` made of the head's inputs), or (False, the logits of all passes)."""
        done = [_Watched(layer, forward, keep, not self._is_last) for forward in passes]
        if all(one.is_last for one in done):
            self._is_last = True
            self._note(HIDDEN)
            return True, tuple(one.kept for one in done)
        self._layer = None
        self._note(REMEMBERED if all(one.is_kept for one in done) else CHANGED)
        return False, tuple(one.logits() for one in done)


class _Watched:
    """One pass in which the head gave stand-ins.

    is_last: whether the pass returned the one that it got, untouched; in a first pass also whether nobody
    has kept it.  kept: what `keep` made of what went into the head.  logits: gives those of the pass.
    """

    def __init__(self, layer: Any, forward: Pass, keep: Keep, is_first: bool) -> None:
        self._layer, self._keep, self._given = layer, keep, list[Any]()
        self.kept: Any = None
        self.logits: Callable[[], Any]
        self.is_last = self.is_kept = False
        generators = _generators(layer)
        try:
            with replaced(layer, "forward", self._stand_in):
                out = forward()
            if self._came_last(out):
                self.logits, remains = out.logits, weakref.ref(out)
                del out
                self._given.clear()
                self._see_who_keeps(remains, is_first)
                return
            if any(out is one for one in self._given):
                out = out.logits()
            self.logits = partial(_itself, out)
            return
        except Exception as error:  # of a stand-in, or the model's own, which comes again
            if not self._given:
                raise
            if layer.training and not is_first:
                error.add_note(_ONCE)
                raise
        finally:
            self._settle()
        for put_back, state in generators:
            put_back(state)
        self.logits = partial(_itself, forward())

    def _came_last(self, out: Any) -> bool:
        given = self._given
        if len(given) != 1 or given[0] is None or out is not given[0] or out.is_touched():
            return False
        _check_weights(self._layer, self._weights)
        return True

    def _see_who_keeps(self, remains: Any, is_first: bool) -> None:
        if remains() is not None and is_first:
            gc.collect()  # a cycle is nobody
        self.is_kept = remains() is not None
        if self.is_kept:
            _settle(remains())
        self.is_last = not (self.is_kept and is_first)

    def _stand_in(self, input: Any) -> Any:  # as a linear layer calls it
        self._given.append(None)
        hidden = input.clone()  # the model may use that memory again
        self.kept, dtype = self._keep(hidden)
        if dtype is None:
            return _linear(self._layer, input)
        self._weights = _weights(self._layer)
        self._given[-1] = _stand_in_for(self._layer, hidden, dtype, self._weights)
        return self._given[-1]

    def _settle(self) -> None:
        for one in self._given:
            if one is not None:
                _settle(one)
        self._given.clear()


def _logits(layer: Any, hidden: Any, weights: Any) -> Any:
    """What the layer makes of it with the weights that it had when it was called."""
    _check_weights(layer, weights)
    return _linear(layer, hidden)


def _check_weights(layer: Any, weights: Any) -> None:
    if _weights(layer) != weights:
        raise RuntimeError("the model has changed its head's weights after it")


def _weights(layer: Any) -> list[tuple[int, int, int]]:
    """Which weights the layer has, and how often they were changed, as far as torch counts that."""
    given = [p for p in (layer.weight, layer.bias) if p is not None]
    return [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in given]


def _generators(layer: Any) -> list[tuple[Callable[[Any], Any], Any]]:
    """Torch's own generators, of the host and of the layer's device: what sets one, and its state."""
    import torch

    states: list[tuple[Callable[[Any], Any], Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    device = layer.weight.device
    if device.type == "cuda":
        put_back = partial(torch.cuda.set_rng_state, device=device)
        states.append((put_back, torch.cuda.get_rng_state(device)))
    return states


def _itself(value: Any) -> Any:
    return value


def _linear(layer: Any, hidden: Any) -> Any:
    """What the layer makes of it, whatever stands in the place of its method."""
    return type(layer).forward(layer, hidden)


def _input(layer: Any, hidden: Any) -> tuple[Any, Any]:
    """What goes into the head, and the dtype of what comes out, None where they are not the same."""
    import torch

    plain = not torch.is_autocast_enabled(hidden.device.type)
    return hidden.detach(), hidden.dtype if plain and hidden.dtype == layer.weight.dtype else None


def _stand_in_for(layer: Any, hidden: Any, dtype: Any, weights: Any) -> Any:
    """(..., V): a stand-in for what the layer makes of hidden states (..., D); it has no memory."""
    import torch

    shape, device = (*hidden.shape[:-1], len(layer.weight)), layer.weight.device
    out = torch.Tensor._make_wrapper_subclass(_stand_in_class(), shape, dtype=dtype, device=device)
    torch._C._set_throw_on_mutable_data_ptr(out)
    out.logits = cache(partial(_logits, layer, hidden, weights))
    return out


def _settle(stand_in: Any) -> None:
    """Turn a stand-in into the logits, for whoever holds it; one that cannot be is as good, or raises."""
    import torch

    try:
        torch._C._swap_tensor_impl(stand_in, stand_in.logits().detach())
    except RuntimeError:  # C++ holds it too, or the weights are others
        return
    del stand_in.logits
    stand_in.__class__ = torch.Tensor


@cache
def _stand_in_class() -> Any:
    """The class of stand-ins: tensors that may be looked at, and are the logits once they are touched."""
    import torch
    from torch.utils._pytree import tree_map

    class StandIn(torch.Tensor):
        logits: Any  # makes them, once

        def is_touched(self) -> bool:
            """Whether the logits have been made."""
            return bool(self.logits.cache_info().currsize)

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            if name == "__get__":
                name = getattr(func.__self__, "__name__", "")
            own: Any = args[0] if args else None
            is_fresh = isinstance(own, cls) and not own.is_touched()
            if name == "__hash__" or (name in _LOOKS and is_fresh):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if name in _CONVERTS and is_fresh:
                with torch._C.DisableTorchFunctionSubclass():
                    probe = torch.empty(0, dtype=own.dtype, device=own.device)
                    out = func(probe, *args[1:], **kwargs)
                    same = getattr(out, "dtype", None) == own.dtype and out.device == own.device
                if same and not kwargs.get("copy"):
                    return own
            args, kwargs = tree_map(_made, (args, kwargs))
            return func(*args, **kwargs)

        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            args, kwargs = tree_map(_made, (args, kwargs or {}))
            return func(*args, **kwargs)

    def _made(value: Any) -> Any:
        return value.logits() if isinstance(value, StandIn) else value

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
    if not is_own(layer, "forward") or layer._forward_hooks or layer._forward_pre_hooks:
        return "the head is watched by hooks, or replaced"
    if torch.is_autocast_enabled(layer.weight.device.type):
        return "autocast is on"
    return ""
