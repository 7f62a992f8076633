"""Which megatron-core runs: what pip may install, the pins for each Python, and what a run says of others."""

from __future__ import annotations

import importlib.util
import logging
import os
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_dgpo import patches

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.12", "3.13")


def supported() -> Requirement:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (megatron,) = (r for r in map(Requirement, wanted) if r.name == "megatron-core")
    return megatron


def pins(file: str, python: str) -> Iterator[Requirement]:
    """What the file has a Linux machine with this Python install."""
    environment = {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64"}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment):
                yield pin


def test_the_megatron_that_was_asked_for_is_the_one_that_runs():
    wanted = os.environ.get("MEGATRON_CORE_VERSION")
    if wanted is None:
        pytest.skip("MEGATRON_CORE_VERSION is not set (make test-mcore)")
    assert metadata.version("megatron-core") == wanted
    spec = importlib.util.find_spec("megatron.core")
    assert spec and spec.origin == str(
        metadata.distribution("megatron-core").locate_file("megatron/core/__init__.py")
    )


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.19.2", "0.19.7", "0.20.0", "0.20.0rc1", "1.0"])
def test_a_run_warns_of_a_megatron_that_pip_would_not_install(version, caplog):
    with caplog.at_level(logging.WARNING, "megatron_dgpo"):
        patches.check_megatron(version)
    said = [f"megatron-core {version} has not been tested" in text for text in caplog.messages]
    assert said == ([] if supported().specifier.contains(version, prereleases=True) else [True])


@pytest.mark.parametrize("version", ["0.9.0", "0.16.0"])
def test_a_megatron_that_is_too_old_is_refused(version):
    assert not supported().specifier.contains(version)
    with pytest.raises(
        RuntimeError, match=rf"megatron-core {version} is too old: .* needs .* 0\.16\.1 or later"
    ):
        patches.check_megatron(version)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_has_one_pin_of_each_package(python):
    for file in ("requirements-cpu.txt", "requirements-sglang-cpu.txt"):
        names = [pin.name.lower() for pin in pins(file, python)]
        assert len(names) == len(set(names)) > 90, file


@pytest.mark.parametrize("python", PYTHONS)
def test_the_newest_megatron_that_has_a_python_is_pinned_for_it(python):
    (pin,) = (pin for pin in pins("requirements-cpu.txt", python) if pin.name == "megatron-core")
    (version,) = (s.version for s in pin.specifier)
    assert version == ("0.16.1" if Version(python) < Version("3.12") else "0.19.2")  # the last for 3.11
    assert supported().specifier.contains(version)


def test_both_environments_have_the_triton_of_their_torch():
    """The registry's torch for CUDA wants this release alone; builds for CPUs want none, and say nothing."""
    for file in ("requirements-cpu.txt", "requirements-sglang-cpu.txt"):
        found = {
            pin.name: str(pin.specifier) for pin in pins(file, "3.12") if pin.name in ("torch", "triton")
        }
        assert found == {"torch": "==2.13.0", "triton": "==3.7.1"}, file
