"""``generate`` on a GPU compiles the step of an ARTCache of fixed capacity, into CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from test_compiled_generate import PATCHES, assert_one_graph, fixed
from test_exact import generate, left_padded
from tiny_models import build, prompt
from torch._dynamo.utils import counters
from transformers import CompileConfig

import art_torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch, no_hang):
    monkeypatch.delenv("ART_CHECKED", raising=False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tokens_of_eager_steps(name, kind):
    model = build(name).to("cuda")
    ids, mask = (tensor.to("cuda") for tensor in left_padded(3, 200))
    options = {"attention_mask": mask, "max_new_tokens": 20}
    config = CompileConfig(fullgraph=True, mode="reduce-overhead")
    compiling = {"compile_config": config, "disable_compile": False}
    with art_torch.patch(model, **PATCHES[kind]) as handle:
        expected = generate(model, ids, art_torch.ARTCache(model.config), **options).sequences
        read = handle.stats.tokens_read()
        for _ in range(2):
            handle.stats.reset()
            got = generate(model, ids, fixed(model), **options, **compiling).sequences
            assert torch.equal(got, expected)
            assert torch.equal(handle.stats.tokens_read(), read)
        assert_one_graph()
    # Tensors that graphs write to keep their place, or there would be no graphs.
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_what_generate_does_by_itself():
    """Without a config of the user's."""
    model, ids = build("llama").to("cuda"), prompt(2, 150).to("cuda")
    expected = generate(model, ids, max_new_tokens=12).sequences
    with art_torch.patch(model, None):
        got = generate(model, ids, fixed(model), max_new_tokens=12, disable_compile=False)
    assert torch.equal(got.sequences, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
