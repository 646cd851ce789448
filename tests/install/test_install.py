"""Installing works under isolation, from a wheel, without a compiler, without nvcc; a module asked for must build."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.install.environments import NO_COMPILER, NO_NVCC, NOWHERE, Environment, copy_sources, quick_compiler, run

LEFT_OUT = {f"RECMAS_BUILD_{module}": "0" for module in ("TENSORS", "CPU", "CUDA")}
EXTENSION_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
REFERENCE_FORWARD = (
    "import torch, recmas_kernels as r; link = r.FusedRecursiveLink.inner(8); "
    "y = link(torch.randn(3, 8)); y.sum().backward(); assert y.shape == (3, 8)"
)


def test_wheel_from_sdist_under_isolation(
    environment: Environment, sources: Path, quick: dict[str, str], tmp_path: Path
) -> None:
    packed = run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path / "sdist"], sources, {})
    assert packed.returncode == 0, packed.output
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed_files = {name.partition("/")[2] for name in files.getnames()}
    # What is compiled for CUDA is there as well; from these very files `make install` has built it.
    assert {str(file.relative_to(sources)) for file in (sources / "csrc").rglob("*")} <= packed_files
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path / "wheel", archive]
    built = run(command, tmp_path, quick | NO_NVCC)
    assert built.returncode == 0, built.output
    (wheel,) = (tmp_path / "wheel").glob("recmas_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"recmas_kernels/_{module}{EXTENSION_SUFFIX}" for module in ("tensors", "cpu")} <= set(names)
    assert {"recmas_kernels/_build.json", "recmas_kernels/py.typed", "recmas/py.typed"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"recmas_kernels", "recmas"}, "nothing else leaks in"
    shutil.rmtree(sources)
    outcome = environment.pip_install(wheel)
    assert outcome.returncode == 0, outcome.output
    info = environment.info()
    assert Path(info["folder"]).is_relative_to(environment.folder)
    for name in ("tensors", "cpu"):
        assert info["modules"][name]["status"] == "built"
        assert info["modules"][name]["loads"]
    assert info["instruction_set"]["used"]
    assert info["chosen"]["cpu"]["link_fwd"]["float32 x 8"] == "cpu"
    assert environment.run("-c", REFERENCE_FORWARD).returncode == 0
    assert environment.run("-m", "recmas", "--help").returncode == 0


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """An editable install without nvcc, and with kernels that do not compile; what looks at tensors does."""
    folder = tmp_path_factory.mktemp("partial")
    environment, sources = Environment(folder), copy_sources(folder / "sources")
    header = sources / "csrc" / "cpu" / "kernels.h"  # of every file of theirs: none is compiled to its end
    header.write_text('#error "these kernels cannot compile"\n', encoding="utf-8")
    outcome = environment.pip_install("-e", sources, **quick_compiler(folder), **NO_NVCC)
    assert outcome.returncode == 0, outcome.output
    return environment, sources


def test_editable_without_nvcc(partial: tuple[Environment, Path]) -> None:
    """The kernels do not serve here: `make install`, before any test, has built them in place, and under isolation."""
    environment, sources = partial
    info = environment.info()
    assert Path(info["folder"]) == sources / "recmas_kernels"
    assert info["modules"]["tensors"]["status"] == "built"
    assert info["modules"]["tensors"]["loads"]
    assert info["modules"]["cuda"]["status"] == "skipped"
    assert NOWHERE in info["modules"]["cuda"]["reason"]
    assert environment.run("-m", "recmas", "--help").returncode == 0
    assert (environment.folder / "bin" / "recmas").is_file()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """An editable install without a compiler, over modules that an earlier build had left."""
    folder = tmp_path_factory.mktemp("bare")
    environment, sources = Environment(folder), copy_sources(folder / "sources")
    built = [f"_{module}{EXTENSION_SUFFIX}" for module in ("tensors", "cpu", "cuda")]
    for name in (*built, "_cpu.another-python.so"):
        (sources / "recmas_kernels" / name).write_bytes(b"built from older sources")
    outcome = environment.pip_install("-e", sources, **NO_COMPILER)
    assert outcome.returncode == 0, outcome.output
    return environment, sources


def test_without_a_compiler_the_reference_serves(bare: tuple[Environment, Path]) -> None:
    environment, _ = bare
    info = environment.info()
    for module in info["modules"].values():
        assert module["status"] == "failed"
        assert not module["loads"]
        assert NOWHERE in module["reason"]
    assert info["instruction_set"]["used"] is None
    assert set(info["chosen"]["cpu"]["link_fwd"].values()) == {"reference"}
    forward = environment.run("-c", REFERENCE_FORWARD)
    assert forward.returncode == 0, forward.output


def test_a_stale_module_goes_when_its_rebuild_fails(bare: tuple[Environment, Path]) -> None:
    _, sources = bare
    left = {file.name for file in (sources / "recmas_kernels").glob("*.so")}
    assert left == {"_cpu.another-python.so"}, "another interpreter's module is not this build's to remove"


def test_importing_the_package_loads_nothing_compiled(bare: tuple[Environment, Path]) -> None:
    environment, sources = bare
    stale = sources / "recmas_kernels" / f"_cpu{EXTENSION_SUFFIX}"
    stale.write_bytes(b"would raise if it were loaded")
    script = "import sys, recmas_kernels; assert not {'triton', 'transformers'} & set(sys.modules)"
    outcome = environment.run("-c", script)
    stale.unlink()
    assert outcome.returncode == 0, outcome.output


def test_a_module_whose_build_fails_leaves_its_log_and_takes_no_other_down(partial: tuple[Environment, Path]) -> None:
    """The kernels do not compile, and ``info`` has the reason and the end of the log; what looks at tensors serves."""
    environment, _ = partial
    modules = environment.info()["modules"]
    assert modules["cpu"]["status"] == "failed"
    assert "these kernels cannot compile" in modules["cpu"]["reason"]
    assert modules["cpu"]["log"][-1].startswith("ninja: build stopped")
    assert modules["tensors"]["loads"]
    looked = "from recmas_kernels.backends import tensors; assert tensors._native() is not None; "
    forward = environment.run("-c", looked + REFERENCE_FORWARD)
    assert forward.returncode == 0, forward.output


@pytest.mark.parametrize(("module", "broken"), [("tensors", NO_COMPILER), ("cpu", NO_COMPILER), ("cuda", NO_NVCC)])
def test_a_module_that_was_asked_for_must_build(
    environment: Environment, sources: Path, module: str, broken: dict[str, str]
) -> None:
    switches = LEFT_OUT | {f"RECMAS_BUILD_{module.upper()}": "1"}
    outcome = environment.pip_install("-e", sources, **switches, **broken)
    assert outcome.returncode != 0
    assert f"recmas_kernels._{module} not built" in outcome.output
    assert NOWHERE in outcome.output


def test_a_switch_must_be_known(sources: Path) -> None:
    outcome = run([sys.executable, "setup.py", "build_ext"], sources, {"RECMAS_BUILD_CPU": "yes"})
    assert outcome.returncode != 0
    assert outcome.output.strip().splitlines()[-1] == "RECMAS_BUILD_CPU: expected auto, 0 or 1, got 'yes'"


def test_build_ext_is_loud_without_a_compiler(sources: Path) -> None:
    outcome = run([sys.executable, "setup.py", "build_ext", "--inplace"], sources, NO_COMPILER)
    assert outcome.returncode != 0
    assert "no C++ compiler: CXX=/nonexistent is no program" in outcome.output


def test_build_ext_does_not_expect_cuda_without_nvcc(sources: Path) -> None:
    """Nor what is switched off; why each is absent stays on record."""
    switches = {"RECMAS_BUILD_TENSORS": "0", "RECMAS_BUILD_CPU": "0", **NO_NVCC}
    outcome = run([sys.executable, "setup.py", "build_ext", "--inplace"], sources, switches)
    assert outcome.returncode == 0, outcome.output
    found = json.loads((sources / "recmas_kernels" / "_build.json").read_text(encoding="utf-8"))
    assert {module["status"] for module in found.values()} == {"skipped"}
    assert "RECMAS_BUILD_CPU=0" in found["cpu"]["reason"]
    assert NOWHERE in found["cuda"]["reason"]
