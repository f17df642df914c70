"""The decode step from hidden states: the head's product and the draw, without full logits."""

from .api import decode_step_from_hidden

__all__ = ["decode_step_from_hidden"]
