"""Bidirectional attention for the shapes that masked models use."""

from .api import attention

__all__ = ["attention"]
