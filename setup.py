"""The folder-to-package map and the optional C++ extension; everything else is in pyproject.toml."""

import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

PACKAGE_DIR = {
    "maskgit": "maskgit",
    "maskgit.adapters": "maskgit/adapters",
    "maskgit.kernels": "maskgit/kernels",
    "maskgit.kernels.common": "kernels/common",
    "maskgit.kernels.decode_step": "kernels/decode_step",
    "maskgit.kernels.head_sample": "kernels/head_sample",
    "maskgit.kernels.attention": "kernels/attention",
    "maskgit.kernels.residual_norm": "kernels/residual_norm",
    "maskgit.benchmarks": "benchmarks",
}

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


def xla_headers():
    """Where jaxlib has XLA's headers: in the environment that is installed into, if it is there."""
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        include = Path(site) / "jaxlib" / "include"
        if (include / "xla" / "ffi" / "api" / "ffi.h").is_file():
            return [str(include)]
    print("maskgit: jaxlib is missing, the C++ backend will not serve jitted JAX", file=sys.stderr)
    return []


def extension():
    """The extension and its build step, or nothing where pybind11 is missing."""
    try:
        from pybind11.setup_helpers import Pybind11Extension, build_ext
        from setuptools.errors import CompileError
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
                flags = extra + ISA_FLAGS.get(isa, [])
                try:
                    plain(obj, src, ext_name, cc_args, flags, pp_opts)
                except CompileError:
                    if isa != "ffi":
                        raise
                    print("maskgit: XLA's headers do not compile, building without them")
                    plain(obj, src, ext_name, cc_args, [*flags, "-UMASKGIT_WITH_FFI"], pp_opts)

            self.compiler._compile = compile_one
            super().build_extension(ext)

    common = ["bindings", "dispatch", "ffi", "select", "thread_pool"]
    includes = xla_headers()
    if includes:
        macros.append(("MASKGIT_WITH_FFI", None))
    sources = [f"csrc/{name}.cpp" for name in common + [f"decode_step_{isa}" for isa in isas]]
    module = Pybind11Extension(
        "maskgit._C",
        sources,
        depends=[str(p) for p in Path("csrc").glob("*.h")],
        define_macros=macros,
        include_dirs=includes,
        cxx_std=17,
        extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wno-psabi", "-pthread"],
        extra_link_args=["-pthread"],
        optional=True,  # a machine without a compiler gets the other backends
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildPerIsa}}


setup(packages=list(PACKAGE_DIR), package_dir=PACKAGE_DIR, **extension())
