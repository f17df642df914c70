"""One view of NumPy, torch and jax arrays: what kind, which dtype, to and from NumPy, and simple checks.

No framework is imported here before the caller has: an array of a library exists only if that
library is already in sys.modules.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_kinds: dict[type, str] = {np.ndarray: "numpy"}  # of types, where the type alone decides


def kind_of(x: object) -> str | None:
    """ "torch", "jax" or "numpy" for an array, None for anything else."""
    known = _kinds.get(type(x))
    if known is not None:
        return known
    if isinstance(x, np.ndarray):
        return "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        _kinds[type(x)] = "torch"
        return "torch"
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(x, jax.Array):
        return "jax"
    return None


class Facts(NamedTuple):
    """What an array is, its values apart: equal for arrays that are alike.  Of all else `kind` is None."""

    kind: str | None
    type: type
    shape: Any = ()
    dtype: Any = None
    device: Any = None
    requires_grad: bool = False


def facts(x: Any) -> Facts:
    """The facts about an array, or those themselves."""
    kind = kind_of(x)
    if kind == "torch":
        return Facts(kind, type(x), x.shape, x.dtype, x.device, x.requires_grad)
    if kind is not None:
        return Facts(kind, type(x), x.shape, x.dtype)
    return x if isinstance(x, Facts) else Facts(None, type(x))


def library_of(x: Any) -> Any:
    """The module with the functions for `x`: torch, jax.numpy or NumPy."""
    kind = kind_of(x)
    if kind == "jax":
        import jax.numpy as jnp

        return jnp
    return sys.modules["torch"] if kind == "torch" else np


def place_of(x: Any) -> dict[str, Any]:
    """What a creating function of `library_of(x)` needs to make an array beside `x`."""
    return {"device": x.device} if kind_of(x) == "torch" else {}


def signed(ids: Any) -> Any:
    """Integers in a dtype that holds -1."""
    if not dtype_name(ids).startswith("uint"):
        return ids
    return ids.to(library_of(ids).int64) if kind_of(ids) == "torch" else ids.astype(int)


_dtype_names: dict[Any, str] = {}


def dtype_name(x: Any) -> str:
    """ "bfloat16", "int64", ...: the dtype without the library's prefix."""
    name = _dtype_names.get(x.dtype)
    if name is None:
        name = _dtype_names[x.dtype] = str(x.dtype).removeprefix("torch.")
    return name


def is_on_host(x: Any) -> bool:
    """Whether reading a value of `x` costs no device synchronisation (false under tracing)."""
    kind = kind_of(x)
    if kind == "torch":
        return bool(x.is_cpu)
    if kind == "jax":
        if is_traced(x):
            return False
        return all(d.platform == "cpu" for d in x.devices())
    return True


