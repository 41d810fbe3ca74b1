"""Presses of kvpress on patched models: the tokens of the press alone, from fewer pages."""

from __future__ import annotations

import copy

import pytest
import torch
from pressed import (
    HEAD_DIM,
    HEAD_WISE,
    HEADS,
    PRESSES,
    PROMPT,
    UNIFORM,
    alone,
    imported_kvpress,
    make,
    press_of,
)
from test_art_on import SIZES, Recorder
from test_exact import TOKENS, assert_same, generate, left_padded
from test_guided import GuidedRecorder
from tiny_models import LAYERS, prompt
from transformers import DynamicCache

import art_torch
from art_torch.integrations.kvpress import compatible

RULE = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)


@pytest.fixture(scope="module", autouse=True)
def kvpress():
    with imported_kvpress() as module:
        yield module


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.fixture(scope="module")
def mild():
    """Flatter attention, so that every stop decision is far from the limits of float32."""
    model = make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.25)
    return model


# ---------------------------------------------------------------- the tokens of the press alone


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("press", PRESSES)
def test_tokens_of_the_press_alone(name, press):
    model, ids = make(name), prompt(1, PROMPT)
    expected = alone(model, press_of(press), ids)
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, None) as handle, press_of(press)(model):
        assert_same(generate(model, ids, cache), expected)
    assert handle.stats.steps == TOKENS - 1
    assert handle.stats.exact_fallbacks == 0
    assert handle.stats.read_fraction() == 1.0
    assert cache.get_seq_length() == PROMPT + TOKENS - 1


@pytest.mark.parametrize("press", UNIFORM)
def test_tokens_of_the_press_alone_with_eager_attention(press):
    model, ids = make("llama", "eager"), prompt(1, PROMPT)
    expected = alone(model, press_of(press), ids)
    with art_torch.patch(model, None), press_of(press)(model):
        assert_same(generate(model, ids, art_torch.ARTCache(model.config)), expected)


@pytest.mark.parametrize("press", HEAD_WISE)
def test_budgets_per_head_as_kvpress_masks_them(press):
    """With one query head per KV head the fake keys of kvpress always exist."""
    model, ids = make("llama", num_key_value_heads=4), prompt(1, PROMPT)
    with compatible(model), press_of(press, 0.8)(model):
        expected = generate(model, ids, DynamicCache(config=model.config))
    with art_torch.patch(model, None), press_of(press, 0.8)(model):
        assert_same(generate(model, ids, art_torch.ARTCache(model.config)), expected)


@pytest.mark.parametrize("press", PRESSES)
def test_left_padded_batch(llama, press):
    """Each sequence is compressed as if it was alone. (kvpress itself takes pads for tokens.)"""
    ids, mask = left_padded(4, PROMPT)
    rows = [alone(llama, press_of(press), ids[i : i + 1, mask[i].bool()]) for i in range(4)]
    cache = art_torch.ARTCache(llama.config)
    with art_torch.patch(llama, None) as handle, press_of(press)(llama):
        got = generate(llama, ids, cache, attention_mask=mask)
    for i, expected in enumerate(rows):
        assert torch.equal(got.sequences[i, PROMPT:], expected.sequences[0, -TOKENS:])
    assert handle.stats.exact_fallbacks == 0
    assert handle.stats.read_fraction() == 1.0


@pytest.mark.parametrize("press", ["snapkv", "adakv_snapkv"])
def test_beam_search(llama, press):
    ids = prompt(2, PROMPT)
    expected = alone(llama, press_of(press), ids, num_beams=3)
    with art_torch.patch(llama, None), press_of(press)(llama):
        got = generate(llama, ids, art_torch.ARTCache(llama.config), num_beams=3)
    assert torch.equal(got.sequences, expected.sequences)


def test_compression_of_nothing(llama):
    ids, mask = left_padded(2, PROMPT)
    expected = generate(llama, ids, DynamicCache(config=llama.config), attention_mask=mask)
    for press in PRESSES:
        with art_torch.patch(llama, None), press_of(press, 0.0)(llama):
            cache = art_torch.ARTCache(llama.config)
            assert_same(generate(llama, ids, cache, attention_mask=mask), expected)


def test_press_of_presses(llama, kvpress):
    """Presses within presses, and one that changes keys."""
    nested = [
        lambda: kvpress.ComposedPress([press_of("knorm"), press_of("knorm")]),
        lambda: kvpress.PerLayerCompressionPress(press_of("knorm"), [0.1, 0.3, 0.5, 0.7]),
        lambda: kvpress.KeyRerotationPress(press_of("streaming_llm")),
    ]
    ids = prompt(1, PROMPT)
    for press in nested:
        expected = alone(llama, press(), ids)
        with art_torch.patch(llama, None), press()(llama):
            assert_same(generate(llama, ids, art_torch.ARTCache(llama.config)), expected)


