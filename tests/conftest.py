"""Fixtures of the operator tests."""

import pytest
import torch

REPORT = pytest.StashKey[list]()


# On a machine with a GPU every operator test runs on both; without one there is nothing to skip.
DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Every device that has kernels."""
    if request.param == "cuda":
        # Indices on a GPU are only checked on request.
        monkeypatch.setenv("ART_CHECKED", "1")
    return torch.device(request.param)


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
    lines = request.config.stash.setdefault(REPORT, [])
    return lines.append


def pytest_terminal_summary(terminalreporter, config):
    """Print figures that tests bound but that are worth seeing."""
    for i, line in enumerate(config.stash.get(REPORT, [])):
        if i == 0:
            terminalreporter.section("figures")
        terminalreporter.write_line(line)
