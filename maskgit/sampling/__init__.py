"""The loop around a step: blocks, orders, records, CUDA graphs; it knows no kernel and no model."""