def test_sliding_layers_keep_their_window(caplog):
    """As kvpress does it for Gemma 3; here for any model."""
    model, ids = make("gemma2", "eager"), prompt(1, PROMPT)
    press = press_of("knorm")
    with compatible(model):
        full = model.model.layers[2].self_attn
        hook = full.register_forward_hook(press.forward_hook, with_kwargs=True)
        expected = generate(model, ids, DynamicCache(config=model.config))
        hook.remove()
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, None), press_of("knorm")(model):
        assert_same(generate(model, ids, cache), expected)
    assert [layer.is_evicted for layer in cache.layers] == [False, False, True, False]
    assert caplog.text.count("layers with a sliding window are not compressed") == 1


def test_later_passes(llama):
    """After the prompt: several tokens in one pass, then one by one; also of a copy."""
    ids, more = prompt(2, PROMPT), prompt(2, 12, seed=3)

    def feed(cache):
        logits = []
        for start, end in ((0, 7), *((i, i + 1) for i in range(7, 12))):
            positions = torch.arange(PROMPT + start, PROMPT + end)[None].expand(2, -1)
            part = more[:, start:end]
            logits.append(llama(part, position_ids=positions, past_key_values=cache).logits)
        return torch.cat(logits, dim=1)

    own, cache = DynamicCache(config=llama.config), art_torch.ARTCache(llama.config)
    with compatible(llama), press_of("snapkv")(llama):
        llama(ids, past_key_values=own)
    expected = feed(own)
    with art_torch.patch(llama, None):
        with press_of("snapkv")(llama):
            llama(ids, past_key_values=cache)
        clone = copy.deepcopy(cache)
        for each in (cache, clone):
            torch.testing.assert_close(feed(each), expected, rtol=1e-4, atol=1e-3)
        clone.crop(-12)
        torch.testing.assert_close(feed(clone), expected, rtol=1e-4, atol=1e-3)
        with pytest.raises(RuntimeError, match="which a press has compressed: reset"):
            clone.crop(-13)


