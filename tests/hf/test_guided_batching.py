"""``generate_batch`` by the guided walk: codes of a cache that transformers manages."""

from __future__ import annotations

import pytest
import torch
from batched import NEW_TOKENS, answers, batching, enabled, generated, prompts_of
from test_guided import RULE, GuidedRecorder
from tiny_models import LAYERS, PAD, prompt
from transformers import GenerationConfig
from transformers.generation.continuous_batching import initialization

import art_torch
from art_torch.guided import GROUP_TOKENS, encode_keys
from art_torch.integrations.transformers import paged_codes, paged_step

PAGE = 64
GUIDED = {"walk": "guided", "exact_where_faster": False, "block_size": 16}


def guided_answers(model, prompts, **options):
    return answers(model, prompts, **{"page_size": PAGE, "num_blocks": 30} | options)


class Checker(GuidedRecorder):
    """Replays calls through the reference, and compares their codes with the keys."""

    def __init__(self):
        super().__init__()
        self.groups, self.problems = 0, []

    def __call__(self, layer, arguments, result):
        self.check_only(layer, arguments, result)
        try:
            super().__call__(layer, arguments, result)
        except BaseException as error:
            self.problems.append(error)
            raise

    def check_only(self, layer, arguments, result):
        try:  # transformers runs the model in a thread of its own
            if "key_codes" in arguments:
                self.check_codes(arguments)
        except BaseException as error:
            self.problems.append(error)
            raise

    def check_codes(self, arguments):
        names = ("key_cache", "block_table", "seq_lens")
        table, codes = arguments["code_table"], arguments["key_codes"]
        own = torch.arange(table.numel(), dtype=torch.int32, device=table.device).view_as(table)
        fresh = codes.new_zeros(table.numel(), *codes.shape[1:])
        encode_keys(*(arguments[name] for name in names), fresh, own)
        for row, tokens in enumerate(arguments["seq_lens"].tolist()):
            groups = tokens // GROUP_TOKENS
            found = codes[table[row, :groups].long()]
            assert torch.equal(found, fresh[own[row, :groups].long()])
            self.groups += groups


@pytest.fixture
def checker():
    checker = Checker()
    yield checker
    assert not checker.problems
    assert checker.groups > 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_oss"])
def test_tokens_without_a_criterion(tiny, name):
    model, prompts = tiny(name), prompts_of(5, 300, 130, 64, 1)
    expected = generated(model, prompts)
    with enabled(model, None, **GUIDED) as (handle, passes):
        assert guided_answers(model, prompts) == expected
    assert passes.mixed > 0
    assert handle.stats.layers == list(range(LAYERS))
    assert handle.stats.read_fraction() == 1.0
    assert handle.stats.exact_fallbacks == 0


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_calls_agree_with_the_reference(tiny, name, page_size, checker):
    model, prompts = tiny(name), prompts_of(600, 350, 260)
    with enabled(model, RULE, on_call=checker, **GUIDED) as (handle, passes):
        guided_answers(model, prompts, page_size=page_size, new_tokens=6)
    assert passes.mixed > 0
    assert checker.stopped > 0
    assert checker.inside <= 0.01 * checker.compared
    fractions = handle.stats.fractions()
    for layer in range(LAYERS):
        window = paged_step.layer_pool(passes.caches[-1], layer).window
        assert (fractions[layer] < 1.0).all() == (window is None)


@pytest.mark.parametrize(
    "rule", [RULE, art_torch.ResidualMass(0.2), RULE & art_torch.ResidualMass()]
)
def test_tokens_are_those_of_generate_with_the_same_rule(tiny, rule):
    model, prompts = tiny("llama"), prompts_of(500, 90, 360)
    expected = []
    with art_torch.patch(model, rule, measure_mass=True, **GUIDED) as alone:
        for ids in prompts:
            cache = art_torch.ARTCache(model.config)
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
            got = model.generate(torch.tensor([ids]), past_key_values=cache, **options)
            expected.append(got[0, len(ids) :].tolist())
    with enabled(model, rule, measure_mass=True, **GUIDED) as (together, _):
        assert guided_answers(model, prompts) == expected
    assert torch.equal(together.stats.tokens_read(), alone.stats.tokens_read())
    assert together.stats.read_fraction() < 0.9
    shares = (handle.stats.mass_read().lowest for handle in (together, alone))
    torch.testing.assert_close(*shares, rtol=1e-4, atol=0)


# ---------------------------------------------------------------- pages that change hands


def test_pages_are_used_again(tiny, checker):
    """More requests than fit: pages of those that end go to others."""
    model, prompts = tiny("llama"), prompts_of(200, 230, 260, 290, 210, 330, 240, 270)
    expected = generated(model, prompts)
    with enabled(model, None, on_call=checker, **GUIDED) as (_, passes):
        assert guided_answers(model, prompts, num_blocks=12) == expected
    assert 1 < max(map(len, passes.lens)) < len(prompts)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_shared_prefixes(tiny, name, checker):
    model = tiny(name)
    start = prompt(1, 4 * PAGE, seed=3)[0].tolist()
    prompts = [[*start, 5, 6, 7], [*start, 8, 9], [*start, 5, 6, 7], [*start, 11]]
    expected = generated(model, prompts)
    with enabled(model, None, on_call=checker, **GUIDED) as (_, passes):
        assert guided_answers(model, prompts, max_requests_per_batch=2) == expected
    computed = sum(map(sum, passes.lens))
    every = sum(map(len, prompts)) + len(prompts) * (NEW_TOKENS - 1)
    assert (computed < every) == (name == "llama")  # models without a sliding window share


