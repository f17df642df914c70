"""Checkpoints: safetensors files whose metadata says what they hold. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from maskgit.files import FORMAT, FORMAT_VERSION, atomic_write, digest


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not hold what was asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: its kind, tensors by name, configuration and free-form facts."""

    kind: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    info: dict[str, Any]


def digest_of(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """SHA-256 (hex) over texts, then names, dtypes, shapes and bytes of the tensors by name."""

    def facts(name: str) -> tuple[str, str, tuple[int, ...], bytes]:
        tensor = tensors[name].detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        return name, str(tensor.dtype), tuple(tensor.shape), data

    return digest((facts(name) for name in sorted(tensors)), *texts)


def save_checkpoint(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    config: Mapping[str, Any],
    info: Mapping[str, Any],
) -> Path:
    """Write tensors with metadata to a safetensors file, atomically. `info` must be JSON-able."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = (json.dumps(dict(config)), json.dumps(dict(info)))
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "config": texts[0],
        "info": texts[1],
        "sha256": digest_of(flat, *texts),
    }
    return atomic_write(path, save(flat, metadata), "checkpoint")


def load_checkpoint(path: str | Path, *, kind: str) -> Checkpoint:
    """Read a file written by `save_checkpoint`, checking its format, its digest and its values.

    Raises CheckpointError saying what is wrong: absent, not safetensors, truncated, another kind of
    file, altered tensors, or a value that is not finite.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a maskgit checkpoint (its metadata does not say so)")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}; this release reads version {FORMAT_VERSION!r}"
        )
    if metadata.get("kind") != kind:
        raise CheckpointError(f"{path}: expected a {kind!r} file, got {metadata.get('kind')!r}")
    texts = (metadata.get("config", ""), metadata.get("info", ""))
    if metadata.get("sha256") != digest_of(tensors, *texts):
        raise CheckpointError(f"{path}: tensors or metadata do not match the file's own SHA-256")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: tensor {name!r} has values that are not finite")
    return Checkpoint(kind, tensors, _json(path, metadata, "config"), _json(path, metadata, "info"))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a safetensors file, got a directory")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _json(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: metadata {key!r} is missing or not JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: metadata {key!r}: expected an object, got {value!r}")
    return value


def check_tensors(path: str | Path, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `got` has the names and shapes of `want`, and float values where
    `want` is floating-point (other dtypes must be equal). `want` may live on the meta device."""
    missing, extra = sorted(set(want) - set(got)), sorted(set(got) - set(want))
    if missing:
        raise CheckpointError(f"{path}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if extra:
        raise CheckpointError(f"{path}: unexpected tensor {extra[0]!r} ({len(extra)} in all)")
    for name, tensor in want.items():
        if got[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected shape {tuple(tensor.shape)}, "
                f"got {tuple(got[name].shape)}"
            )
        same = got[name].dtype == tensor.dtype
        if not same and not (got[name].is_floating_point() and tensor.is_floating_point()):
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected {tensor.dtype}, got {got[name].dtype}"
            )
