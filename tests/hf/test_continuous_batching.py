"""``generate_batch`` with ART: its tokens, and what the operator is given."""

from __future__ import annotations

import pytest
import torch
from batched import NEW_TOKENS, PAGE, answers, batching, enabled, generated, prompts_of
from test_art_on import CRITERION, SIZES, Recorder
from tiny_models import LAYERS, PAD, build, prompt
from transformers import CompileConfig, GenerationConfig
from transformers.generation.continuous_batching import PagedAttentionCache, initialization

import art_torch
from art_torch.integrations import continuous_batching
from art_torch.integrations.transformers import paged_step
from art_torch.integrations.transformers.paged_codes import PagedCodes

NAMES = ["llama", "qwen3", "mistral", "gemma3", "gpt_oss"]


@pytest.mark.parametrize(
    ("name", "implementation"),
    # gpt_oss has no sdpa attention in transformers.
    [(name, "eager") for name in NAMES] + [(name, "sdpa") for name in NAMES if name != "gpt_oss"],
)
def test_tokens_without_a_criterion(name, implementation):
    model, prompts = build(name), prompts_of(5, 40, 100, 17, 1)
    model.set_attn_implementation(implementation)
    stock = answers(model, prompts)
    with enabled(model, None) as (handle, passes):
        got = answers(model, prompts)
    assert got == stock == generated(model, prompts)
    assert passes.mixed > 0
    assert handle.stats.layers == list(range(LAYERS))
    assert handle.stats.read_fraction() == 1.0
    assert handle.stats.exact_fallbacks == 0


def test_more_requests_than_fit(tiny):
    model = tiny("llama")
    prompts = prompts_of(60, 71, 82, 93, 104, 65, 76, 87, 98)
    expected = generated(model, prompts)
    with enabled(model, None) as (_, passes):
        assert answers(model, prompts, num_blocks=20) == expected
    assert 1 < max(map(len, passes.lens)) < len(prompts)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_shared_prefixes(tiny, name):
    model = tiny(name)
    start = prompt(1, 5 * PAGE, seed=3)[0].tolist()
    # The last one is there already but for one token.
    prompts = [[*start, 5, 6, 7], [*start, 8, 9], [*start, 5, 6, 7], [*start, 11]]
    expected = generated(model, prompts)
    with enabled(model, None) as (_, passes):
        got = answers(model, prompts, max_requests_per_batch=1)
    assert got == expected
    computed = sum(map(sum, passes.lens))
    every = sum(map(len, prompts)) + len(prompts) * (NEW_TOKENS - 1)
    # Only models without a sliding window share.
    assert computed == every if name == "gemma3" else computed <= every - 3 * 5 * PAGE + 1


def test_forked_requests(tiny):
    """Several answers to one prompt share its pages."""
    model, prompts = tiny("llama"), prompts_of(70)
    expected = generated(model, prompts)
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        eos_token_id=-1,
        pad_token_id=PAD,
        num_return_sequences=3,
        do_sample=True,
        top_k=1,
    )
    with enabled(model, None) as (_, passes):
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching()
        )
    assert passes.lens[-1] == [1, 1, 1]
    assert outputs  # transformers 5.17 returns the first only
    assert all(output.generated_tokens == expected[0] for output in outputs.values())


def in_pool(cache, tensor):
    pools = cache.key_cache + cache.value_cache if hasattr(cache, "key_cache") else [
        next(iter(cache.cache_allocators.values())).cache_tensor
    ]  # fmt: skip
    return tensor.untyped_storage().data_ptr() in {
        pool.untyped_storage().data_ptr() for pool in pools
    }


