"""How one of the two stages is optimised."""

from __future__ import annotations

from dataclasses import dataclass

from maskgit.settings import ConfigError, require_positive


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one of the two stages."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.96
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    label_smoothing: float = 0.1
    class_dropout: float = 0.0
    mask_schedule: str = "cosine"
    shift_augmentation: bool = False
    code_restart_steps: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "learning_rate")
        for name in ("label_smoothing", "class_dropout", "ema_decay"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name}: expected a number in [0, 1], got {value}")
