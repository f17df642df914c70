"""What every adapter shares: finding the right one, replacing attributes, undoing it, the report."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

from ..kernels.common.selection import available_backends

# One line per adapter: the module, and what `target` is.
ADAPTERS = {
    "diffusers_schedulers": "a diffusers pipeline with an AmusedScheduler or BlockRefinementScheduler",
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


class AdapterError(RuntimeError):
    """The target cannot be patched, or not now; it is as it was."""


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
        if sentence not in self.notes:
            self.notes.append(sentence)


class Handle:
    """A patch that is in place: `report` tells what it does, `undo()` takes it back."""

    def __init__(self, target: Any, report: Report):
        self.target = target
        self.report = report
        self._saved: list[tuple[Any, str, bool, Any]] = []
        self._active = True
        if is_patched(target):
            raise AdapterError(f"target: {_name(target)} is patched already; undo that first")
        self._set(target, _MARK, self)

    def replace(self, name: str, value: Any, owner: Any = None) -> None:
        """Set an attribute of the target (or of an object inside it), remembering what it was."""
        owner = self.target if owner is None else owner
        self._set(owner, name, value)
        self.report.replaced += (name,)

    def replace_method(self, name: str, function: Callable[..., Any], owner: Any = None) -> None:
        """The same for a method: `function` gets the object as its first argument, calls are counted."""
        owner = self.target if owner is None else owner

        def method(*args: Any, **kwargs: Any) -> Any:
            self.report.calls += 1
            return function(owner, *args, **kwargs)

        method.__doc__, method.__name__ = function.__doc__, name
        self.replace(name, method, owner)

    @property
    def is_active(self) -> bool:
        """Whether the patch is still in place."""
        return self._active

    def undo(self) -> None:
        """Restore everything; AdapterError if that has been done."""
        if not self._active:
            raise AdapterError(f"target: {_name(self.target)} is not patched any more")
        for owner, name, own, value in reversed(self._saved):
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)
        self._saved.clear()
        self._active = False

    def _set(self, owner: Any, name: str, value: Any) -> None:
        own = name in vars(owner)
        self._saved.append((owner, name, own, vars(owner).get(name)))
        if isinstance(owner, ModuleType) or not hasattr(owner, "_modules"):
            setattr(owner, name, value)
        else:  # torch.nn.Module.__setattr__ would register a module or parameter
            object.__setattr__(owner, name, value)


def is_patched(target: Any) -> bool:
    """Whether a patch of the target is in place."""
    return _MARK in getattr(target, "__dict__", {})


def supported() -> dict[str, str]:
    """The adapters by name, with what `target` is for each."""
    return dict(ADAPTERS)


def patch(target: Any, adapter: str | None = None, **options: Any) -> Handle:
    """Replace the sampler of `target` by this library's; only this object changes.

    Args:
        target: what `supported()` says for the adapter.
        adapter: its name; by default the one that recognises the target.
        options: the adapter's own, such as backend=, seeds=.

    Returns:
        A `Handle` with `report` and `undo()`.

    Raises:
        AdapterError: no adapter knows the target, its version is unknown, or it is patched already;
            the message says what was expected and the target is as it was.
    """
    if is_patched(target):
        raise AdapterError(f"target: {_name(target)} is patched already; undo that first")
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
        if is_patched(target):
            vars(target)[_MARK].undo()
        raise
    return handle


def _check_options(options: dict[str, Any]) -> None:
    """What would otherwise fail only when something is sampled."""
    noise, backend = options.get("noise"), options.get("backend", "auto")
    if noise is not None and not callable(noise):
        raise AdapterError(f"noise: expected a callable or None, got {noise!r}")
    backends = available_backends()
    if isinstance(backend, str) and backends.get(backend) is not None:  # unknown names: check_name
        able = ", ".join(["auto", *(name for name, why in backends.items() if why is None)])
        raise AdapterError(f"backend: expected one that can run here ({able}), got {backend!r}")


@contextlib.contextmanager
def fast_sampler(target: Any, adapter: str | None = None, **options: Any) -> Iterator[Handle]:
    """`patch` for the length of a `with` block."""
    handle = patch(target, adapter, **options)
    try:
        yield handle
    finally:
        if handle.is_active:  # not undone in the block
            handle.undo()


def check_signature(function: Any, expected: str, what: str) -> None:
    """AdapterError unless the parameters of `function` are `expected`, names joined by ", "."""
    try:
        got = ", ".join(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"target: {what} has no readable signature") from error
    if got != expected:
        raise AdapterError(
            f"target: an unknown version of {what}; expected parameters ({expected}), got ({got})"
        )


def check_attributes(target: Any, names: tuple[str, ...], what: str) -> None:
    """AdapterError unless the target has these attributes."""
    missing = [name for name in names if not hasattr(target, name)]
    if missing:
        raise AdapterError(
            f"target: an unknown version of {what}; expected attributes {', '.join(names)}, "
            f"without {', '.join(missing)}"
        )


def linear_head(model: Any) -> Any:
    """The last linear layer of a causal model where its input is all that the logits need, or None.

    None where the model has no `get_output_embeddings`, ties its head to an embedding outside a
    linear layer, or caps or scales its logits.
    """
    config = getattr(model, "config", None)
    for name in ("final_logit_softcapping", "logits_soft_cap", "scale_logits"):
        if getattr(config, name, None):
            return None
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if callable(find) else None
    kind = type(head)
    is_plain = kind.__module__ == "torch.nn.modules.linear" and kind.__name__ == "Linear"
    if not is_plain or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return None
    return head


def usable_head(layer: Any, device: Any) -> Any:
    """The linear layer where `without_head` changes nothing else in a forward pass, or None."""
    import torch

    holder = SimpleNamespace(get_output_embeddings=lambda: layer)
    return None if torch.is_autocast_enabled(torch.device(device).type) else linear_head(holder)


def draw_seeds(batch: int, generator: Any, device: Any) -> Any:
    """(B,) 64-bit integers on the device, from a torch generator or torch's own."""
    import torch

    where = device if generator is None else generator.device
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator, device=where)
    return seeds.to(device)


@contextlib.contextmanager
def without_head(head: Any) -> Iterator[None]:
    """Inside, the head returns what goes into it, so that a model's `logits` are hidden states."""
    if head is None:
        yield
        return
    if "forward" in vars(head):
        raise AdapterError("target: the head's forward is replaced already")
    object.__setattr__(head, "forward", lambda hidden: hidden)
    try:
        yield
    finally:
        object.__delattr__(head, "forward")


def _name(target: Any) -> str:
    if isinstance(target, ModuleType):
        return f"the module {target.__name__}"
    kind = target if isinstance(target, type) else type(target)
    return f"{'' if isinstance(target, type) else 'an object of '}{kind.__module__}.{kind.__name__}"
