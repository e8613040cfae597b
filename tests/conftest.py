"""Fixtures and options of all tests. Without a GPU it chooses Triton's interpreter, before the kernels are imported."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import profiles
from hypothesis import settings

from pmpo_kernels import LossConfig
from pmpo_kernels.impls import IMPLS
from pmpo_kernels.verification import configurations

settings.load_profile("ci")
CONFIGURATIONS = configurations()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-peers", action="store_true", help="fail, not skip, where TRL, verl or Liger is missing")
    parser.addoption("--at-once", action="store_true", help="show a failure when it happens too: a run may be killed")
    parser.addoption(
        "--isolated", action="store_true", help="also build and install the package as pip does, with its requirements"
    )


class AtOnce:
    """Shows failures as they happen, also those of pytest-xdist's processes."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            terminal = self.config.pluginmanager.getplugin("terminalreporter")
            terminal.write_line(f"\n{report.nodeid}\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("at_once") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(AtOnce(config))
    missing = [name for name in ("trl", "peft", "verl", "liger_kernel") if importlib.util.find_spec(name) is None]
    if config.getoption("require_peers") and missing:
        raise pytest.UsageError(f"--require-peers: expected {', '.join(missing)} to be installed")


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation that must agree with the float64 reference."""
    return str(request.param)


@pytest.fixture
def device(impl: str) -> str:
    return device_of(impl)


@pytest.fixture(params=list(CONFIGURATIONS))
def config(request: pytest.FixtureRequest) -> LossConfig:
    """The presets and a few configurations beyond them."""
    return CONFIGURATIONS[request.param]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("isolated") and not config.getoption("isolated"):
            item.add_marker(pytest.mark.skip(reason="downloads, or takes minutes: make package"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # its keywords have the names of folders too
            item.add_marker(pytest.mark.skip(reason="no GPU is visible to PyTorch"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if profiles.cases:
        name = settings.get_current_profile_name()
        terminalreporter.write_line(f"property tests: {profiles.cases.total()} generated cases, profile {name}")
