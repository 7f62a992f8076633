"""The package and its C++ extension; build, lint and test settings are in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension("megatron_dgpo.data._packing", ["megatron_dgpo/data/_packing.cpp"], cxx_std=17)
    ],
    cmdclass={"build_ext": build_ext},
)
