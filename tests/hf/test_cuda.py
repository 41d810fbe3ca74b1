"""Patched models and their cache on a GPU."""

from __future__ import annotations

import inspect

import pytest
import test_art_cache
import test_art_on
import test_exact
import test_guided
import test_guided_mass
import torch
from cases import Inputs
from contract import Tally, check
from test_art_on import CRITERION, SIZES
from test_exact import assert_same, cache_of, generate
from tiny_models import LAYERS, SHARING, TINY
from tiny_models import prompt as prompt_on_cpu
from transformers import AutoModelForCausalLM

import art_torch
from art_torch.integrations.transformers import plan

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda")
# What sdpa computes exactly; softcaps and sinks need eager attention.
SDPA = ("llama", "mistral", "qwen3", "gemma3", "phi3")
FEW = ("llama", "gemma2", "gpt_oss")


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch, no_hang):
    monkeypatch.delenv("ART_CHECKED", raising=False)


def prompt(*args, **kwargs):
    return prompt_on_cpu(*args, **kwargs).to(GPU)


def left_padded(batch, tokens):
    ids, mask = test_exact.left_padded(batch, tokens)
    return ids.to(GPU), mask.to(GPU)


def wide_model(head_dim, dtype, attention="sdpa"):
    """A llama whose heads are as wide as those the tensor cores are used for."""
    config = TINY["llama"]()
    config.head_dim = head_dim
    config.num_attention_heads = 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    return model.to(device=GPU, dtype=dtype).eval()


class Recorder:
    """Checks every call of the operator against the reference, on copies."""

    def __init__(self):
        self.tally, self.stopped, self.calls = Tally(), 0, []

    def __call__(self, layer, arguments, result):
        assert all(tensor.is_cuda for tensor in result)
        options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        names = ("query", "key_cache", "value_cache", "block_table", "seq_lens")
        tensors = tuple(options.pop(name) for name in names)
        criterion = options.pop("criterion")
        self.tally += check(Inputs(tensors, options), criterion, result)
        self.stopped += int((result.stop_block >= 0).sum())
        self.calls.append((layer, result.tokens_read.cpu()))


# ---------------------------------------------------------------- without a rule


@pytest.mark.parametrize("kind", ["art", "dynamic", "static"])
@pytest.mark.parametrize("name", SDPA)
def test_without_a_rule_the_tokens_are_those_of_sdpa(name, kind, tiny_on_gpu):
    model = tiny_on_gpu(name)
    model.set_attn_implementation("sdpa")
    try:
        for ids, options in (
            (prompt(1, 90), {}),
            (prompt(1, 700), {}),
            (left_padded(4, 90)[0], {"attention_mask": left_padded(4, 90)[1]}),
        ):
            expected = generate(model, ids, **options)
            with art_torch.patch(model, None) as handle:
                got = generate(model, ids, cache_of(kind, model, length=760), **options)
            assert_same(got, expected)
            assert got.sequences.is_cuda
            assert handle.stats.exact_fallbacks == 0
            assert handle.stats.read_fraction() == 1.0
    finally:
        model.set_attn_implementation("eager")


# Tests of the CPU that make all their tensors from prompt().
AGAIN = [
    (test_exact.test_greedy, {"kind": "art"}),
    (test_exact.test_greedy, {"kind": "dynamic_without_config"}),
    (test_exact.test_left_padded_batch, {"kind": "art"}),
    (test_exact.test_left_padded_batch, {"kind": "static"}),
    (test_exact.test_beam_search, {"kind": "art"}),
    (test_exact.test_prompt_lookup, {}),
    (test_exact.test_two_turns, {}),
    (test_exact.test_crop_and_continue, {}),
    (test_exact.test_step_by_step_without_a_mask, {}),
    (test_exact.test_pad_as_a_new_token, {}),
    (test_art_cache.test_reorder, {}),
    (test_art_cache.test_batch_select_indices, {"rows": torch.tensor([3, 1])}),
    (
        test_art_cache.test_batch_select_indices,
        {"rows": torch.tensor([True, False, True, True])},
    ),
    (test_art_cache.test_batch_repeat_interleave, {}),
    (test_art_cache.test_reset_and_reuse, {}),
    (test_art_cache.test_a_copied_prefix, {}),
    (test_art_cache.test_chunked_prefill, {}),
    (test_guided.test_greedy, {"tokens": 330, "key_codes": False}),
    (test_guided.test_batch_of_different_lengths, {}),
    (test_guided.test_beam_search, {}),
    (test_guided.test_prompt_lookup, {}),
    (test_guided.test_two_turns_and_reset, {}),
]
OF_ONE_MODEL = [
    (test_art_cache.test_lengths_and_masks, {}),
    (test_art_cache.test_crop_takes_negative_numbers, {}),
    (test_art_cache.test_crop_of_a_window_that_moved_on, {}),
    (test_art_cache.test_another_batch_needs_a_reset, {}),
    (test_art_on.test_skip_layers_and_per_layer, {}),
    (test_art_on.test_two_models_with_different_settings, {}),
    (test_guided.test_a_cache_that_is_there_already, {}),
    (test_guided.test_keys_written_by_others, {}),
    (test_guided.test_exact_layers_take_no_codes, {}),
    (test_guided_mass.test_measured_mass, {}),
    *((test_exact.test_layers_that_share_keys, {"name": name, "kind": kind})
      for name in sorted(SHARING) for kind in ("art", "dynamic")),
]  # fmt: skip


