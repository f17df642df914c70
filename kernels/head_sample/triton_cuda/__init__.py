"""The fused head on NVIDIA GPUs, in Triton."""
