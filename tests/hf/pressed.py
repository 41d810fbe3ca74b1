"""Presses of kvpress on small models, and what kvpress gives without art_torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from test_exact import generate
from tiny_models import TINY, build
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from art_torch.integrations.kvpress import compatible

if importlib.util.find_spec("kvpress") is None:
    pytest.skip("kvpress is not installed (docs/kvpress.md)", allow_module_level=True)

HEADS, HEAD_DIM = 2, 32
PROMPT = 200


@contextmanager
def imported_kvpress() -> Iterator[object]:
    """kvpress wraps all attention functions when it is imported: inside of this only."""
    own, imported = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), "kvpress" in sys.modules
    import kvpress

    if imported:
        kvpress.patch_attention_functions()
    try:
        yield kvpress
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping = own


def press_of(name: str, ratio: float = 0.5):
    """A press by name; windows are small, as the prompts are short."""
    import kvpress

    makers = {
        "streaming_llm": kvpress.StreamingLLMPress,
        "snapkv": lambda ratio: kvpress.SnapKVPress(ratio, window_size=16),
        "pyramidkv": lambda ratio: kvpress.PyramidKVPress(ratio, window_size=16),
        "knorm": kvpress.KnormPress,
        "expected_attention": kvpress.ExpectedAttentionPress,
        "adakv_snapkv": lambda ratio: kvpress.AdaKVPress(press_of("snapkv", ratio)),
        "adakv_expected": lambda ratio: kvpress.AdaKVPress(press_of("expected_attention", ratio)),
    }
    return makers[name](ratio)


UNIFORM = ["streaming_llm", "snapkv", "knorm", "expected_attention"]
HEAD_WISE = ["adakv_snapkv", "adakv_expected"]
PRESSES = [*UNIFORM, "pyramidkv", *HEAD_WISE]


def masked_sdpa(module, query, key, value, mask, dropout=0.0, scaling=None, **_):
    """Attention without the keys that AdaKV masks: kvpress itself does not always find its fake."""
    if query.shape[2] == key.shape[2]:
        module.masked_key_indices = None
    shape = query.shape[0], key.shape[1], query.shape[2], key.shape[2]
    visible = torch.ones(shape, dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    if getattr(module, "masked_key_indices", None) is not None:
        rows, heads, tokens = module.masked_key_indices
        visible[rows, heads, :, tokens] = False
    group = query.shape[1] // key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(group, 1),
        value.repeat_interleave(group, 1),
        visible.repeat_interleave(group, 1),
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def make(name: str, attention: str = "sdpa", **changes):
    """A tiny model of its own; ``changes`` are of its config."""
    if not changes:
        model = build(name)
    else:
        torch.manual_seed(0)
        config = TINY[name]()
        config.update(changes)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
    model.config._attn_implementation = attention
    return model


@contextmanager
def attention_of(model, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    yield
    model.config._attn_implementation = before


def alone(model, press, ids, **kwargs):
    """What kvpress gives with transformers' own cache."""
    head_wise = type(press).__name__ == "AdaKVPress"
    name = "masked_sdpa" if head_wise else model.config._attn_implementation
    known = mock.patch.dict(AttentionInterface._global_mapping, masked_sdpa=masked_sdpa)
    with known, attention_of(model, name), compatible(model), press(model):
        return generate(model, ids, DynamicCache(config=model.config), **kwargs)
