"""Files, written whole or not at all, and what a checkpoint says of itself, to torch and jax alike."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

FORMAT = "maskgit-checkpoint"
FORMAT_VERSION = "1"
WEIGHTS = "weights"


def check_writable(path: str | Path, what: str = "output path") -> Path:
    """Raise OSError, naming `what`, when a file cannot be written at `path`; return it as a Path.

    Called before long work, so that a mistyped folder is not found out at the end.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()  # write the file it points to, not over the link
    if path.is_dir():
        raise IsADirectoryError(f"{what}: expected a file name, got the directory {path}")
    if path.exists() and not path.is_file():
        raise OSError(f"{what}: expected a regular file, got the device or pipe {path}")
    if path.exists() and not path.stat().st_mode & 0o222:
        raise PermissionError(f"{what}: the file {path} is read-only")
    folder = path.parent
    if not folder.exists():
        raise FileNotFoundError(f"{what}: the folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{what}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{what}: the folder {folder} is not writable")
    return path


def atomic_write(path: str | Path, data: bytes, what: str = "output path") -> Path:
    """Write bytes to a temporary file in the same folder, then rename it onto `path`.

    A reader sees the old file or the new one, never a part. Raises OSError as `check_writable`.
    """
    path = check_writable(path, what)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name[:32]}.", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def digest(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]], *texts: str) -> str:
    """SHA-256 (hex) over texts, then (name, dtype as torch names it, shape, bytes) in the order of names."""
    found = hashlib.sha256("\0".join(texts).encode())
    for name, dtype, shape, data in tensors:
        found.update(f"{name}|{dtype}|{shape}|".encode())
        found.update(data)
    return found.hexdigest()
