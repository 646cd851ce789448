"""What ``recmas_kernels`` exports: complete, documented, and nothing by accident."""

from __future__ import annotations

import inspect
import typing

import recmas_kernels
from recmas_kernels import Norm, version


def test_every_exported_name_exists_and_is_documented():
    for name in recmas_kernels.__all__:
        value = getattr(recmas_kernels, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
            assert not name.startswith("_"), name
    assert recmas_kernels.__all__ == sorted(recmas_kernels.__all__)


def test_nothing_else_is_public():
    public = {name for name, value in vars(recmas_kernels).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public <= set(recmas_kernels.__all__)


def test_signatures_need_public_names_only():
    parameters = inspect.signature(recmas_kernels.recursive_link).parameters
    assert parameters["norm_in"].annotation == "Norm | None"
    assert typing.get_origin(Norm) is tuple


def test_the_version_stands_in_one_place():
    assert recmas_kernels.__version__ is version.__version__