def test_forked_requests(tiny, checker):
    """A page that is not full is copied, with groups in it that are, to pages used before."""
    model, prompts = tiny("llama"), prompts_of(230)
    expected = generated(model, prompts)
    options = {
        "generation_config": GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            eos_token_id=-1,
            pad_token_id=PAD,
            num_return_sequences=3,
            do_sample=True,
            top_k=1,
        ),
        "continuous_batching_config": batching(page_size=256, num_blocks=4),
        "persistent_manager": True,
    }
    with enabled(model, None, on_call=checker, **GUIDED) as (_, passes):
        model.generate_batch(prompts_of(200), **options)
        model.generate_batch(prompts_of(240), **options)
        outputs = model.generate_batch(prompts, **options)
    assert passes.lens[-1] == [1, 1, 1]
    assert outputs
    assert all(output.generated_tokens == expected[0] for output in outputs.values())


def test_keys_that_others_write(tiny, checker):
    """As when pages come back from the CPU: no forward pass has written them."""
    model, prompts, changed = tiny("llama"), prompts_of(300), []

    def write(module, args, kwargs):
        cache = kwargs.get("cache")
        if cache is None or kwargs["cu_seq_lens_q"].diff().tolist() != [1] or len(changed) == 3:
            return
        for layer in range(LAYERS):
            pool = paged_step.layer_pool(cache, layer)
            with torch.no_grad():
                pool.key_pages[:].mul_(1.01)
        changed.append(len(checker.calls))

    hook = model.register_forward_pre_hook(write, with_kwargs=True, prepend=True)
    try:
        with enabled(model, RULE, on_call=checker, **GUIDED):
            guided_answers(model, prompts)
    finally:
        hook.remove()
    assert len(changed) == 3


def test_passes_that_fail(tiny, checker):
    """What a pass has written before an error is not forgotten."""
    model, prompts = tiny("llama"), prompts_of(300, 260)
    expected = generated(model, prompts)
    fails = iter([False] * 7 + [True])

    def fail(*_):
        if next(fails, False):
            raise RuntimeError("in between")

    hook = model.model.layers[2].register_forward_hook(fail)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=PAD)
    options = {
        "generation_config": config,
        "continuous_batching_config": batching(page_size=PAGE, num_blocks=12),
        "persistent_manager": True,
    }
    try:
        with enabled(model, None, on_call=checker, **GUIDED):
            outputs = model.generate_batch(prompts, **options)
            assert "in between" in [output.error for output in outputs.values()]
            outputs = model.generate_batch(prompts, **options)
    finally:
        hook.remove()
    assert [output.generated_tokens for output in outputs.values()] == expected


# ---------------------------------------------------------------- as on a GPU


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_lengths_that_only_the_device_knows(tiny, monkeypatch, name, checker):
    model, prompts = tiny(name), prompts_of(5, 140, 300, 17)
    expected = generated(model, prompts)
    monkeypatch.setattr(paged_step, "lengths_on_host", lambda inputs: False)
    with enabled(model, None, on_call=checker, **GUIDED) as (handle, passes):
        assert guided_answers(model, prompts) == expected
    assert passes.mixed > 0
    assert handle.stats.read_fraction() == 1.0


def test_block_tables(tiny, monkeypatch, checker):
    model, prompts = tiny("llama"), prompts_of(5, 340, 200, 17)
    expected = generated(model, prompts)
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *_: None)
    with enabled(model, None, on_call=checker, **GUIDED) as (_, passes):
        assert guided_answers(model, prompts, max_blocks_per_request=12) == expected
    assert any(passes.tables)


def test_little_to_read(tiny, monkeypatch):
    model, prompts = tiny("llama"), prompts_of(300)
    monkeypatch.setattr(art_torch.integrations.transformers.patching, "least_guided_bytes",
                        lambda _: 1 << 40)  # fmt: skip
    with enabled(model, RULE, **GUIDED | {"exact_where_faster": True}) as (handle, _):
        guided_answers(model, prompts)
    assert handle.stats.read_fraction() == 1.0
    assert handle.stats.exact_fallbacks == LAYERS * (NEW_TOKENS - 1)


# ---------------------------------------------------------------- what is refused


def failed(model, prompts, **options):
    config = GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=PAD)
    outputs = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batching(**options)
    )
    return next(iter(outputs.values())).error


def test_pages_that_groups_do_not_fit(tiny):
    with enabled(tiny("llama"), RULE, **GUIDED):
        error = failed(tiny("llama"), prompts_of(20), page_size=32)
    assert "page_size (block_size in transformers 5.17)" in error
    assert "must be a multiple of that, got 32" in error


def test_recorded_passes(tiny, monkeypatch):
    monkeypatch.setattr(paged_codes, "is_recorded", lambda tensor: True)
    with enabled(tiny("llama"), RULE, **GUIDED):
        error = failed(tiny("llama"), prompts_of(20), page_size=PAGE)
    assert "pass use_cuda_graph=False to ContinuousBatchingConfig" in error
    with enabled(tiny("llama"), RULE):
        assert failed(tiny("llama"), prompts_of(20), page_size=PAGE) is None


def test_caches_made_under_inference_mode():
    key_pages = torch.inference_mode()(torch.zeros)(4, 64, 2, 32)
    pool = paged_step.LayerPool(key_pages, key_pages, 0, None, 1)
    step = paged_step.PagedStep.__new__(paged_step.PagedStep)
    with (
        pytest.raises(RuntimeError, match="call generate_batch outside of it"),
        paged_codes.PagedCodes().writing(0, True, step, pool),
    ):
        pass
