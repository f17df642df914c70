"""Drop-in samplers for other codebases: one file each, undone as easily as done.

    with maskgit.adapters.fast_sampler(target):      # or handle = patch(target); ...; handle.undo()
        ...                                          # the codebase's own calls, unchanged

`target` is what the codebase's sampler hangs on: a model instance, a scheduler, or the module that
holds its function.  Only that object changes; nothing happens on import; an unknown version is
refused, never half patched.
"""

from .fingerprint import AdapterError
from .patching import Handle, Report
from .registry import fast_sampler, patch, supported

__all__ = ["AdapterError", "Handle", "Report", "fast_sampler", "patch", "supported"]
