"""The decode step in plain torch and jax.numpy: the unfused baseline, and the fallback."""
