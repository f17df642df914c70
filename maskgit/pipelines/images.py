"""From a file of weights to images: load, generate, encode, decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maskgit.checkpoint import CheckpointError
from maskgit.kernels.common.names import unknown
from maskgit.pipelines.recipes import PRESETS, GenerateConfig
from maskgit.pipelines.weights import Weights, load_weights
from maskgit.sampling.orders import ORDERS, order_scores

if TYPE_CHECKING:
    from maskgit import GenerateResult, StepRule
    from maskgit.models.transformer import MaskGitTransformer

FORWARD_ROWS = 128
COUNTED = ("masked", "quota", "fraction", "given")  # rules that know how many they commit
SEED_SHIFT = 20
MAX_SEED = 1 << 42
WEIGHTS_DIR = Path(__file__).parent.parent / "weights"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A tokenizer and a transformer with the settings to sample them."""

    weights: Weights

    @property
    def config(self) -> GenerateConfig:
        """Default settings of generation."""
        return self.weights.config.generate

    @property
    def num_classes(self) -> int:
        """Classes are 0 .. num_classes - 1."""
        return self.weights.config.transformer.num_classes

    @property
    def mask_token_id(self) -> int:
        """Token id of a masked position."""
        return self.weights.config.transformer.mask_token_id

    def encode(self, images: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> tokens (B, N) int64."""
        with torch.no_grad():
            return self.weights.tokenizer.encode(torch.as_tensor(images, dtype=torch.float32))

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) without a mask id -> images (B, C, H, W) float32 in [0, 1]."""
        left = int((tokens == self.mask_token_id).sum())
        if left:
            raise ValueError(
                f"tokens: {left} of {tokens.numel()} positions are still masked, as some rules leave them; "
                "finish=True (--finish) commits them at the last step"
            )
        with torch.no_grad():
            return self.weights.tokenizer.decode(tokens)

    def generate(self, classes: Sequence[int] | Tensor, **settings: Any) -> Tensor:
        """One image per class: (B, C, H, W) float32 in [0, 1]. Settings are those of `fill`."""
        return self.decode(self.generate_tokens(classes, **settings).tokens)

    def generate_tokens(self, classes: Sequence[int] | Tensor, **settings: Any) -> GenerateResult:
        """Like `generate`, but the sampler's result (`.tokens` is (B, N)) without decoding."""
        class_ids = self._class_ids(classes)
        count = self.weights.config.transformer.num_tokens
        tokens = torch.full((len(class_ids), count), self.mask_token_id, dtype=torch.int64)
        return self.fill(tokens, class_ids, **settings)

    def fill(
        self,
        tokens: Tensor,
        classes: Sequence[int] | Tensor,
        *,
        num_steps: int | None = None,
        seeds: int | Sequence[int] | Tensor = 0,
        rule: str | StepRule | None = None,
        choice_temperature: float | None = None,
        sample_temperature: float | None = None,
        guidance_scale: float | None = None,
        order: str = "confidence",
        finish: bool = False,
        backend: str = "auto",
        record: bool = False,
        progress: bool = False,
    ) -> GenerateResult:
        """Draw every masked position of tokens (B, N); known positions stay.

        `seeds` is one 64-bit seed per sequence, or one number s, which gives sequence i the seed
        `s * 2**20 + i`. What is None comes from the configuration (temperatures: only for the
        configured rule; any other keeps its own). `order`: in which positions are committed:
        "confidence" as the rule says, or "random", "raster", "halton", as many at a step as it says.
        Rules whose counts are given get those of their schedule. `finish`: commit at the last step what
        the rule would leave masked. Raises ValueError for a setting out of range, and for a rule that
        has no such order.
        """
        from maskgit import generate

        class_ids = self._class_ids(classes)
        self.weights.transformer.check_inputs(tokens, class_ids)
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if scale < 0:
            raise ValueError(f"guidance_scale: expected at least 0, got {scale}")
        steps = self.config.num_steps if num_steps is None else num_steps
        if steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {steps}")
        step_rule = self._rule(rule, choice_temperature, sample_temperature)
        step_rule, scores = self._ordered(step_rule, order, tokens)
        return generate(
            self._forward(class_ids, guided=scale != 1.0),
            tokens,
            rule=step_rule,
            mask_token_id=self.mask_token_id,
            num_steps=steps,
            seeds=_seeds(seeds, len(tokens)),
            guidance_scale=None if scale == 1.0 else scale,
            progress=progress,
            backend=backend,
            record=record,
            finish=finish,
            scores=scores,
            num_commit=_counts(step_rule, tokens == self.mask_token_id, steps),
        )

    def _rule(
        self, rule: str | StepRule | None, choice: float | None, sample: float | None
    ) -> StepRule:
        from maskgit.kernels.decode_step import as_rule

        chosen = as_rule(self.config.rule if rule is None else rule)
        if rule is None or rule == self.config.rule:
            choice = self.config.choice_temperature if choice is None else choice
            sample = self.config.sample_temperature if sample is None else sample
        changes: dict[str, Any] = {"choice_temperature": choice, "sample_temperature": sample}
        for name, value in changes.items():
            if value is not None and not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        changes = {name: float(value) for name, value in changes.items() if value is not None}
        return dataclasses.replace(chosen, **changes)

    def _ordered(
        self, rule: StepRule, order: str, tokens: Tensor
    ) -> tuple[StepRule, Tensor | None]:
        """The rule that commits in the order, and its scores (B, N) if they are given."""
        if order not in ORDERS:
            raise ValueError(unknown("order", ORDERS, order))
        if order == "confidence":
            if rule.score == "given" and (rule.count not in COUNTED or rule.touches_known):
                raise ValueError(
                    f"rule: {rule.name!r} takes its scores from a model beside this one (a critic), which "
                    "no order replaces; expected another rule, or maskgit.generate(scores=...)"
                )
            if rule.score == "given":
                raise ValueError(
                    f"order: rule {rule.name!r} has no confidences of its own, its scores are given; "
                    f"expected {', '.join(ORDERS[1:])}"
                )
            return rule, None
        if rule.count not in COUNTED or rule.touches_known:
            raise ValueError(
                f"order: expected 'confidence' with rule {rule.name!r}, which decides by its scores how many "
                f"or which tokens it commits, got {order!r}"
            )
        if order == "random":
            return dataclasses.replace(rule, score="random", choice_temperature=0.0), None
        changed = dataclasses.replace(rule, score="given", choice_temperature=0.0)
        side = self.weights.config.tokenizer.grid_size
        scores = torch.from_numpy(order_scores(order, side, side))
        return changed, scores.expand(len(tokens), -1)

    def _forward(self, class_ids: Tensor, *, guided: bool) -> Any:
        """The `forward(tokens)` that the sampler calls."""
        model, config = self.weights.transformer, self.weights.config.transformer
        if not guided:
            return lambda tokens: _logits(model, tokens, class_ids)
        if not config.null_class:
            raise ValueError("guidance_scale: these weights have no 'no class' id; use 1")
        both = torch.cat([class_ids, torch.full_like(class_ids, config.num_classes)])

        def pair(tokens: Tensor) -> tuple[Tensor, Tensor]:
            cond, uncond = _logits(model, tokens.repeat(2, 1), both).chunk(2)
            return cond, uncond

        return pair

    def _class_ids(self, classes: Sequence[int] | Tensor) -> Tensor:
        class_ids = torch.as_tensor(classes, dtype=torch.int64)
        if class_ids.ndim != 1:
            raise ValueError(f"classes: expected shape (B,), got {tuple(class_ids.shape)}")
        for value in class_ids.tolist():
            if not 0 <= value < self.num_classes:
                raise ValueError(f"classes: expected 0..{self.num_classes - 1}, got {value}")
        return class_ids


def load(source: str | Path = "digits") -> Pipeline:
    """Load a preset that ships with its weights ("digits"), or a weights file by its path.

    Raises CheckpointError (a ValueError) naming the file and what is wrong with it.
    """
    if str(source) in PRESETS:
        path = WEIGHTS_DIR / f"{source}.safetensors"
        if not path.exists():
            raise CheckpointError(
                f"preset {str(source)!r} ships without weights; give the path of a weights file"
            )
        return Pipeline(load_weights(path))
    return Pipeline(load_weights(source))


def _logits(model: MaskGitTransformer, tokens: Tensor, class_ids: Tensor) -> Tensor:
    """The model's logits, some rows at a time: bounded memory, and faster for staying in cache."""
    parts = zip(tokens.split(FORWARD_ROWS), class_ids.split(FORWARD_ROWS), strict=True)
    return torch.cat([model(rows, classes) for rows, classes in parts])


def _counts(rule: StepRule, is_masked: Tensor, num_steps: int) -> list[Any] | None:
    """Where counts are given: how many each sequence commits at each step, by the rule's schedule."""
    from maskgit import StepRule, plan_masked_counts

    if rule.count != "given":
        return None
    if num_steps > is_masked.shape[1]:
        raise ValueError(
            f"num_steps: expected at most {is_masked.shape[1]}, one for each position, with the counts of "
            f"{rule.name!r}, got {num_steps}"
        )
    plan = StepRule(name=f"counts of {rule.name}", schedule=rule.schedule)
    start = is_masked.sum(1).numpy()
    left = np.concatenate([start[None], plan_masked_counts(start, num_steps, rule=plan)])
    left[-1] = 0  # the schedule's own last step keeps its candidates
    return [torch.from_numpy(step) for step in left[:-1] - left[1:]]


def _seeds(seeds: int | Sequence[int] | Tensor, count: int) -> Tensor:
    if isinstance(seeds, (int, np.integer)):
        seeds = int(seeds)
        if not 0 <= seeds < MAX_SEED:
            raise ValueError(f"seed: expected 0..{MAX_SEED - 1}, got {seeds}")
        return (seeds << SEED_SHIFT) + torch.arange(count, dtype=torch.int64)
    tensor = torch.as_tensor(seeds, dtype=torch.int64)
    if tuple(tensor.shape) != (count,):
        raise ValueError(f"seeds: expected shape ({count},), got {tuple(tensor.shape)}")
    return tensor