@pytest.mark.parametrize("walk", ["sink_recent", "oldest_first", "recent_first"])
@pytest.mark.parametrize("name", NAMES)
def test_calls_agree_with_the_reference(tiny, name, walk):
    model, recorder, problems = tiny(name), Recorder(), []

    def on_call(layer, arguments, result):
        try:  # transformers runs the model in a thread of its own
            recorder(layer, arguments, result)
            for pages in ("key_cache", "value_cache"):
                assert in_pool(passes.caches[-1], arguments[pages])
        except BaseException as error:
            problems.append(error)
            raise

    prompts = prompts_of(200, 90, 260)
    with enabled(model, CRITERION, walk=walk, on_call=on_call, **SIZES) as (handle, passes):
        answers(model, prompts, new_tokens=6)
    assert not problems
    assert passes.mixed > 0
    sliding = [
        layer
        for layer in range(LAYERS)
        if paged_step.layer_pool(passes.caches[-1], layer).window is not None
    ]
    assert (recorder.stopped > 0) == (len(sliding) < LAYERS)
    assert recorder.inside <= 0.01 * recorder.compared
    steps = sum(1 in lens for lens in passes.lens)
    assert len(recorder.calls) == steps * LAYERS
    rows = sum(lens.count(1) for lens in passes.lens)
    assert rows == 3 * 5
    read = torch.stack(
        [sum(tokens.sum(0) for n, tokens, _ in recorder.calls if n == i) for i in range(LAYERS)]
    )
    present = [sum(seen for n, _, seen in recorder.calls if n == i) for i in range(LAYERS)]
    assert torch.equal(handle.stats.tokens_read(), read)
    assert handle.stats.tokens_present().tolist() == present
    fractions = handle.stats.fractions()
    for layer in range(LAYERS):
        assert (fractions[layer] == 1.0).all() == (layer in sliding)


def test_tokens_are_those_of_generate_with_the_same_rule(tiny):
    model, prompts = tiny("llama"), prompts_of(200, 90, 260)
    with art_torch.patch(model, CRITERION, measure_mass=True, **SIZES) as alone:
        expected = generated(model, prompts)
    with enabled(model, CRITERION, measure_mass=True, **SIZES) as (together, _):
        assert answers(model, prompts) == expected
    assert torch.equal(together.stats.tokens_read(), alone.stats.tokens_read())
    assert torch.equal(together.stats.tokens_present(), alone.stats.tokens_present())
    assert (together.stats.mass_read().lowest < 1.0).all()
    torch.testing.assert_close(together.stats.mass_read().lowest, alone.stats.mass_read().lowest)
    assert expected != generated(model, prompts)


def test_nothing_is_gathered_for_decode_rows(tiny, monkeypatch):
    """transformers' own update copies all keys that a batch reads."""
    model, gathered = tiny("llama"), []
    own = PagedAttentionCache.update

    def update(self, key_states, value_states, *args, **kwargs):
        gathered.append(key_states.shape[2])
        return own(self, key_states, value_states, *args, **kwargs)

    monkeypatch.setattr(PagedAttentionCache, "update", update)
    with enabled(model, None) as (_, passes):
        answers(model, prompts_of(30, 150, 40))
    prefills = [n for lens in passes.lens for n in lens if n > 1]
    assert sum(gathered) == LAYERS * sum(prefills)
    assert all(n > 1 for n in gathered)


def test_skip_layers_and_per_layer(tiny):
    model, seen = tiny("llama"), {}

    def on_call(layer, arguments, _):
        seen.setdefault(layer, set()).add(arguments["criterion"])

    settings = {"skip_layers": [0], "per_layer": {3: None}, "on_call": on_call} | SIZES
    with enabled(model, CRITERION, **settings) as (handle, _):
        answers(model, prompts_of(300))
    assert seen == {0: {None}, 1: {CRITERION}, 2: {CRITERION}, 3: {None}}
    fractions = handle.stats.fractions()
    assert (fractions[[0, 3]] == 1.0).all()
    assert (fractions[[1, 2]] < 1.0).all()


def test_position_bias_is_left_to_the_model(caplog):
    """The operator has none. No model of transformers that batches this way passes one today."""
    model, prompts = build("llama"), prompts_of(40, 20)
    expected = generated(model, prompts)
    model.set_attn_implementation("sdpa")

    def add_bias(model, args, kwargs):
        return args, kwargs | {"position_bias": torch.zeros(1, 1, 1, 1)}

    with enabled(model, CRITERION) as (handle, passes):
        hook = model.register_forward_pre_hook(add_bias, with_kwargs=True)
        assert answers(model, prompts) == expected
        hook.remove()
    assert handle.stats.steps == 0
    assert handle.stats.exact_fallbacks == LAYERS * sum(1 in lens for lens in passes.lens)
    assert caplog.text.count("the model passes position_bias") == 1


