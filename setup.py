"""Builds the two torch-free native modules with CMake and Ninja; everything else stands in pyproject.toml.

``pip install`` degrades: a module that cannot be built is left out, and the reason with the tail of the log goes into
``recmas_kernels/_build.json``, which ``python -m recmas_kernels.info`` shows. ``python setup.py build_ext`` is for people
who want the modules, so there a failure is an error; so is it anywhere under RECMAS_BUILD_CPU=1 / RECMAS_BUILD_CUDA=1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LOG_TAIL_LINES = 40


class BuildFailure(Exception):
    """A module that should have been built was not; ``log`` holds what the tools printed."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


class NotWanted(Exception):
    """A module that nobody asked for and this machine cannot build, or that was switched off."""


class NativeModule(Extension):
    """``recmas_kernels._<name>``, built by the CMake project in ``folder``, governed by RECMAS_BUILD_<NAME>."""

    def __init__(self, name: str, folder: str) -> None:
        super().__init__(f"recmas_kernels._{name}", sources=[])
        self.short_name = name
        self.folder = ROOT / folder
        self.switch_name = f"RECMAS_BUILD_{name.upper()}"

    @property
    def switch(self) -> str:
        value = os.environ.get(self.switch_name) or "auto"
        if value not in ("auto", "0", "1"):
            raise SystemExit(f"{self.switch_name}: expected auto, 0 or 1, got {value!r}")
        return value


def find_tool(name: str) -> str:
    """Path of cmake or ninja: from the Python package of that name, else from PATH."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        bin_dir = getattr(__import__(name), f"{name.upper()}_BIN_DIR" if name == "cmake" else "BIN_DIR")
        candidate = shutil.which(name, path=bin_dir)
        if candidate is not None:
            return candidate
    candidate = shutil.which(name)
    if candidate is None:
        raise BuildFailure(f"no {name}: neither the Python package nor a program on PATH")
    return candidate


def find_nvcc() -> str:
    """CUDACXX, else CUDA_HOME, else PATH, else the usual folder. A CUDACXX that does not exist means none."""
    if os.environ.get("CUDACXX"):
        chosen = shutil.which(os.environ["CUDACXX"])
        if chosen is None:
            raise NotWanted(f"no nvcc: CUDACXX={os.environ['CUDACXX']} is no program")
        return chosen
    folders = [
        os.path.join(os.environ.get("CUDA_HOME", ""), "bin"),
        os.environ.get("PATH", ""),
        "/usr/local/cuda/bin",
    ]
    chosen = shutil.which("nvcc", path=os.pathsep.join(folders))
    if chosen is None:
        raise NotWanted("no nvcc: looked at CUDACXX, CUDA_HOME, PATH and /usr/local/cuda")
    return chosen


def run(command: list[str], step: str) -> str:
    """Output of ``command``; BuildFailure with that output if it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode != 0:
        raise BuildFailure(f"{step} failed: {first_error(done.stdout)}", done.stdout)
    return done.stdout


def first_error(log: str) -> str:
    """The line of a build log that tells a reader most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join(lines[index : index + 4])[:300]
        if "error:" in line or "fatal error" in line:
            return line[:300]
    return (lines[-1] if lines else "no output")[:300]


class CMakeBuild(build_ext):
    """Builds what can be built, records the outcome, and drops the rest from the distribution."""

    def run(self) -> None:
        outcomes: dict[str, dict[str, object]] = {}
        built, loud = [], []
        for module in self.extensions:
            target = Path(self.get_ext_fullpath(module.name)).resolve()
            try:
                outcomes[module.short_name] = self.build_module(module, target)
                built.append(module)
            except (BuildFailure, NotWanted) as problem:
                # A module whose rebuild failed must not live on: it would run older code than its sources.
                target.unlink(missing_ok=True)
                failed = isinstance(problem, BuildFailure)
                log = getattr(problem, "log", "").splitlines()[-LOG_TAIL_LINES:]
                outcomes[module.short_name] = {
                    "status": "failed" if failed else "skipped",
                    "reason": str(problem),
                    "log": log,
                }
                print(f"recmas_kernels._{module.short_name} not built: {problem}", file=sys.stderr)
                asked = module.switch == "1" or "build_ext" in self.distribution.commands
                if module.switch == "1" or (failed and asked):
                    loud.append(f"{module.name}: {problem}\n" + "\n".join(log))
        self.extensions = built
        record = Path(self.get_ext_fullpath("recmas_kernels._build")).resolve().parent / "_build.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
        if loud:
            raise SystemExit("\n".join(loud))

    def build_module(self, module: NativeModule, target: Path) -> dict[str, object]:
        """Configures and builds one CMake project and puts its module at ``target``."""
        if module.switch == "0":
            raise NotWanted(f"switched off by {module.switch_name}=0")
        if not (module.folder / "CMakeLists.txt").is_file():
            raise BuildFailure(
                f"{module.folder.relative_to(ROOT)}/CMakeLists.txt is missing from these sources"
            )
        arguments = []
        if module.short_name == "cuda":
            arguments.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
            if os.environ.get("RECMAS_CUDA_ARCHS"):
                archs = os.environ["RECMAS_CUDA_ARCHS"].replace(",", " ").replace(";", " ").split()
                arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(archs)}")
        compiler = os.environ.get("CXX", "").split()
        if compiler and shutil.which(compiler[0]) is None:
            raise BuildFailure(f"no C++ compiler: CXX={compiler[0]} is no program")

        import pybind11

        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        build_dir = Path(self.build_temp).resolve() / module.short_name
        output_dir = build_dir / "module"
        build_dir.mkdir(parents=True, exist_ok=True)
        log = run(
            [
                cmake,
                *("-S", str(module.folder), "-B", str(build_dir), "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}",
                "-DPYBIND11_FINDPYTHON=ON",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *arguments,
            ],
            "configuration",
        )
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        log += run(
            [cmake, "--build", str(build_dir), "--target", f"_{module.short_name}", *jobs], "compilation"
        )
        products = sorted(output_dir.glob(f"_{module.short_name}.*"))
        if not products:
            raise BuildFailure(f"the build made no _{module.short_name} module", log)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, so that a process which has the old module mapped keeps its own copy.
        partial = target.with_name(target.name + ".partial")
        shutil.copy2(products[0], partial)
        os.replace(partial, target)
        compilers = [
            line.removeprefix("-- The ") for line in log.splitlines() if "compiler identification is" in line
        ]
        return {"status": "built", "file": target.name, "compilers": compilers}


setup(
    packages=find_packages(include=["recmas_kernels*"]) + find_packages("python", include=["recmas*"]),
    package_dir={"recmas": "python/recmas"},
    package_data={"recmas_kernels": ["py.typed"], "recmas": ["py.typed"]},
    ext_modules=[NativeModule("cpu", "csrc"), NativeModule("cuda", "csrc/cuda")],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
