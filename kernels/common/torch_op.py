"""A function of tensors as one torch.library op: `torch.compile(fullgraph=True)` sees a single node.

Defined with define and impl, which cost half the call overhead of `torch.library.custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .arrays import check_integer

_LIBRARY = torch.library.Library("maskgit", "FRAGMENT")


class TorchOp:
    """An op by its schema, its body, and a fake of that which knows shapes and dtypes alone.

    Called, it says which argument is no tensor, no integer or on another device than argument
    number `model`, where torch would speak of schemas, or work with shapes alone; `shown` has the public
    names of arguments that have another one in the schema, `anywhere` those that may be on any device.
    """

    def __init__(
        self,
        schema: str,
        body: Callable[..., Any],
        fake: Callable[..., Any],
        shown: dict[str, str] | None = None,
        anywhere: tuple[str, ...] = (),
        model: int = 0,
    ):
        self.model = model
        name, _, rest = schema.partition("(")
        arguments = [part.split() for part in rest.partition(")")[0].split(",")]
        self.tensors, self.integers = [], []
        for i, (kind, argument) in enumerate(arguments):
            name_shown = (shown or {}).get(argument, argument)
            if kind.startswith("Tensor") and argument not in anywhere:
                self.tensors.append((i, name_shown, kind == "Tensor"))
            if kind == "SymInt":
                self.integers.append((i, name_shown))
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"maskgit::{name}", fake, lib=_LIBRARY)
        self.overload = getattr(torch.ops.maskgit, name).default

    def __call__(self, *args: Any) -> Any:
        """The op on the arguments of its schema, all of them, in order."""
        device = getattr(args[self.model], "device", None)
        for i, name, is_needed in self.tensors:
            value = args[i]
            if value is None and not is_needed:
                continue
            if not isinstance(value, torch.Tensor):
                raise TypeError(
                    f"{name}: expected a torch array like the others, got {type(value).__name__}"
                )
            if value.device != device:
                raise ValueError(
                    f"{name}: expected on device {device} like the others, got {value.device}"
                )
        for i, name in self.integers:
            check_integer(name, args[i])
        return self.overload(*args)