@pytest.mark.parametrize("own_positions", [True, False])
def test_padded_second_turn(llama, own_positions):
    """Rows of a padded batch continue as each would alone, head-wise budgets as well."""
    ids, mask = left_padded(3, PROMPT)
    more = prompt(3, 9, seed=3)

    def positions(shown):
        """Of each row, pads left out; or of all alike, which RoPE does not tell apart."""
        own = (shown.cumsum(1) - 1).clamp(min=0)
        return own if own_positions else torch.arange(shown.shape[1])[None]

    def talk(rows, tokens):
        cache = art_torch.ARTCache(llama.config)
        shown = mask[rows][:, tokens]
        full = torch.cat([shown, torch.ones_like(more[rows])], dim=1)
        with press_of("adakv_snapkv")(llama):
            inputs = {"attention_mask": shown, "position_ids": positions(shown)}
            llama(ids[rows][:, tokens], past_key_values=cache, **inputs)
        inputs = {"attention_mask": full, "position_ids": positions(full)[:, -9:]}
        return llama(more[rows], past_key_values=cache, **inputs).logits

    with art_torch.patch(llama, None):
        together = talk(slice(None), slice(None))
        for i in range(3):
            single = talk([i], mask[i].bool())
            torch.testing.assert_close(together[i : i + 1], single, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------- with a stopping rule


class PressedRecorder(Recorder):
    """Counts what is present head by head."""

    @staticmethod
    def present(named):
        return named["seq_lens"].sum(0)


class GuidedPressedRecorder(PressedRecorder, GuidedRecorder):
    pass


@pytest.mark.parametrize(
    ("walk", "kv_dtype"),
    [("sink_recent", None), ("oldest_first", None), ("guided", None), ("guided", torch.int8)],
)
@pytest.mark.parametrize("press", PRESSES)
def test_calls_agree_with_the_reference(mild, press, walk, kv_dtype):
    recorder = GuidedPressedRecorder() if walk == "guided" else PressedRecorder()
    sizes = {"block_size": 16} if walk == "guided" else SIZES
    ids, mask = left_padded(3, 900)
    cache = art_torch.ARTCache(mild.config, kv_dtype=kv_dtype)
    with (
        art_torch.patch(mild, RULE, walk=walk, on_call=recorder, **sizes) as handle,
        press_of(press)(mild),
    ):
        generate(mild, ids, cache, attention_mask=mask, max_new_tokens=6)
    assert len(recorder.calls) == 5 * LAYERS
    assert recorder.stopped > 0
    assert recorder.inside <= 0.01 * recorder.compared
    assert handle.stats.exact_fallbacks == 0
    read = [sum(tokens.sum(0) for i, tokens, _ in recorder.calls if i == n) for n in range(LAYERS)]
    present = [sum(heads for i, _, heads in recorder.calls if i == n) for n in range(LAYERS)]
    assert torch.equal(handle.stats.tokens_read(), torch.stack(read))
    fractions = torch.stack(read).double() / torch.stack(present)
    torch.testing.assert_close(handle.stats.fractions(), fractions)
    assert handle.stats.read_fraction() == pytest.approx(
        float(torch.stack(read).sum() / torch.stack(present).sum())
    )
    assert handle.stats.read_fraction() < 1.0


@pytest.mark.parametrize("press", ["snapkv", "adakv_snapkv"])
@pytest.mark.parametrize("key_codes", [False, True])
def test_guided_walk_without_a_rule(llama, press, key_codes):
    """Codes are of the keys that are left, also where they were kept from the start."""
    ids, mask = left_padded(2, 700)
    with art_torch.patch(llama, None), press_of(press)(llama):
        cache = art_torch.ARTCache(llama.config)
        expected = generate(llama, ids, cache, attention_mask=mask)
    coded = art_torch.ARTCache(llama.config, key_codes=key_codes)
    with art_torch.patch(llama, None, walk="guided") as handle, press_of(press)(llama):
        assert_same(generate(llama, ids, coded, attention_mask=mask), expected)
    assert handle.stats.read_fraction() == 1.0
    assert handle.stats.exact_fallbacks == 0
    assert all(layer.codes is not None for layer in coded.layers)
    assert cache.bytes_in_use < coded.bytes_in_use < 1.1 * cache.bytes_in_use


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_walks_go_by_the_order_of_the_text(dtype):
    """A press leaves tokens in the order of their scores."""
    model, ids = make("llama").to(dtype), prompt(1, PROMPT)
    caches = [art_torch.ARTCache(model.config) for _ in range(2)]
    with art_torch.patch(model, None):
        model(ids, past_key_values=caches[0])
        with press_of("snapkv")(model):
            model(ids, past_key_values=caches[1])
    all_keys = caches[0].layers[1].history()[0]
    layer = caches[1].layers[1]
    left, _, stored = layer.table.gather(layer.storage)
    assert stored.all()
    for head in range(HEADS):
        place = [(all_keys[0, head] == key).all(1).nonzero().item() for key in left[0, head]]
        assert place == sorted(place)
        assert len(place) == PROMPT // 2


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("ratio", [0.2, 0.8])
@pytest.mark.parametrize("press", PRESSES)
def test_evicted_tokens_hold_no_pages(press, ratio):
    # PyramidKV keeps more than its ratio says: its window comes on top.
    model = make("llama")
    page, tokens, rows = 16, 1600, 2
    ids = prompt(rows, tokens)
    cache = art_torch.ARTCache(model.config, page_size=page)
    token = 2 * HEAD_DIM * 4 * HEADS * LAYERS * rows
    with art_torch.patch(model, None):
        model(ids, past_key_values=cache, logits_to_keep=1)
        assert cache.bytes_in_use == tokens * token
        cache.reset()
        assert cache.bytes_in_use == 0
        before = cache.budget.used_bytes
        with press_of(press, ratio)(model):
            model(ids, past_key_values=cache, logits_to_keep=1)
        kept = int(tokens * (1 - ratio)) + (16 if press == "pyramidkv" else 0)
        assert cache.bytes_in_use <= (kept + page) * token
        assert cache.bytes_in_use >= (0.9 if press == "pyramidkv" else 1.0) * kept * token
        stored = sum(int(layer.table.seq_lens.sum()) for layer in cache.layers)
        assert stored == sum(int(layer.pages()["seq_lens"].sum()) for layer in cache.layers)
        cache.reset()
        assert cache.bytes_in_use == 0
        assert cache.budget.used_bytes == before


def test_heads_have_budgets_of_their_own(llama):
    cache = art_torch.ARTCache(llama.config, page_size=16)
    with art_torch.patch(llama, None), press_of("adakv_snapkv", 0.75)(llama):
        llama(prompt(2, 1000), past_key_values=cache)
    lens = torch.stack([layer.pages()["seq_lens"] for layer in cache.layers])
    assert (lens.sum(-1) == 2 * 250).all()
    assert (lens[..., 0] != lens[..., 1]).any()
    assert lens.min() >= 0.2 * 250  # what AdaKV leaves to every head
    for layer in cache.layers:
        assert layer.pages()["block_table"].shape[:2] == (2, HEADS)
        assert layer.table.pages.pages_in_use == int((-(-layer.table.seq_lens // 16)).sum())


def test_memory_limit(llama):
    """A limit that the whole prompt would pass is enough for what is left of it."""
    limit = 1 << 20
    ids = prompt(1, 1000)  # 2 MB
    with art_torch.patch(llama, None):
        with pytest.raises(MemoryError, match="the KV cache needs"):
            llama(ids, past_key_values=art_torch.ARTCache(llama.config, max_bytes=limit))
        cache = art_torch.ARTCache(llama.config, max_bytes=limit)
        with press_of("adakv_snapkv", 0.8)(llama):
            llama(ids, past_key_values=cache)
        assert 0 < cache.bytes_in_use < limit
        cache.reset()
        with press_of("snapkv", 0.1)(llama), pytest.raises(MemoryError, match="the KV cache needs"):
            llama(ids, past_key_values=cache)
        cache.reset()
        with press_of("snapkv", 0.8)(llama):
            llama(ids, past_key_values=cache)
