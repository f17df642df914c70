"""Figures behind decisions of the design; each a script."""
