"""Models with linear attention, with adapters, and with weights that are kept otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from test_art_on import Recorder
from test_exact import assert_same, generate, left_padded
from test_guided import GuidedRecorder
from tiny_models import PAD, VOCAB, build, prompt
from transformers import (
    AutoModelForCausalLM,
)
from transformers.models.lfm2 import Lfm2Config
from transformers.models.qwen3_next import Qwen3NextConfig

import art_torch

RULE = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
# Small enough to decide inside the windows of the tiny models.
SIZES = {"num_pinned": 1, "block_size": 16, "unit_size": 8}


# ---------------------------------------------------------------- linear attention in between


SIZES_OF_HYBRIDS = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
HYBRIDS = {
    # Convolutions only: their states can be cropped.
    "lfm2": lambda: Lfm2Config(
        **SIZES_OF_HYBRIDS | {"num_attention_heads": 2, "num_key_value_heads": 1},
        layer_types=["conv", "full_attention"] * 2,
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **SIZES_OF_HYBRIDS,
        head_dim=32,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
}


@pytest.fixture(scope="module", params=sorted(HYBRIDS))
def hybrid(request):
    torch.manual_seed(0)
    config = HYBRIDS[request.param]()
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("walk", ["sink_recent", "guided"])
def test_linear_attention(hybrid, walk):
    ids, mask = left_padded(2, 330)
    expected = generate(hybrid, ids, attention_mask=mask)
    cache = art_torch.ARTCache(hybrid.config)
    with art_torch.patch(hybrid, None, walk) as handle:
        assert_same(generate(hybrid, ids, cache, attention_mask=mask), expected)
        cache.reset()
        assert_same(generate(hybrid, ids, cache, attention_mask=mask), expected)
        alone = generate(hybrid, ids[1:, 5:], art_torch.ARTCache(hybrid.config))
    assert torch.equal(alone.sequences[:, 325:], expected.sequences[1:, 330:])
    assert handle.stats.layers == [1, 3]
    assert handle.stats.exact_fallbacks == 0
    recorder, cache = GuidedRecorder(), art_torch.ARTCache(hybrid.config)
    with art_torch.patch(hybrid, RULE, walk, on_call=recorder, block_size=16):
        generate(hybrid, ids, cache, attention_mask=mask, max_new_tokens=6)
    assert recorder.stopped > 0


def test_linear_attention_in_beams_and_copies(hybrid):
    ids = prompt(2, 90)
    options = {"num_beams": 3, "max_new_tokens": 20}
    expected = generate(hybrid, ids, **options)
    cache = art_torch.ARTCache(hybrid.config)
    with art_torch.patch(hybrid, None):
        got = generate(hybrid, ids, cache, **options)
        assert torch.equal(got.sequences, expected.sequences)
        prefix = art_torch.ARTCache(hybrid.config)
        hybrid(ids[:, :60], past_key_values=prefix)
        again = generate(hybrid, ids, copy.deepcopy(prefix))
        assert torch.equal(again.sequences, generate(hybrid, ids, prefix).sequences)
    assert torch.equal(again.sequences, generate(hybrid, ids).sequences)


def test_another_batch_after_a_reset(hybrid):
    cache = art_torch.ARTCache(hybrid.config)
    with art_torch.patch(hybrid, None):
        for batch in (2, 1, 3):
            ids = prompt(batch, 40)
            assert_same(generate(hybrid, ids, cache), generate(hybrid, ids))
            cache.reset()


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_rows_of_linear_attention(hybrid, rows):
    ids, more = prompt(3, 40), prompt(2, 6, seed=1)
    chosen = ids[rows]
    expected = hybrid(torch.cat([chosen, more], dim=1)).logits[:, 40:]
    cache = art_torch.ARTCache(hybrid.config)
    with art_torch.patch(hybrid, None):
        hybrid(ids, past_key_values=cache)
        cache.batch_select_indices(rows)
        got = [hybrid(more[:, i : i + 1], past_key_values=cache).logits for i in range(6)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-3)


def test_layers_with_attention_are_named(hybrid):
    with pytest.raises(ValueError, match=r"must name layers 1, 3 of the model, got \[2\]"):
        art_torch.patch(hybrid, RULE, per_layer={1: None, 2: None})


def test_a_refused_crop_changes_nothing():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HYBRIDS["lfm2"]()).eval()
    ids, cache = prompt(1, 40), art_torch.ARTCache(model.config)
    with art_torch.patch(model, None):
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"call activate_past_recording\(\) before"):
            cache.crop(-1)
        cache.activate_past_recording()
        model(ids[:, 20:30], past_key_values=cache)
        with pytest.raises(ValueError, match="can crop 0 to 30 tokens, got 31"):
            cache.crop(-31)
        cache.crop(-5)
        got = model(ids[:, 25:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, 25:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_linear_attention_cannot_undo(hybrid):
    ids = torch.cat([prompt(1, 30)] * 3, dim=1)
    cache = art_torch.ARTCache(hybrid.config)
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 40}
    with art_torch.patch(hybrid, None):
        if hybrid.config.model_type == "lfm2":
            got = generate(hybrid, ids, cache, **options).sequences
            assert torch.equal(got, generate(hybrid, ids, max_new_tokens=40).sequences)
            return
        hybrid(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"layers of linear attention, whose states do not"):
            cache.crop(-1)
        assert cache.get_seq_length() == 90


@pytest.mark.parametrize("walk", ["sink_recent", "guided"])
def test_graphed_decoder_with_linear_attention(hybrid, walk):
    ids, mask = left_padded(2, 330)
    options = {"attention_mask": mask, "max_new_tokens": 8}
    with art_torch.patch(hybrid, RULE, walk, block_size=16, dense_every=3) as handle:
        cache = art_torch.ARTCache(hybrid.config)
        expected = generate(hybrid, ids, cache, **options).sequences
        read = handle.stats.tokens_read()
        assert handle.stats.read_fraction() < 1.0
        decoder = art_torch.GraphedDecoder(hybrid, max_length=340)
        for _ in range(2):  # the second prompt finds the states of the first
            handle.stats.reset()
            assert torch.equal(decoder.generate(ids, **options), expected)
            assert torch.equal(handle.stats.tokens_read(), read)
        single = prompt(1, 330)  # another batch
        alone = generate(hybrid, single, art_torch.ARTCache(hybrid.config), max_new_tokens=8)
        assert torch.equal(decoder.generate(single, 8), alone.sequences)


# ---------------------------------------------------------------- adapters, quantised weights


def adapted(peft):
    """A tiny model with LoRA adapters that change it, and its wrapper."""
    model = build("llama")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    return model, peft.get_peft_model(model, settings).eval()


def test_lora_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base, model = adapted(peft)
    ids, mask = left_padded(2, 330)
    expected = generate(model, ids, attention_mask=mask)
    with model.disable_adapter():
        without = generate(model, ids, attention_mask=mask)
    assert not torch.equal(expected.sequences, without.sequences)
    with art_torch.patch(model, None) as handle:
        assert handle.model is base
        cache = art_torch.ARTCache(model.config)
        assert_same(generate(model, ids, cache, attention_mask=mask), expected)
        cache.reset()
        with model.disable_adapter():
            assert_same(generate(model, ids, cache, attention_mask=mask), without)
        for again in (model, base):
            with pytest.raises(RuntimeError, match="patched already"):
                art_torch.patch(again, None)
    assert_same(generate(model, ids, attention_mask=mask), expected)
    recorder = Recorder()
    with art_torch.patch(model, RULE, on_call=recorder, **SIZES):
        cache = art_torch.ARTCache(model.config)
        generate(model, ids, cache, attention_mask=mask, max_new_tokens=6)
    assert recorder.stopped > 0


def test_graphed_decoder_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base, model = adapted(peft)
    ids, shapes = prompt(2, 60), []
    expected = generate(model, ids, max_new_tokens=6).sequences
    with art_torch.patch(model, None):
        base.lm_head.register_forward_hook(lambda _module, _args, out: shapes.append(out.shape[1]))
        got = art_torch.GraphedDecoder(model, max_length=70).generate(ids, 6)
    assert torch.equal(got, expected)
    assert shapes == [1] * 6  # of the prompt as well, only the last token has logits
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(build("llama"), settings).eval()
    with pytest.raises(ValueError, match=r"has virtual tokens of peft"):
        art_torch.GraphedDecoder(model, max_length=70)


def test_weights_quantised_by_torchao():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = build("llama")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    before = [name for name, p in model.named_parameters() if type(p) is not torch.nn.Parameter]
    ids, mask = left_padded(2, 330)
    expected = generate(model, ids, attention_mask=mask)
    with art_torch.patch(model, None):
        cache = art_torch.ARTCache(model.config)
        assert_same(generate(model, ids, cache, attention_mask=mask), expected)
    assert before == [n for n, p in model.named_parameters() if type(p) is not torch.nn.Parameter]
    with art_torch.patch(model, RULE, **SIZES) as handle:
        generate(model, ids, art_torch.ARTCache(model.config), attention_mask=mask)
    assert handle.stats.read_fraction() < 1.0


@pytest.mark.parametrize("walk", ["sink_recent", "guided"])
def test_weights_offloaded_to_disk(tmp_path, walk):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    ids, mask = left_padded(2, 330)
    expected = generate(build("llama"), ids, attention_mask=mask)
    model = accelerate.disk_offload(build("llama"), tmp_path, execution_device="cpu")
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    sizes = {"walk": walk, "block_size": 16}
    with art_torch.patch(model, None, **sizes):
        cache = art_torch.ARTCache(model.config)
        assert_same(generate(model, ids, cache, attention_mask=mask), expected)
    with art_torch.patch(model, RULE, **sizes) as handle:
        generate(model, ids, art_torch.ARTCache(model.config), attention_mask=mask)
    assert handle.stats.read_fraction() < 1.0
