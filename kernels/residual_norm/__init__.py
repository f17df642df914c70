"""LayerNorm of a sum, which ends each half of a post-LayerNorm transformer layer."""

from .ops import residual_norm

__all__ = ["residual_norm"]
