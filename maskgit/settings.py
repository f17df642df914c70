"""Settings as frozen dataclasses: checked when they are made, to JSON and back.

So a configuration can be printed, compared, hashed and written into a checkpoint's metadata.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration has an unknown field, a field of the wrong type, or an impossible value."""


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain dicts, lists and numbers, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: Any) -> T:
    """Build the configuration dataclass `cls` from what `to_dict` gave, checking names and types.

    Raises ConfigError naming the field that is missing, unknown or of the wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{cls.__name__}: expected an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{cls.__name__}: unknown field {unknown[0]!r}")
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _coerce(f"{cls.__name__}.{name}", hints[name], data[name])
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{cls.__name__}: field {name!r} is missing")
    return cls(**values)


def _coerce(where: str, hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_coerce(where, typing.get_args(hint)[0], v) for v in value)
    if isinstance(hint, types.UnionType):
        raise ConfigError(f"{where}: unsupported field type {hint}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def require_positive(config: Any, *names: str) -> None:
    """ConfigError naming the first of these fields that is not above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name}: expected more than 0, got {getattr(config, name)}")
