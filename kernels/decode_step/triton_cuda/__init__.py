"""The decode step on NVIDIA GPUs, in Triton."""
