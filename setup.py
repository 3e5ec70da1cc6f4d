"""Builds `qkernels._native` from csrc/ with ninja. Everything else about the package is in pyproject.toml.

Each file of csrc/cpu is compiled once for every tier with that tier's instruction flags; dispatch.cc picks one at run
time. torch is not needed. Without a C++ compiler the package installs all the same and runs on the reference backend.
`CXX`, `CXXFLAGS` and `LDFLAGS` are honoured, for example `CXXFLAGS="-fsanitize=address" LDFLAGS="-fsanitize=address"`.
For development: `python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
TIERS = {"scalar": []}
if X86:
    AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]
    TIERS["avx2"] = AVX2
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"]
    TIERS["avx512vnni"] = [*AVX2, *AVX512]
# Instructions that a tier may use in one file, behind a check of its own.
MORE = {("attention_bf16", "avx512vnni"): ["-mavx512bf16"]}
# GCC 12 warns about its own AVX-512 headers.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# No contraction: a fused multiply-add happens exactly where the code says so, in every tier.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-unused-function",
]


def compiler() -> list[str] | None:
    """The C++ compiler as a command, or None where there is none."""
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        return command if shutil.which(command[0]) else None
    return next(([found] for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def has_openmp(cxx: list[str], directory: Path) -> bool:
    """Whether `-fopenmp` compiles and links (a bare clang++ may lack it)."""
    directory.mkdir(parents=True, exist_ok=True)
    source, binary = directory / "openmp.cc", directory / "openmp"
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    run = subprocess.run([*cxx, "-fopenmp", str(source), "-o", str(binary)], capture_output=True)
    return run.returncode == 0


def escape(path: Path | str) -> str:
    """A path as ninja's syntax wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(words: list[str]) -> str:
    """Words as one shell command inside a ninja variable."""
    return shlex.join(words).replace("$", "$$")


def ninja_file(cxx: list[str], target: Path, objects: Path, openmp: bool) -> str:
    """The text of build.ninja: one object a source and tier, then one shared library."""
    import pybind11

    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    link = shlex.split(os.environ.get("LDFLAGS", ""))
    parallel = ["-fopenmp"] if openmp else []
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {quote(cxx)}",
        f"flags = {quote([*FLAGS, *parallel, *extra])}",
        f"link = {quote(['-shared', *parallel, *undefined, *link])}",
        "rule compile",
        "  command = $cxx $flags $tier -MMD -MF $out.d -c $in -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $link -o $out",
        "  description = link $out",
    ]
    built = []

    def compile_one(source: Path, name: str, tier: list[str]) -> None:
        built.append(objects / name)
        lines.extend([f"build {escape(built[-1])}: compile {escape(source)}", f"  tier = {quote(tier)}"])

    compile_one(ROOT / "csrc/bindings.cc", "bindings.o", python)
    compile_one(ROOT / "csrc/cpu/dispatch.cc", "dispatch.o", [])
    for source in sorted((ROOT / "csrc/cpu").glob("*.cc")):
        if source.name != "dispatch.cc":
            for tier, flags in TIERS.items():
                more = [*MORE.get((source.stem, tier), []), *QUIET, f"-DQK_TIER={tier}", f"-DQK_TIER_{tier}"]
                compile_one(source, f"{source.stem}.{tier}.o", [*flags, *more])
    lines.append(f"build {escape(target)}: link {' '.join(map(escape, built))}")
    lines.append(f"default {escape(target)}")
    return "\n".join(lines) + "\n"


def ninja_command() -> list[str]:
    """Ninja from its Python package where installed, else from PATH."""
    import importlib.util

    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if found := shutil.which("ninja"):
        return [found]
    raise SystemExit("qkernels: ninja was not found; install it (`pip install ninja pybind11`) or build with isolation")


class BuildNative(build_ext):
    """build_ext that hands the whole extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        cxx = compiler()
        if cxx is None:
            # Optional from here on: setuptools then accepts that there is no file. A compiler that fails stays an
            # error.
            ext.optional = True
            self.warn(
                "qkernels: no C++ compiler was found (set CXX, or install g++ or clang++), so the native kernels are "
                "not built and the slow reference backend will run"
            )
            return
        objects = Path(self.build_temp).resolve() / "qkernels"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        openmp = has_openmp(cxx, objects)
        if not openmp:
            self.warn(f"qkernels: {cxx[0]} has no OpenMP, so the kernels will run on one thread")
        (objects / "build.ninja").write_text(ninja_file(cxx, target, objects, openmp))
        subprocess.run([*ninja_command(), "-C", str(objects)], check=True)


sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cc"))]
headers = [
    str(path.relative_to(ROOT)) for pattern in ("*.h", "*.def") for path in sorted((ROOT / "csrc").rglob(pattern))
]
setup(ext_modules=[Extension("qkernels._native", sources, depends=headers)], cmdclass={"build_ext": BuildNative})
