"""All that needs an NVIDIA GPU: `make gpu`."""
