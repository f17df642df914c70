"""The adapters by name, and `patch`: which one knows a target, and whether its options can work."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from ..kernels.common.arrays import check_integers, kind_of
from ..kernels.common.backends import check_name, why_missing
from ..kernels.decode_step.api import seeds_like
from .fingerprint import AdapterError
from .patching import LOCK, MARK, Handle, check_unpatched, is_patched, name_of

# One line per adapter: the module, and what `target` is.
ADAPTERS = {
    "diffusers_schedulers": "a diffusers pipeline with an AmusedScheduler, BlockRefinementScheduler, "
    "EntropyBoundScheduler or DiscreteDDIMScheduler",
    "dinfer": "a parallel decoder of inclusionAI/dInfer",
    "dream": "a Dream model (an object with diffusion_generate and _sample)",
    "fast_dllm": "the module of NVlabs/Fast-dLLM's llada/generate.py",
    "llada": "the module of ML-GSAI/LLaDA's generate.py",
    "mdlm": "a Diffusion object of kuleshov-group/mdlm",
    "remdm": "a Diffusion object of kuleshov-group/remdm",
    "titok": "an ImageBert or UViTBert of bytedance/1d-tokenizer",
    "maskgit_jax": "the module maskgit.libml.parallel_decode of google-research/maskgit",
    "maskbit": "the module of markweberdev/maskbit's modeling/modules/sampling.py",
    "muse": "a MaskGit of lucidrains/muse-maskgit-pytorch",
}
_PLACES = {"diffusers_schedulers": "diffusers.schedulers"}  # of modules with another name
_SWITCHES = ("hidden_states", "trim_head", "fast", "fixed", "trust_version")


def supported() -> dict[str, str]:
    """The adapters by name, with what `target` is for each."""
    return dict(ADAPTERS)


def module_of(name: str) -> ModuleType:
    """The module of the adapter of that name."""
    return importlib.import_module(f"{__package__}.{_PLACES.get(name, name)}")


def patch(target: Any, adapter: str | None = None, **options: Any) -> Handle:
    """Replace the sampler of `target` by this library's; only this object changes.

    Args:
        target: what `supported()` says for the adapter.
        adapter: its name; by default the one that recognises the target.
        options: the adapter's own, such as backend=, seeds=; every adapter has trust_version=, with
            which a target whose code is not known is taken for one that decodes as the known ones do
            (its parameters are checked all the same).

    Returns:
        A `Handle` with `report` and `undo()`.

    Raises:
        AdapterError: no adapter knows the target, its version is unknown, it is patched already, or an
            option is wrong; the message says what was expected and the target is as it was.
        ValueError: `backend` is not a backend's name.
    """
    check_unpatched(target)
    if adapter is not None and (not isinstance(adapter, str) or adapter not in ADAPTERS):
        raise AdapterError(f"adapter: expected one of {', '.join(ADAPTERS)}, got {adapter!r}")
    names = list(ADAPTERS) if adapter is None else [adapter]
    for name in names:
        module = module_of(name)
        if adapter is not None or module.matches(target):
            return _install(module, target, options)
    known = "; ".join(f"{name}: {what}" for name, what in ADAPTERS.items())
    raise AdapterError(f"target: no adapter knows {name_of(target)}.  Known: {known}")


def _install(module: ModuleType, target: Any, options: dict[str, Any]) -> Handle:
    """The adapter's `install`, with everything taken back where it fails half-way."""
    legal = [p for p in inspect.signature(module.install).parameters if p != "target"]
    for name in options:
        if name not in legal:
            raise AdapterError(f"{name}: expected one of the options {', '.join(legal)}")
    _check_options(options)
    try:
        handle: Handle = module.install(target, **options)
    except BaseException:
        ours = vars(target).get(MARK) if is_patched(target) else None
        if ours is not None and ours.thread == threading.get_ident():
            ours.undo()
        raise
    return handle


def _check_options(options: dict[str, Any]) -> None:
    """What would otherwise fail only when something is sampled."""
    noise, backend = options.get("noise"), check_name(options.get("backend", "auto"))
    if noise is not None and not callable(noise):
        raise AdapterError(f"noise: expected a callable or None, got {noise!r}")
    reason = why_missing(backend) if backend != "auto" else None
    if reason is not None:
        raise AdapterError(
            f"backend: expected one that can run here, got {backend!r}, which cannot: {reason}"
        )
    generator = options.get("generator")
    if generator is not None and type(generator).__name__ != "Generator":
        raise AdapterError(f"generator: expected a torch.Generator or None, got {generator!r}")
    for name in _SWITCHES:
        if not isinstance(options.get(name, False), bool):
            raise AdapterError(f"{name}: expected True or False, got {options[name]!r}")
    try:
        check_seeds(options.get("seeds"))
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from error


def check_seeds(seeds: Any) -> None:
    """TypeError or ValueError unless these are (B,) integers or (B, 2) words, or None."""
    if seeds is None:
        return
    array = seeds_like(seeds, np.zeros(0)) if kind_of(seeds) is None else seeds
    check_integers("seeds", array)
    shape = tuple(array.shape)
    if len(shape) not in (1, 2) or shape[1:] not in ((), (2,)):
        raise ValueError(f"seeds: expected shape (B,) or (B, 2), got {shape}")


@contextlib.contextmanager
def fast_sampler(target: Any, adapter: str | None = None, **options: Any) -> Iterator[Handle]:
    """`patch` for the length of a `with` block."""
    handle = patch(target, adapter, **options)
    try:
        yield handle
    finally:
        with LOCK:
            if handle.is_active:  # not undone in the block
                handle.undo()