# ---------------------------------------------------------------- as on a GPU


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_lengths_that_only_the_device_knows(tiny, monkeypatch, name):
    model, prompts = tiny(name), prompts_of(5, 40, 100, 17)
    expected = generated(model, prompts)
    monkeypatch.setattr(paged_step, "lengths_on_host", lambda inputs: False)
    with enabled(model, None) as (handle, passes):
        assert answers(model, prompts) == expected
    assert passes.mixed > 0
    assert handle.stats.read_fraction() == 1.0
    present = handle.stats.tokens_present()
    rows = [len(ids) + step for ids in prompts for step in range(1, NEW_TOKENS)]
    full = [layer for layer in range(LAYERS) if name == "llama" or layer == 2]
    assert (present[full] == sum(rows)).all()


@pytest.mark.parametrize("rule", [None, CRITERION])
def test_block_tables(tiny, monkeypatch, rule):
    """transformers makes them only where flash attention takes them."""
    model, prompts, recorder = tiny("llama"), prompts_of(5, 140, 200, 17), Recorder()
    expected = generated(model, prompts)
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *_: None)
    with enabled(model, rule, on_call=recorder, **SIZES) as (handle, passes):
        got = answers(model, prompts, max_blocks_per_request=32)
    assert any(passes.tables)
    assert not all(passes.tables)
    assert (handle.stats.read_fraction() < 1.0) == (rule is not None)
    if rule is None:
        assert got == expected


def test_compiled_and_padded_batches(tiny):
    """transformers pads batches for torch.compile as for CUDA graphs."""
    model, prompts = tiny("llama"), prompts_of(5, 40)
    expected = generated(model, prompts, new_tokens=4)
    lens = []

    @torch.compiler.disable
    def note(model, args, kwargs):
        if isinstance(kwargs.get("cache"), PagedAttentionCache):
            lens.append(kwargs["cu_seq_lens_q"].diff().tolist())

    hook = model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    config = CompileConfig(backend="eager", mode=None, fullgraph=False, dynamic=True)
    with art_torch.patch(model, None) as handle, continuous_batching.enable(handle):
        got = answers(
            model, prompts, new_tokens=4, varlen_compile_config=config, max_requests_per_batch=3
        )
    hook.remove()
    torch._dynamo.reset()
    assert got == expected
    assert [1, 1, 0] in [row[:3] for row in lens]
    assert handle.stats.read_fraction() == 1.0


def test_block_tables_of_padded_batches():
    """In a CUDA graph, rows behind the last request have no tokens."""
    model = build("llama")
    inputs = {}

    def note(model, args, kwargs):
        if isinstance(kwargs.get("cache"), PagedAttentionCache) and not inputs:
            inputs.update(kwargs)

    model.register_forward_pre_hook(note, with_kwargs=True)
    answers(model, prompts_of(20))
    nothing = torch.tensor([0, 20, 53, 53, 53], dtype=torch.int32)
    table = torch.full((1, 4, 3), -1, dtype=torch.int32)
    table[0, 0, :2], table[0, 1] = torch.tensor([7, 9]), torch.tensor([4, 2, 5])
    batch = inputs | {
        "block_table": table,
        "position_ids": torch.zeros(1, 4, dtype=torch.int32),
        "cu_seq_lens_q": torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32),
        "cu_seq_lens_k": {"full_attention": nothing},
    }
    step = paged_step.PagedStep(batch, PagedCodes())
    rows = step.rows(paged_step.layer_pool(step.cache, 0))
    assert rows.seq_lens.tolist() == [20, 33, 0, 0]
    assert rows.slots.tolist() == [9 * PAGE + 3, 5 * PAGE, -1, -1]
    assert step.tokens is None