def case_id(case):
    return "-".join([case[0].__name__.removeprefix("test_"), *map(str, case[1].values())])


@pytest.fixture
def on_the_gpu(monkeypatch):
    """Tests of other files work with tensors on the GPU."""
    for module in (test_exact, test_art_cache, test_art_on, test_guided, test_guided_mass):
        monkeypatch.setattr(module, "prompt", prompt)


@pytest.mark.parametrize("case", AGAIN, ids=case_id)
@pytest.mark.parametrize("name", FEW)
@pytest.mark.usefixtures("on_the_gpu")
def test_again(name, case, tiny_on_gpu):
    function, arguments = case
    assert inspect.signature(function).parameters.keys() == {"any_tiny", *arguments}
    function(any_tiny=tiny_on_gpu(name), **arguments)


@pytest.mark.parametrize("case", OF_ONE_MODEL, ids=case_id)
@pytest.mark.usefixtures("on_the_gpu")
def test_again_with_a_certain_model(case, tiny_on_gpu):
    function, arguments = case
    function(tiny=tiny_on_gpu, **arguments)


def test_two_turns_of_a_ragged_batch(tiny_on_gpu):
    """Pads inside the text are not stored."""
    model = tiny_on_gpu("mistral")
    ids, mask = left_padded(3, 80)
    mask[1, -20:] = 0
    more = prompt(3, 50, seed=1)
    both, full = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)

    def talk(cache):
        model(ids, attention_mask=mask, past_key_values=cache)
        return generate(model, both, cache, attention_mask=full)

    expected = talk(cache_of("dynamic", model))
    cache = cache_of("art", model)
    with art_torch.patch(model, None):
        assert_same(talk(cache), expected)
    for table in cache.tables.values():
        assert table.seq_lens.is_cuda
        assert table.seq_lens.tolist() == [n + test_exact.TOKENS - 1 for n in (130, 105, 60)]


# ---------------------------------------------------------------- with a rule


