"""The `maskgit` command, a file for each of its commands; `environment` and `presets` need NumPy alone."""
