"""Builds the three torch-free native modules with CMake and Ninja; everything else stands in pyproject.toml.

``pip install`` degrades: a module that cannot be built is left out, and the reason with the tail of the log goes
into ``recmas_kernels/_build.json``, which ``python -m recmas_kernels.info`` shows. ``python setup.py build_ext`` is
for people who want the modules, so there a failure is an error; so is it under RECMAS_BUILD_TENSORS=1,
RECMAS_BUILD_CPU=1 or RECMAS_BUILD_CUDA=1 (0 leaves the module out). RECMAS_CUDA_ARCHS, RECMAS_WERROR and MAX_JOBS go to
CMake as they are.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LOG_TAIL_LINES = 40
# Where the Python packages of these programs keep them.
TOOL_FOLDER_ATTRIBUTE = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}
# By its path: importing the package would need torch.
sources_digest = runpy.run_path(str(ROOT / "recmas_kernels" / "sources.py"))["digest"]


class Unbuilt(Exception):
    """Why a module was not built. ``expected``: nobody asked for it, or this machine was never going to have it."""

    def __init__(self, reason: str, log: str = "", expected: bool = False) -> None:
        super().__init__(reason)
        self.log = log.splitlines()[-LOG_TAIL_LINES:]
        self.expected = expected


class NativeModule(Extension):
    """``recmas_kernels._<label>``, built by the CMake project in ``folder``; RECMAS_BUILD_<LABEL> is its switch."""

    def __init__(self, label: str, folder: str) -> None:
        super().__init__(f"recmas_kernels._{label}", sources=[])
        self.label = label
        self.folder = ROOT / folder
        variable = f"RECMAS_BUILD_{label.upper()}"
        self.switch = os.environ.get(variable) or "auto"
        if self.switch not in ("auto", "0", "1"):
            raise SystemExit(f"{variable}: expected auto, 0 or 1, got {self.switch!r}")


def find_tool(name: str) -> str:
    """Path of cmake or ninja: from the Python package of that name, else from PATH."""
    try:
        folder = getattr(importlib.import_module(name), TOOL_FOLDER_ATTRIBUTE[name], None)
    except ModuleNotFoundError:
        folder = None
    found = (folder and shutil.which(name, path=folder)) or shutil.which(name)
    if not found:
        raise Unbuilt(f"no {name}: neither its Python package nor a program on PATH")
    return found


def find_nvcc() -> str:
    """CUDACXX if it is set, even if that names nothing; else CUDA_HOME, PATH, and the usual folder."""
    chosen = os.environ.get("CUDACXX")
    if chosen:
        if not shutil.which(chosen):
            raise Unbuilt(f"no nvcc: CUDACXX={chosen} is no program", expected=True)
        return chosen
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    found = shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if not found:
        raise Unbuilt("no nvcc: none in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda", expected=True)
    return found


def find_pybind11() -> str:
    try:
        return importlib.import_module("pybind11").get_cmake_dir()
    except ModuleNotFoundError as error:
        raise Unbuilt("no pybind11: install it beside this Python") from error


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "").split()
    if compiler and not shutil.which(compiler[0]):
        raise Unbuilt(f"no C++ compiler: CXX={compiler[0]} is no program")


def run(step: str, command: list[str]) -> str:
    """What ``command`` printed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        raise Unbuilt(f"{step} failed: {first_error(done.stdout)}", done.stdout)
    return done.stdout


