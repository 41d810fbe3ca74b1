"""Tests of what only a GPU has: streams, graphs, several thread blocks at one sequence."""

import pytest
import torch


@pytest.fixture
def gpu(monkeypatch, no_hang):
    """The GPU as programs use it: without the checks that wait for it."""
    monkeypatch.delenv("ART_CHECKED", raising=False)
    return torch.device("cuda", torch.cuda.current_device())
