"""Mask schedules of MaskGIT and the planned number of masked positions per step."""

from .kernels.decode_step.counts import SCHEDULES, gamma, plan_masked_counts

__all__ = ["SCHEDULES", "gamma", "plan_masked_counts"]
