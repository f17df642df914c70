"""The folder-to-package map and the optional C++ extension; everything else is in pyproject.toml."""

import platform
import sys
from pathlib import Path

from setuptools import setup

ROOTS = {"maskgit": "maskgit", "kernels": "maskgit.kernels", "benchmarks": "maskgit.benchmarks"}

ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mprefer-vector-width=512",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ],
    "neon": [],
}


def packages():
    """Package -> folder, for every folder below the roots that has an __init__.py."""
    found = {}
    for root, package in ROOTS.items():
        for path in sorted(Path(root).rglob("__init__.py")):
            inner = path.parent.relative_to(root).parts
            found[".".join((package, *inner))] = path.parent.as_posix()
    return found


def extension():
    """The extension and its build step, or nothing where pybind11 is missing."""
    try:
        from pybind11.setup_helpers import Pybind11Extension, build_ext
    except ImportError:
        print("maskgit: pybind11 is missing, installing without the C++ backend", file=sys.stderr)
        return {}

    machine = platform.machine().lower()
    isas, macros = ["scalar"], []
    if machine in ("x86_64", "amd64"):
        isas, macros = ["scalar", "avx2", "avx512"], [("MASKGIT_WITH_X86", None)]
    elif machine in ("aarch64", "arm64"):
        isas, macros = ["scalar", "neon"], [("MASKGIT_WITH_NEON", None)]

    class BuildPerIsa(build_ext):
        """Compiles each instruction set's translation unit with flags of its own."""

        def build_extension(self, ext):
            plain = self.compiler._compile

            def compile_one(obj, src, ext_name, cc_args, extra, pp_opts):
                isa = Path(src).stem.removeprefix("decode_step_")
                plain(obj, src, ext_name, cc_args, extra + ISA_FLAGS.get(isa, []), pp_opts)

            self.compiler._compile = compile_one
            # of an older build, which a failing one would leave to be imported
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            super().build_extension(ext)

    common = ["bindings", "dispatch", "ffi", "select", "thread_pool"]
    sources = [f"csrc/{name}.cpp" for name in common + [f"decode_step_{isa}" for isa in isas]]
    module = Pybind11Extension(
        "maskgit._C",
        sources,
        depends=["setup.py", *(str(p) for p in Path("csrc").glob("*.h"))],
        define_macros=macros,
        cxx_std=17,
        extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wno-psabi", "-pthread"],
        extra_link_args=["-pthread"],
        optional=True,  # a machine without a compiler gets the other backends
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildPerIsa}}


PACKAGES = packages()
setup(packages=list(PACKAGES), package_dir=PACKAGES, **extension())
