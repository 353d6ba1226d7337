"""Packaging: `pip install -c constraints.txt -e .` gives the libraries `megallm` and `megallm_kernels` and the command.

The folder kernels/ is a source root and not a package: its content is installed as `megallm_kernels`.

No compiler is needed. Where there is one for C++, csrc/cpu_*.cpp become `megallm_kernels._cpu`; where there is none, or
it fails, `pip install -v .` shows why, and the rest is installed. `MEGALLM_BUILD_CUDA=1 pip install .` also builds the
rest of csrc/ with nvcc, as `megallm_kernels._compiled`, for the architectures in MEGALLM_CUDA_ARCHS (default "80;90a":
A100, and H100 or H200) and, as PTX, for newer ones, or fails and says why.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent

# Triton publishes wheels for Linux on these two machines only; elsewhere the plain torch ops serve.
TRITON = 'triton>=3.6; platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")'

BUILD_CUDA = os.environ.get("MEGALLM_BUILD_CUDA", "0")
CUDA_ARCHS = os.environ.get("MEGALLM_CUDA_ARCHS", "80;90a")


def read_version() -> str:
    """The version that megallm/__init__.py states."""
    match = re.search(r'__version__ = "([^"]+)"', (ROOT / "megallm" / "__init__.py").read_text(encoding="utf-8"))
    if match is None:
        raise ValueError("megallm/__init__.py states no __version__")
    return match.group(1)


CUDA_MODULE, CPU_MODULE = "megallm_kernels._compiled", "megallm_kernels._cpu"

CPU_OPTIONS = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-g0", "-w"]
"""Instruction sets are chosen at run time: one build serves every machine of an architecture. -ffp-contract=off is
what makes them agree to the bit."""


def cpu_part() -> Extension:
    """The extension over csrc/cpu_*, which may fail to build."""
    sources = sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("cpu_*.cpp"))
    headers = sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("cpu_*.h"))
    return Extension(CPU_MODULE, sources=sources, depends=headers, language="c++", optional=True)


def compiled_part() -> list[Extension]:
    """The extension over the rest of csrc/, where MEGALLM_BUILD_CUDA asks for it."""
    if BUILD_CUDA in ("", "0"):
        return []
    if BUILD_CUDA != "1":
        raise SystemExit(f"MEGALLM_BUILD_CUDA is {BUILD_CUDA!r}: set it to 1 to build the CUDA kernels, or unset it")
    files = sorted(path for path in (ROOT / "csrc").iterdir() if not path.name.startswith("cpu_"))
    sources = [f"csrc/{path.name}" for path in files if path.suffix in (".cpp", ".cu")]
    headers = [f"csrc/{path.name}" for path in files if path.suffix in (".h", ".cuh")]
    return [Extension(CUDA_MODULE, sources=sources, depends=headers)]


def find_nvcc() -> str:
    """The path of nvcc."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if found is None:
        where = f"{home}/bin (CUDA_HOME)" if home else "PATH"
        raise SystemExit(
            f"MEGALLM_BUILD_CUDA=1 asks for the CUDA kernels in csrc/, and nvcc is not in {where}: install the CUDA "
            "toolkit (12.0 or newer), or point CUDA_HOME to it, or unset MEGALLM_BUILD_CUDA to install without them"
        )
    return found


def code_names() -> list[str]:
    """What nvcc makes for CUDA_ARCHS: machine code for each, and PTX of the highest, which newer GPUs translate."""
    archs = [arch for arch in re.split(r"[;, ]+", CUDA_ARCHS) if arch]
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong or not archs:
        raise SystemExit(f"MEGALLM_CUDA_ARCHS is {CUDA_ARCHS!r}: write numbers such as 80;90a")
    highest = max(int(arch.rstrip("af")) for arch in archs)  # PTX of 90a would run on nothing but 90
    return [*(f"sm_{arch}" for arch in archs), f"compute_{highest}"]


def architecture_options(names: list[str]) -> list[str]:
    """nvcc's options for `code_names`."""
    return [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in names]


class BuildParts(build_ext):
    """Builds the CPU's part with the compiler that setuptools finds, the CUDA part with nvcc alone."""

    def build_extension(self, ext: Extension) -> None:
        """One module."""
        if ext.name == CUDA_MODULE:
            self.build_with_nvcc(ext)
        else:
            self.build_for_cpu(ext)

    def build_for_cpu(self, ext: Extension) -> None:
        """With OpenMP, or, where the compiler has none, for one thread; else CompileError, which setuptools prints."""
        try:
            import pybind11
        except ImportError as error:
            raise CompileError(f"{ext.name} needs pybind11: {error}") from error
        ext.include_dirs = [pybind11.get_include()]
        for openmp in (["-fopenmp"], []):
            ext.extra_compile_args, ext.extra_link_args = CPU_OPTIONS + openmp, openmp
            try:
                super().build_extension(ext)
                return
            except Exception as error:  # of the compiler and of the linker: setuptools has a class for each
                print(f"{ext.name} does not build with {openmp or 'no threads'}: {error}", flush=True)
                failed = error
        raise CompileError(f"{ext.name} does not build, so AdamW on the CPU is left to torch: {failed}")

    def build_with_nvcc(self, ext: Extension) -> None:
        """One object a source, all at a time; then the module. The CUDA runtime is linked in, so that it loads without
        a GPU."""
        import pybind11

        nvcc, code = find_nvcc(), code_names()
        archs = architecture_options(code)
        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        options = ["-std=c++20", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *archs, *includes]
        options.append(f"-DMEGALLM_CODE={':'.join(code)}")
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)

        def compile_source(source: str) -> str:
            out = str(objects / f"{Path(source).name}.o")
            self.run_nvcc([nvcc, *options, "-c", str(ROOT / source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_source, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.run_nvcc([nvcc, "-shared", "-cudart=static", *archs, "-o", str(target), *compiled])

    def run_nvcc(self, command: list[str]) -> None:
        """Runs it; its report (registers, spills) is printed."""
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(" ".join(command), done.stdout, sep="\n", flush=True)
        if done.returncode != 0:
            raise SystemExit(f"the CUDA kernels do not build (exit code {done.returncode}), nvcc said:\n{done.stdout}")


setup(
    name="megallm",
    version=read_version(),
    description="Trains large language models end to end on any 3D layout of ranks",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["megallm", "megallm.*"]),
        *find_packages(where="kernels", include=["megallm_kernels", "megallm_kernels.*"]),
    ],
    package_dir={"megallm": "megallm", "megallm_kernels": "kernels/megallm_kernels"},
    package_data={"megallm.ops": ["*.csv"]},
    ext_modules=[*compiled_part(), cpu_part()],
    cmdclass={"build_ext": BuildParts},
    install_requires=[
        "torch>=2.11",
        TRITON,
        "numpy",
        "safetensors",
        "tokenizers",
        "pyyaml",
        "matplotlib",
        "jinja2>=3.1.6",
    ],
    extras_require={
        "test": ["pybind11>=2.12", "pytest", "pytest-xdist", "ruff", "mypy", "transformers", "types-PyYAML", "psutil"],
    },
    entry_points={"console_scripts": ["megallm = megallm.cli.main:main"]},
)
