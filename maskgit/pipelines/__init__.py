"""From weights and a class to images: what puts models, sampling and files together."""
