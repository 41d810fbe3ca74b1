"""Fixtures of the operator tests."""

import faulthandler

import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key

HANG_SECONDS = 300

# On a machine with a GPU every operator test runs on both; without one there is nothing to skip.
DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Every device that has kernels."""
    if request.param == "cuda":
        request.getfixturevalue("no_hang")
        # Indices on a GPU are only checked on request.
        monkeypatch.setenv("ART_CHECKED", "1")
    return torch.device(request.param)


@pytest.fixture
def no_hang(request):
    """End the process when a GPU does not answer: nothing inside Python can."""
    stderr = request.config.stash[fault_handler_stderr_fd_key]  # the one that is not captured
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def one_thread():
    """One thread during the test: small inputs gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def report(request):
    """Add a line to what pytest prints at the end."""

    def add(line):
        # A property of the test, for these also arrive from the processes of pytest-xdist.
        request.node.user_properties.append(("figure", line))

    return add


def pytest_addoption(parser):
    parser.addoption(
        "--name-failures",
        action="store_true",
        help="name a test as soon as it fails: a long run that is cut off still tells",
    )


class FailureNames:
    """Names tests when they fail, and not only at the end."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            reason = getattr(report.longrepr, "reprcrash", None)
            what = reason.message.splitlines()[0] if reason and reason.message else report.when
            terminal.write_line(f"\nFAILED {report.nodeid}: {what}")


def pytest_configure(config):
    if config.getoption("--name-failures") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailureNames(config))


def pytest_terminal_summary(terminalreporter):
    """Print figures that tests bound but that are worth seeing."""
    reports = [report for some in terminalreporter.stats.values() for report in some]
    figures = [
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "figure"
    ]
    if figures:
        terminalreporter.section("figures")
    for figure in figures:
        terminalreporter.write_line(figure)
