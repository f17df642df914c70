"""What every adapter shares: finding the right one, replacing attributes, undoing it, the report."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from ..kernels.common.arrays import kind_of
from ..kernels.common.selection import check_name, why_missing
from ..kernels.decode_step.api import seeds_like
from ..kernels.decode_step.checks import as_index, as_scalar, check_integers
from .fingerprint import AdapterError, signature_of, with_their_defaults

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
_MARK = "_maskgit_handle"
_LOCK = threading.RLock()  # of marks and reports, which threads share
_SWITCHES = ("hidden_states", "trim_head", "fast", "fixed", "trust_version")


@dataclass
class Report:
    """What a patch did, and what has run through it since.

    adapter: name of the adapter.  codebase: what it follows, with the commit.  version: what was
    recognised in the target.  replaced: names of the replaced attributes.  calls: how often they
    have been called.  notes: what differs from the original, as sentences.
    """

    adapter: str
    codebase: str
    version: str
    replaced: tuple[str, ...] = ()
    calls: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Add a sentence once."""
        with _LOCK:
            if sentence not in self.notes:
                self.notes.append(sentence)

    def count(self) -> int:
        """Count a call; its number, from 0."""
        with _LOCK:
            self.calls += 1
            return self.calls - 1


class Handle:
    """A patch that is in place: `report` tells what it does, `undo()` takes it back."""

    def __init__(self, target: Any, report: Report):
        self.target = target
        self.report = report
        self._saved: list[tuple[Any, str, bool, Any]] = []
        self._active = True
        self.thread = threading.get_ident()
        with _LOCK:
            _check_unpatched(target)
            self._set(target, _MARK, self)

    def replace(self, name: str, value: Any, owner: Any = None) -> None:
        """Set an attribute of the target (or of an object inside it), remembering what it was."""
        owner = self.target if owner is None else owner
        self._set(owner, name, value)
        self.report.replaced += (name,)

    def replace_method(
        self, name: str, function: Callable[..., Any], owner: Any = None, count: bool = True
    ) -> None:
        """The same for a method: `function` gets the object as its first argument, calls are counted.

        What a caller leaves out has the default that the method has, not that of `function`, and
        `function` gets all by name; keywords that the method does not have are its own.  Without
        `count` it gets what it is called with, and calls are not counted.
        Copies of the object are not patched: they have the method that it had before.
        """
        owner = self.target if owner is None else owner
        self.replace(name, _Method(self, owner, name, function, count), owner)

    @property
    def is_active(self) -> bool:
        """Whether the patch is still in place."""
        return self._active

    def undo(self) -> None:
        """Restore everything; AdapterError if that has been done.  Calls that run go on to their end."""
        with _LOCK:
            if not self._active:
                raise AdapterError(f"target: {_name(self.target)} is not patched any more")
            self._active = False
            for owner, name, own, value in reversed(self._saved):
                if own:
                    setattr(owner, name, value)
                else:
                    delattr(owner, name)
            self._saved.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of the target do not carry its patch."""
        return type(None), ()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        own = name in vars(owner)
        self._saved.append((owner, name, own, vars(owner).get(name)))
        if isinstance(owner, ModuleType) or not hasattr(owner, "_modules"):
            setattr(owner, name, value)
        else:  # torch.nn.Module.__setattr__ would register a module or parameter
            object.__setattr__(owner, name, value)


class _Method:
    """Stands in the place of a method; the original once the patch is undone."""

    def __init__(
        self, handle: Handle, owner: Any, name: str, function: Callable[..., Any], count: bool
    ):
        self._handle, self._owner, self._count = handle, owner, count
        self._original, self._is_own = getattr(owner, name), name in vars(owner)
        ours = functools.partial(function, owner)
        self._ours = with_their_defaults(self._original, ours) if count else ours
        self.__name__, self.__doc__ = name, function.__doc__
        self.__signature__ = signature_of(self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._handle.is_active:
            return self._original(*args, **kwargs)
        if self._count:
            self._handle.report.count()
        return self._ours(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy of the owner holds: its class's method, bound to itself, or its own function."""
        if self._is_own:
            return _itself, (self._original,)
        return getattr, (self._owner, self.__name__)


def _itself(value: Any) -> Any:
    return value


def is_patched(target: Any) -> bool:
    """Whether a patch of the target is in place; a copy of a patched object is not patched."""
    handle = getattr(target, "__dict__", {}).get(_MARK)
    return handle is not None and handle.target is target


def _check_unpatched(target: Any) -> None:
    if is_patched(target):
        raise AdapterError(
            f"target: {_name(target)} is patched already, for all threads; undo that first, or put one "
            "block around them all"
        )


def supported() -> dict[str, str]:
    """The adapters by name, with what `target` is for each."""
    return dict(ADAPTERS)


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
    _check_unpatched(target)
    if adapter is not None and (not isinstance(adapter, str) or adapter not in ADAPTERS):
        raise AdapterError(f"adapter: expected one of {', '.join(ADAPTERS)}, got {adapter!r}")
    names = list(ADAPTERS) if adapter is None else [adapter]
    for name in names:
        module = importlib.import_module(f"{__package__}.{name}")
        if adapter is not None or module.matches(target):
            return _install(module, target, options)
    known = "; ".join(f"{name}: {what}" for name, what in ADAPTERS.items())
    raise AdapterError(f"target: no adapter knows {_name(target)}.  Known: {known}")


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
        ours = vars(target).get(_MARK) if is_patched(target) else None
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
        with _LOCK:
            if handle.is_active:  # not undone in the block
                handle.undo()


def as_count(name: str, value: Any) -> int:
    """An integer of any library as Python's; ValueError unless it is one of at least 1."""
    try:
        return as_index(name, value, 1)
    except TypeError as error:
        raise ValueError(str(error)) from None


def as_number(name: str, value: Any) -> float:
    """A real number of any library as Python's; ValueError unless it is one, and finite."""
    try:
        return float(as_scalar(name, value))
    except TypeError:
        raise ValueError(f"{name}: expected a finite number, got {value!r}") from None


def nucleus(top_p: Any) -> float | None:
    """A `top_p` of the codebases as the rules': none from 1 on; at 0 and below the surest token is left."""
    if top_p is None or top_p >= 1:
        return None
    return max(as_number("top_p", top_p), 1e-30)


def draw_seeds(batch: int, generator: Any, device: Any) -> Any:
    """(B,) 64-bit integers on the device, from a torch generator or torch's own."""
    import torch

    where = device if generator is None else generator.device
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator, device=where)
    return seeds.to(device)


def guided_by_tensor(start: Any, cond: Any, uncond: Any, weight: float) -> Any:
    """start + weight (cond - uncond) for a weight that is a float32 tensor (1,), and so in float32.

    In half precision the difference alone is rounded to the dtype of the logits.
    """
    return start.float() + weight * (cond - uncond).float()


def without_logits(logits: Any, unscored: Any) -> Any:
    """(B, N) bool: where among the unscored positions all logits are -inf or NaN; None if nowhere.

    Waits for the device, and reads the logits again only where something is unscored.
    """
    if not bool(unscored.any()):
        return None
    dead = unscored & ~(logits > -float("inf")).any(-1)
    return dead if bool(dead.any()) else None


def _name(target: Any) -> str:
    if isinstance(target, ModuleType):
        return f"the module {target.__name__}"
    kind = target if isinstance(target, type) else type(target)
    return f"{'' if isinstance(target, type) else 'an object of '}{kind.__module__}.{kind.__name__}"