def first_error(log: str) -> str:
    """The part of a build log that tells a reader most, in one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no output"]
    for index, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join(lines[index : index + 4])[:300]
        if "error:" in line or "fatal error" in line:
            return line[:300]
    return lines[-1][:300]


def compiler_names(build_folder: Path) -> list[str]:
    """Such as ``GNU 12.2.0``, from what CMake noted when it examined them."""
    noted = [path.read_text(encoding="utf-8") for path in build_folder.glob("CMakeFiles/*/CMake*Compiler.cmake")]
    pattern = re.compile(r'set\(CMAKE_(?:CXX|CUDA)_COMPILER_(?:ID|VERSION) "(.+)"\)')
    return sorted(" ".join(pattern.findall(text)) for text in noted)


class CMakeBuild(build_ext):
    """Builds the modules that can be built, records the outcome, and drops the others from the distribution."""

    def run(self) -> None:
        outcomes: dict[str, dict[str, object]] = {}
        built: list[Extension] = []
        errors: list[str] = []
        targets = [Path(self.get_ext_fullpath(module.name)).resolve() for module in self.extensions]
        # All at once: nvcc takes one core for a single file, and configuring hardly one. MAX_JOBS bounds one build.
        with ThreadPoolExecutor(1 if os.environ.get("MAX_JOBS") else len(self.extensions)) as pool:
            builds = [pool.submit(self.build_module, *pair) for pair in zip(self.extensions, targets, strict=True)]
        for module, target, build in zip(self.extensions, targets, builds, strict=True):
            try:
                outcomes[module.label] = build.result()
                built.append(module)
            except Unbuilt as problem:
                # An older module must not live on: it would run other code than these sources.
                target.unlink(missing_ok=True)
                status = "skipped" if problem.expected else "failed"
                outcomes[module.label] = {"status": status, "reason": str(problem), "log": problem.log}
                print(f"{module.name} not built: {problem}", file=sys.stderr)
                direct = "build_ext" in self.distribution.commands
                if module.switch == "1" or (direct and not problem.expected):
                    errors.append("\n".join([f"{module.name} not built: {problem}", *problem.log]))
        self.extensions = built
        record = Path(self.get_ext_fullpath("recmas_kernels._build")).resolve().with_name("_build.json")
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
        if errors:
            raise SystemExit("\n".join(errors))

    def build_module(self, module: NativeModule, target: Path) -> dict[str, object]:
        """Configures and builds one CMake project and puts its module at ``target``."""
        if module.switch == "0":
            raise Unbuilt(f"switched off by RECMAS_BUILD_{module.label.upper()}=0", expected=True)
        check_compiler()
        definitions = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "RECMAS_WERROR": os.environ.get("RECMAS_WERROR") or "OFF",
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": find_pybind11(),
        }
        if module.label == "cuda":
            definitions["CMAKE_CUDA_COMPILER"] = find_nvcc()
            if archs := os.environ.get("RECMAS_CUDA_ARCHS"):
                definitions["CMAKE_CUDA_ARCHITECTURES"] = archs
        # Settings that CMake would take from its cache, or refuse to change, get a folder of their own.
        variables = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "CUDAFLAGS")]
        settings = repr((str(module.folder), variables, sorted(definitions.items())))
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        build_folder = Path(self.build_temp).resolve() / f"{module.label}-{digest}"
        product_folder = build_folder / "module"
        definitions["CMAKE_LIBRARY_OUTPUT_DIRECTORY"] = str(product_folder)
        definitions["RECMAS_SOURCES"] = sources_digest(module.label)
        cmake = find_tool("cmake")
        log = run(
            "configuration",
            [cmake, "-S", str(module.folder), "-B", str(build_folder), "-G", "Ninja"]
            + [f"-D{name}={value}" for name, value in definitions.items()],
        )
        jobs = os.environ.get("MAX_JOBS")
        log += run(
            "compilation",
            [cmake, "--build", str(build_folder), "--target", f"_{module.label}"]
            + (["--parallel", jobs] if jobs else []),
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old module mapped keeps its copy.
        partial = target.with_name(target.name + ".partial")
        shutil.copy2(product_folder / target.name, partial)
        os.replace(partial, target)
        compilers = compiler_names(build_folder)
        return {"status": "built", "file": target.name, "compilers": compilers}


setup(
    packages=find_packages(include=["recmas_kernels*"]) + find_packages("python", include=["recmas*"]),
    package_dir={"recmas": "python/recmas"},
    package_data={"recmas_kernels": ["py.typed"], "recmas": ["py.typed", "serving/page.html"]},
    ext_modules=[
        NativeModule("tensors", "csrc/python"),
        NativeModule("cpu", "csrc"),
        NativeModule("cuda", "csrc/cuda"),
    ],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
