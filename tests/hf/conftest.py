from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_models import TINY, build
from transformers import PreTrainedModel


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices gain little from threads, and lose a lot to those that share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _without_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], PreTrainedModel]:
    """Tiny random models by name, each built once; a test must leave them unpatched."""
    built: dict[str, PreTrainedModel] = {}

    def get(name: str) -> PreTrainedModel:
        if name not in built:
            built[name] = build(name)
        model = built[name]
        assert model.config._attn_implementation == "eager"
        return model

    return get


@pytest.fixture(scope="session")
def tiny_on_gpu() -> Callable[[str], PreTrainedModel]:
    """Tiny random models by name on the GPU, float32 and eager, each built once."""
    built: dict[str, PreTrainedModel] = {}

    def get(name: str) -> PreTrainedModel:
        if name not in built:
            model = build(name)
            if hasattr(model, "_can_set_experts_implementation") and (
                model._can_set_experts_implementation()
            ):
                model.set_experts_implementation("eager")
            built[name] = model.to("cuda")
        return built[name]

    return get


@pytest.fixture(params=sorted(TINY))
def any_tiny(request: pytest.FixtureRequest, tiny: Callable[[str], PreTrainedModel]):
    return tiny(request.param)
