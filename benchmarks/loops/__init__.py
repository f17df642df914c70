"""Whole generations, against the codebases' own."""
