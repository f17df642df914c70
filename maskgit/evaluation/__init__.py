"""How good generated images are."""
