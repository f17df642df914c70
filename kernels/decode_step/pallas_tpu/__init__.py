"""The decode step on TPUs, in Pallas."""
