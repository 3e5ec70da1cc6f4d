"""Builds `qkernels._native` and `qkernels._cuda` from csrc/ with ninja. Everything else is in pyproject.toml.

Each file of csrc/cpu is compiled once for every tier with that tier's instruction flags; dispatch.cc picks one at run
time. torch is not needed. Without a C++ compiler the package installs all the same and runs on the reference backend.
`CXX`, `CXXFLAGS` and `LDFLAGS` are honoured, for example `CXXFLAGS="-fsanitize=address" LDFLAGS="-fsanitize=address"`.
For development: `python setup.py build_ext --inplace`.

The CUDA kernels (csrc/cuda) are a shared library without Python, torch or driver behind it, built where nvcc 12.5 or
newer is found (CUDA_HOME, PATH, /usr/local/cuda*) and works. `QKERNELS_CUDA=0` leaves them out.
"""

from __future__ import annotations

import filecmp
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Object files of every kind of installation. setuptools' own folder for an editable one is new each time, and so is the
# environment of an isolated build: nothing that ninja compares may name either, or each install compiles everything.
BUILD = ROOT / "build/native"
MACHINE = platform.machine().lower()
TIERS = {"scalar": []}
if MACHINE in ("x86_64", "amd64"):
    AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]
    TIERS["avx2"] = AVX2
    TIERS["avxvnni"] = [*AVX2, "-mavxvnni", "-DQK_TIER_avx2"]
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"]
    TIERS["avx512vnni"] = [*AVX2, *AVX512]
elif MACHINE in ("aarch64", "arm64"):
    TIERS["neon"] = ["-march=armv8.2-a+dotprod"]
# Files of a tier that is another one (avx2) but for products of int8: QK_PRODUCT in ops.def.
ONLY = {"avxvnni": ("int8_linear", "int4_linear", "peak")}
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

CUDA_VERSION = (12, 5)  # the oldest nvcc with all that csrc/cuda uses
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
CUDA_FLAGS += ["-Xptxas", "-warn-spills,-warn-lmem-usage"]
# sm_80 code runs on every 8.x, and its PTX on what is newer than 9.0; sm_90a has no successor. A source whose name ends
# in _sm80 or _sm90 holds kernels of that target only, and is compiled for nothing else.
SM80 = ["-gencode", "arch=compute_80,code=[sm_80,compute_80]"]
SM90 = ["-gencode", "arch=compute_90a,code=sm_90a"]


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


def pybind11_headers() -> Path:
    """A copy of pybind11's headers whose place and times stay while their content does."""
    import pybind11

    source, copy = Path(pybind11.get_include()), BUILD / "include"
    for header in source.rglob("*.h"):
        there = copy / header.relative_to(source)
        if not there.is_file() or not filecmp.cmp(header, there, shallow=False):
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, there)
    return copy


def ninja_file(cxx: list[str], target: Path, objects: Path, openmp: bool) -> str:
    """The text of build.ninja: one object per source and tier, then one shared library."""
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    link = shlex.split(os.environ.get("LDFLAGS", ""))
    parallel = ["-fopenmp"] if openmp else []
    python = [f"-I{pybind11_headers()}", f"-I{sysconfig.get_path('include')}"]
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
                if source.stem not in ONLY.get(tier, (source.stem,)):
                    continue
                more = [*MORE.get((source.stem, tier), []), *QUIET, f"-DQK_TIER={tier}", f"-DQK_TIER_{tier}"]
                compile_one(source, f"{source.stem}.{tier}.o", [*flags, *more])
    lines.append(f"build {escape(target)}: link {' '.join(map(escape, built))}")
    lines.append(f"default {escape(target)}")
    return "\n".join(lines) + "\n"