def is_traced(x: Any) -> bool:
    """Whether `x` is a jax array inside a traced program, without values."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


def to_numpy(x: Any) -> Any:
    """`x` as a NumPy array, without a copy where it is on the host; bfloat16 as its uint16 bits."""
    if x is None:
        return None
    if kind_of(x) == "torch":
        host = x if x.is_cpu else x.cpu()
        if dtype_name(x) == "bfloat16":
            return host.view(sys.modules["torch"].int16).numpy().view(np.uint16)
        return host.numpy()
    array = x if type(x) is np.ndarray else np.asarray(x)
    return array.view(np.uint16) if dtype_name(x) == "bfloat16" else array


def widen(x: Any, dtype: str) -> Any:
    """A `to_numpy` result of floating `dtype` in float32 at least."""
    if x is None or dtype != "bfloat16":
        return x if x is None or dtype != "float16" else x.astype(np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_kind(x: Any, kind: str, device: Any = None) -> Any:
    """`x` as an array of the library `kind`, on `device` where torch is asked for."""
    if x is None or kind_of(x) == kind:
        return x
    array = to_numpy(x)
    if kind == "numpy":
        return array
    is_bfloat16 = dtype_name(x) == "bfloat16"
    if kind == "torch":
        import torch

        array = array.view(np.int16) if is_bfloat16 else array
        if min(array.strides, default=0) < 0:  # of an axis of one element too
            array = array.copy()
        if array.flags.writeable:
            tensor = torch.from_numpy(array)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*not writable.*")
                tensor = torch.from_numpy(array)
        tensor = tensor.view(torch.bfloat16) if is_bfloat16 else tensor
        return tensor if device is None or device.type == "cpu" else tensor.to(device)
    import jax.numpy as jnp

    return jnp.asarray(array.view(jnp.bfloat16) if is_bfloat16 else array)


def like(result: Any, model: Any) -> Any:
    """`result` as an array of the library and on the device of `model`."""
    kind = kind_of(model) or "numpy"
    if kind != "torch":
        return to_kind(result, kind)
    if kind_of(result) == "torch":  # a GPU may have worked for the host
        return result if result.device == model.device else result.to(model.device)
    return to_kind(result, kind, model.device)


def like_all(results: Sequence[Any], model: Any) -> list[Any]:
    """A backend's own results, fresh arrays of one library, as arrays like `model`."""
    if kind_of(model) == "torch":
        if type(results[0]) is np.ndarray and model.is_cpu:
            return list(map(sys.modules["torch"].from_numpy, results))
        if kind_of(results[0]) == "torch" and results[0].device == model.device:
            return list(results)
    return [like(result, model) for result in results]


def check_same_kind(name: str, x: Any, model: Any) -> None:
    """TypeError or ValueError unless `x` is an array of the kind and on the device of `model`."""
    own, other = facts(x), facts(model)
    if own.kind != other.kind:
        raise TypeError(
            f"{name}: expected a {other.kind} array like the others, got {own.type.__name__}"
        )
    if own.device != other.device:
        raise ValueError(
            f"{name}: expected on device {other.device} like the others, got {own.device}"
        )


def as_index(name: str, value: Any, least: int | None = None) -> int:
    """An integer of any library as Python's; TypeError for anything else, ValueError below `least`."""
    wanted = "an integer" if least is None else f"an integer >= {least}"
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: expected {wanted}, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name}: expected {wanted}, got {number}")
    return number


def as_scalar(name: str, value: Any) -> Any:
    """A finite number of any library, or an array () of one, as Python's float; traced ones as they are.

    Raises:
        TypeError: not a number.  ValueError: not finite.
    """
    given = value
    if kind_of(value) is not None and tuple(value.shape) == ():
        if is_traced(value):
            return value
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {given!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {given!r}")
    return number


def check_integer(name: str, value: Any) -> None:
    """TypeError unless `value` is an integer, symbolic ones of a traced program included."""
    if type(value) is int and -(2**63) <= value < 2**63:
        return
    if type(value).__name__ == "SymInt":
        return
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: expected a 64-bit integer, got {value}")
        return
    if is_traced(value):
        raise TypeError(
            f"{name}: expected an integer that is known outside the program, got {value!r}"
        )
    raise TypeError(f"{name}: expected an integer, got {value!r}")


def check_no_grad(name: str, x: Any) -> None:
    """ValueError for a torch tensor that requires grad: decoding has none."""
    if facts(x).requires_grad:
        raise ValueError(
            f"{name}: decoding has no gradient; expected {name}.detach() or torch.no_grad(), "
            "got a tensor that requires grad"
        )


def check_shape(name: str, x: Any, shape: tuple[int, ...]) -> None:
    """ValueError unless `x` has this shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")


def check_integers(name: str, x: Any) -> None:
    """TypeError unless `x` has an integer dtype."""
    if not dtype_name(x).startswith(("int", "uint")):
        raise TypeError(f"{name}: expected integers, got dtype {dtype_name(x)}")


def check_floating(name: str, x: Any) -> None:
    """TypeError unless `x` has a floating dtype."""
    if not dtype_name(x).startswith(("float", "bfloat")):
        raise TypeError(f"{name}: expected floating numbers, got dtype {dtype_name(x)}")