@pytest.mark.parametrize("walk", ["sink_recent", "oldest_first"])
@pytest.mark.parametrize("kind", ["art", "dynamic", "static"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_calls_agree_with_the_reference(name, kind, walk, tiny_on_gpu):
    model, recorder = tiny_on_gpu(name), Recorder()
    ids, mask = left_padded(2, 330)
    cache = cache_of(kind, model, length=340)
    with art_torch.patch(model, CRITERION, walk=walk, on_call=recorder, **SIZES) as handle:
        generate(model, ids, cache, attention_mask=mask, max_new_tokens=4)
    assert len(recorder.calls) == 3 * LAYERS
    assert recorder.stopped > 0
    assert handle.stats.exact_fallbacks == 0
    assert handle.stats.steps == 3
    assert handle.stats.read_fraction() < 1.0
    read = [sum(t.sum(0) for i, t in recorder.calls if i == layer) for layer in range(LAYERS)]
    assert torch.equal(handle.stats.tokens_read(), torch.stack(read))


class GuidedRecorder(Recorder):
    """Checks every call with the walk that the codes give at that time."""

    def __call__(self, layer, arguments, result):
        super().__call__(layer, test_guided.with_explicit_walk(arguments), result)


def test_guiding_begins_where_it_pays(tiny_on_gpu):
    """The GPU says from how many bytes on, and 500 tokens of a tiny model are far below."""
    model = tiny_on_gpu("llama")
    multiprocessors = torch.cuda.get_device_properties(GPU).multi_processor_count
    assert plan.least_guided_bytes(GPU) == 1_000_000 * multiprocessors
    for always in (False, True):
        cache = art_torch.ARTCache(model.config)
        options = {"block_size": 16, "exact_where_faster": not always}
        with art_torch.patch(model, test_guided.RULE, walk="guided", **options) as handle:
            generate(model, prompt(1, 500), cache)
        assert (handle.stats.read_fraction() < 1.0) == always


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("name", sorted(TINY))
def test_guided_calls_agree_with_the_reference(name, page_size, tiny_on_gpu):
    model, recorder = tiny_on_gpu(name), GuidedRecorder()
    ids, mask = left_padded(2, 500)
    cache = art_torch.ARTCache(model.config, page_size)
    rule = test_guided.RULE
    options = {"on_call": recorder, "block_size": 16, "exact_where_faster": False}
    with art_torch.patch(model, rule, walk="guided", **options) as handle:
        generate(model, ids, cache, attention_mask=mask, max_new_tokens=6)
    assert len(recorder.calls) == 5 * LAYERS
    assert handle.stats.exact_fallbacks == 0
    test_guided.assert_full_layers_stop(model, recorder, handle)


@pytest.mark.parametrize("kind", ["art", "dynamic"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_types(dtype, head_dim, kind, report):
    model, recorder = wide_model(head_dim, dtype), Recorder()
    ids, mask = left_padded(3, 900)
    mask[2, 400:430] = 0 if kind == "art" else 1  # pads inside the text
    rule = art_torch.Stability(0.1, 5e-3, 2)
    with art_torch.patch(model, rule, on_call=recorder) as handle:
        cache = cache_of(kind, model)
        generate(model, ids, cache, attention_mask=mask, max_new_tokens=6)
    assert len(recorder.calls) == 5 * LAYERS
    assert recorder.stopped > 0
    assert handle.stats.exact_fallbacks == 0
    assert 0 < handle.stats.read_fraction() < 1
    if kind == "art":
        assert all(layer.storage.key_cache.dtype == dtype for layer in cache.layers)
    report(f"{dtype}, heads of {head_dim}: {recorder.tally.inside} of {recorder.tally.pairs} "
           f"decisions inside the margin, {recorder.stopped} stopped")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_edits_of_the_cache_in_every_type(dtype):
    """What is copied, shared, cropped and selected is what was stored, bit by bit."""
    model = wide_model(128, dtype)
    ids, more = prompt(2, 150), prompt(4, 5, seed=1)
    with art_torch.patch(model, None):
        cache = art_torch.ARTCache(model.config, page_size=16)

        def stored():
            return [x.storage.gather(x.table.history_slots(0, 150)) for x in cache.layers]

        model(ids, past_key_values=cache)
        before = stored()
        cache.batch_repeat_interleave(2)
        model(more, past_key_values=cache)
        cache.crop(-5)
        cache.reorder_cache(torch.tensor([2, 0, 3, 1], device=GPU))
        for i in range(5):
            model(more[:, i : i + 1], past_key_values=cache)
        for layer_before, layer_after in zip(before, stored(), strict=True):
            for a, b in zip(layer_before, layer_after, strict=True):
                assert torch.equal(a[[1, 0, 1, 0]], b)


def test_memory_limit_is_half_of_the_gpu(tiny_on_gpu):
    model = tiny_on_gpu("llama")
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, None):
        model(prompt(1, 20), past_key_values=cache)
    total = torch.cuda.get_device_properties(GPU).total_memory
    assert cache.budget.limit(GPU) == pytest.approx(total / 2, rel=0.05)
    small = art_torch.ARTCache(model.config, max_bytes=100_000)
    with art_torch.patch(model, None), pytest.raises(MemoryError, match="pass a larger max_bytes"):
        model(prompt(1, 2000), past_key_values=small)


def test_stats_can_be_shown(tiny_on_gpu, tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    model = tiny_on_gpu("llama")
    with art_torch.patch(model, CRITERION, **SIZES) as handle:
        generate(model, prompt(2, 300), art_torch.ARTCache(model.config), max_new_tokens=4)
    handle.stats.summary()
    assert "3 decode steps" in capsys.readouterr().out
    handle.stats.plot(tmp_path / "read.png")
    assert (tmp_path / "read.png").stat().st_size > 1000
    steps, present = handle.stats.per_step(0)
    assert steps.shape == (3, 2)
    assert present.tolist() == [2 * n for n in (301, 302, 303)]
