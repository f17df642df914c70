"""The training loop of both stages: AdamW, moving average of the weights, resumable checkpoints.

All randomness of a step is a function of (seed, step), so a run that is interrupted and resumed
from its checkpoint ends with the same bits as one that was not (same machine, same thread count).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from maskgit.checkpoint import CheckpointError, check_tensors, load_checkpoint, save_checkpoint
from maskgit.files import check_writable
from maskgit.report.progress import Progress
from maskgit.settings import to_dict
from maskgit.training.config import TrainConfig
from maskgit.training.tasks import Task

SEED_STRIDE = 1_000_003


@dataclass
class TrainState:
    """Everything that changes during training."""

    model: nn.Module
    average: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    step: int
    seed: int
    kept: int = 0  # step of the state that is in the file, if any


def start(task: Task, seed: int) -> TrainState:
    """A fresh state; the initial weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_mix(seed, -1))
        model = task.build()
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return TrainState(model, average, _optimizer(model, task.config), 0, seed)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), foreach=True
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero at the last step."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warmup * 0.5 * (1.0 + math.cos(math.pi * step / config.steps))


def train_step(task: Task, state: TrainState) -> dict[str, float]:
    """One update of `state`, in place. Returns the task's figures and the loss."""
    generator = torch.Generator().manual_seed(_mix(state.seed, state.step))
    model, config = state.model.train(), task.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_mix(state.seed, state.step))  # dropout reads the global generator
        loss, figures = task.loss(model, generator)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"{task.name}: the loss is {loss.item()} at step {state.step}")
    nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimizer.step()
    task.after_step(model, generator, state.step)
    _update_average(state, config.ema_decay)
    state.step += 1
    return {"loss": loss.item(), **figures}


@torch.no_grad()
def _update_average(state: TrainState, decay: float) -> None:
    """Move the averaged parameters; buffers, which average themselves, are copied."""
    parameters = dict(state.model.named_parameters())
    weight = 1.0 - min(decay, (1.0 + state.step) / (10.0 + state.step))
    torch._foreach_lerp_(
        [state.average[name] for name in parameters], list(parameters.values()), weight
    )
    for name, buffer in state.model.named_buffers():
        state.average[name].copy_(buffer)


def averaged_model(task: Task, state: TrainState) -> nn.Module:
    """A new model in eval mode with the averaged weights."""
    model = task.build()
    model.load_state_dict(state.average)
    return model.eval().requires_grad_(False)


def train(
    task: Task,
    state: TrainState,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    until: int | None = None,
    progress: bool = True,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainState:
    """Train `state` up to step `until` (default: all of the task's steps), with progress on stderr.

    With `checkpoint`, the state is written there every `checkpoint_every` steps and at the end.
    """
    last = task.config.steps if until is None else min(until, task.config.steps)
    with Progress(task.name, last, initial=state.step, show=progress) as bar:
        while state.step < last:
            figures = train_step(task, state)
            is_told = state.step % 20 == 0
            bar.update(1, ", ".join(f"{k}={v:.4g}" for k, v in figures.items()) if is_told else "")
            if on_step is not None:
                on_step(state.step, figures)
            if checkpoint and (state.step % checkpoint_every == 0 or state.step == last):
                save_state(checkpoint, task, state)
    return state


def fit(
    task: Task,
    seed: int,
    state_path: str | Path,
    *,
    resume: bool = False,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> nn.Module:
    """Train a task to its end, keeping its state in `state_path`; return the averaged model.

    With `resume`, a state already there is continued (its seed must be `seed`); otherwise it is
    overwritten. The weights come out the same either way. An interrupt (Ctrl-C) is passed on as a
    KeyboardInterrupt that says which state is kept where.
    """
    check_writable(state_path, "training state")
    if resume and Path(state_path).exists():
        state = load_state(state_path, task)
        if state.seed != seed:
            raise CheckpointError(f"{state_path}: made with seed {state.seed}, not {seed}")
    else:
        state = start(task, seed)
    try:
        train(
            task, state, checkpoint=state_path, checkpoint_every=checkpoint_every, progress=progress
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_left_at(task, state, state_path)) from None
    return averaged_model(task, state)


def _left_at(task: Task, state: TrainState, path: str | Path) -> str:
    """For who interrupted a training: where it was, and how to go on."""
    where = f"{task.name}: stopped at step {state.step} of {task.config.steps}"
    if state.kept == 0:
        return f"{where}; no state was written yet"
    return f"{where}; the state of step {state.kept} is in {path}: add --resume to go on from there"


def save_state(path: str | Path, task: Task, state: TrainState) -> None:
    """Write everything needed to go on: model, average, optimiser moments, step, seed."""
    save_checkpoint(
        path,
        _state_tensors(state),
        kind=f"train-{task.name}",
        config={"model": task.model_config, "training": to_dict(task.config)},
        info={"step": state.step, "seed": state.seed},
    )
    state.kept = state.step


def load_state(path: str | Path, task: Task) -> TrainState:
    """Read what `save_state` wrote for the same task and configuration, else CheckpointError."""
    checkpoint = load_checkpoint(path, kind=f"train-{task.name}")
    for part, mine in (("model", task.model_config), ("training", to_dict(task.config))):
        theirs = checkpoint.config.get(part)
        if not isinstance(theirs, dict):
            raise CheckpointError(f"{path}: the configuration has no part {part!r}")
        for key, value in mine.items():
            value = list(value) if isinstance(value, tuple) else value
            if theirs.get(key) != value:
                raise CheckpointError(
                    f"{path}: made with {part}.{key} = {theirs.get(key)!r}, not {value!r}"
                )
    step, seed = checkpoint.info.get("step"), checkpoint.info.get("seed")
    if not isinstance(step, int) or not isinstance(seed, int):
        raise CheckpointError(f"{path}: metadata 'info' has no whole numbers 'step' and 'seed'")
    state = start(task, seed)
    _prime_optimizer(state.optimizer)
    want = _state_tensors(state)
    check_tensors(path, checkpoint.tensors, want)
    with torch.no_grad():
        for name, tensor in want.items():
            tensor.copy_(checkpoint.tensors[name])
    state.step = state.kept = step
    return state


def _state_tensors(state: TrainState) -> dict[str, Tensor]:
    """All tensors of a state by name, sharing their memory."""
    tensors = {f"model.{name}": t for name, t in state.model.state_dict().items()}
    tensors.update({f"average.{name}": t for name, t in state.average.items()})
    names = {id(p): name for name, p in state.model.named_parameters()}
    for parameter, moments in state.optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value
    return tensors


def _prime_optimizer(optimizer: torch.optim.AdamW) -> None:
    """Create AdamW's moment tensors without moving a parameter."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }


def _mix(seed: int, step: int) -> int:
    """One 63-bit generator seed per (seed, step)."""
    return ((seed + 1) * SEED_STRIDE + step) % (1 << 63)
