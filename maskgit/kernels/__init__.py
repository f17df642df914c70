"""Fused kernels, one sub-package per op; see kernels/README.md in the source tree."""