def cuda_compiler(directory: Path) -> tuple[str, str | None]:
    """(nvcc, None), or ("", why there is none that works)."""
    if os.environ.get("QKERNELS_CUDA") == "0":
        return "", "QKERNELS_CUDA=0 is set"
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    names = [str(home / "bin/nvcc") for home in homes] + ["nvcc"]
    names += [str(path) for path in sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True)]
    nvcc = next((found for name in names if (found := shutil.which(name))), None)
    if nvcc is None:
        return "", "no nvcc was found (set CUDA_HOME, or install the CUDA toolkit)"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < CUDA_VERSION:
        found = f"release {version[1]}.{version[2]}" if version else "of unknown version"
        return "", f"{nvcc} is {found}, and {CUDA_VERSION[0]}.{CUDA_VERSION[1]} or newer is needed"
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / "probe.cu"
    probe.write_text("#include <cuda_fp16.h>\n__global__ void probe(float* x) { *x = 1.0f; }\n")
    run = subprocess.run(
        [nvcc, *CUDA_FLAGS, *SM90, "-c", str(probe), "-o", f"{probe}.o"], capture_output=True, text=True
    )
    if run.returncode:
        line = next((line for line in (run.stderr + run.stdout).splitlines() if line.strip()), "it said nothing")
        return "", f"{nvcc} cannot compile an empty kernel: {line.strip()}"
    return nvcc, None


def cuda_ninja_file(nvcc: str, target: Path, objects: Path) -> str:
    """The text of build.ninja: one object per file of csrc/cuda, then one shared library."""
    lines = [
        "ninja_required_version = 1.3",
        f"nvcc = {quote([nvcc])}",
        f"flags = {quote(CUDA_FLAGS)}",
        "rule compile",
        "  command = $nvcc $flags $target -MMD -MF $out.d -c $in -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc $flags -shared $in -o $out",
        "  description = link $out",
    ]
    built = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        built.append(objects / f"{source.stem}.o")
        chips = SM80 if source.stem.endswith("_sm80") else SM90 if source.stem.endswith("_sm90") else [*SM80, *SM90]
        lines.extend([f"build {escape(built[-1])}: compile {escape(source)}", f"  target = {quote(chips)}"])
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
    """build_ext that hands each whole extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        objects = BUILD / ext.name.replace(".", "/")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        library = objects / target.name
        text = self.cuda(library, objects) if ext.name == "qkernels._cuda" else self.native(library, objects)
        if text is None:
            # Optional from here on: setuptools then accepts that there is no file. A compiler that fails stays an
            # error.
            ext.optional = True
            return
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(text)
        subprocess.run([*ninja_command(), "-C", str(objects)], check=True)
        if target.is_file() and filecmp.cmp(library, target, shallow=False):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.part")
        shutil.copy(library, fresh)
        fresh.replace(target)  # a process that runs the old library keeps it

    def native(self, target: Path, objects: Path) -> str | None:
        cxx = compiler()
        if cxx is None:
            self.warn(
                "qkernels: no C++ compiler was found (set CXX, or install g++ or clang++), so the native kernels are "
                "not built and the slow reference backend will run"
            )
            return None
        openmp = has_openmp(cxx, objects)
        if not openmp:
            self.warn(f"qkernels: {cxx[0]} has no OpenMP, so the kernels will run on one thread")
        return ninja_file(cxx, target, objects, openmp)

    def cuda(self, target: Path, objects: Path) -> str | None:
        nvcc, reason = cuda_compiler(objects)
        if reason is not None:
            self.warn(f"qkernels: {reason}, so the CUDA kernels are not built; everything else is")
            return None
        return cuda_ninja_file(nvcc, target, objects)


def files(directory: str, *patterns: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for p in patterns for path in sorted((ROOT / directory).rglob(p))]


extensions = [Extension("qkernels._native", files("csrc", "*.cc"), depends=files("csrc", "*.h", "*.def"))]
if kernels := files("csrc/cuda", "*.cu"):
    extensions.append(Extension("qkernels._cuda", kernels, depends=files("csrc/cuda", "*.h", "*.def")))
setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative})
