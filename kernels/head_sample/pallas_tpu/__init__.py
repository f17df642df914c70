"""The fused head on TPUs, in Pallas."""
