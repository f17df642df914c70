"""The decode step on CPUs: the C++ core, from NumPy arrays and inside jax's programs."""
