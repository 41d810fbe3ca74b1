"""What is left of a patch when it ends, whatever happened to the model meanwhile."""

import copy
import pickle

import pytest
from test_patch import traces_of_patching
from tiny_models import build

import art_torch
from art_torch.integrations import continuous_batching


@pytest.fixture
def model():
    return build("llama")


def test_a_shared_generation_config_is_restored_by_the_last(model):
    other = build("llama")
    other.generation_config = model.generation_config
    first, second = art_torch.patch(model, None), art_torch.patch(other, None)
    first.unpatch()
    assert model.generation_config.disable_compile is True
    second.unpatch()
    assert not model.generation_config.disable_compile


def test_what_was_set_meanwhile_stays(model):
    with art_torch.patch(model, None):
        model.set_attn_implementation("eager")
        model.generation_config.disable_compile = False
    assert model.config._attn_implementation == "eager"
    assert model.generation_config.disable_compile is False


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_a_patched_model_is_not_copied(model, copied):
    with art_torch.patch(model, None) as handle:
        for patched in (model, handle):
            with pytest.raises(TypeError, match=r"unpatch\(\) it first"):
                copied(patched)
    copied(model)


def test_unpatching_ends_continuous_batching(model):
    before = traces_of_patching(model)
    handle = art_torch.patch(model, None)
    enabled = continuous_batching.enable(handle)
    handle.unpatch()
    assert not enabled.active
    assert traces_of_patching(model) == before
    enabled.disable()
    with art_torch.patch(model, None) as handle, continuous_batching.enable(handle):
        pass
    assert traces_of_patching(model) == before


def test_a_handle_is_entered_once(model):
    with art_torch.patch(model, None) as handle:
        with pytest.raises(RuntimeError, match="in a with block already"), handle:
            pass
        assert handle.active
    with pytest.raises(RuntimeError, match=r"call art_torch\.patch again"), handle:
        pass
