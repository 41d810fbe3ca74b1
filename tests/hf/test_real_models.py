"""SmolLM2 135M and Gemma 3 270M: patched without a rule, the tokens are those of sdpa."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import gemma3, smollm2
from test_art_on import Recorder
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import art_torch

TEXT = Path(__file__).parents[2] / "examples" / "data" / "hacker_folklore.txt"
TOKENS = 64


class Real:
    """A model with its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        assert self.model.config._attn_implementation == "sdpa"

    def text(self, tokens: int, start: int = 0) -> torch.Tensor:
        ids = self.tokenizer(TEXT.read_text(), return_tensors="pt").input_ids
        ids = torch.cat([ids] * -(-(start + tokens) // ids.shape[1]), dim=1)
        return ids[:, start : start + tokens]

    def generate(self, ids, cache=None, **kwargs):
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
        options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0} | kwargs
        return self.model.generate(input_ids=ids, past_key_values=cache, **options)

    def cache(self) -> art_torch.ARTCache:
        return art_torch.ARTCache(self.model.config)


@pytest.fixture(scope="session")
def smol() -> Iterator[Real]:
    return Real(smollm2())


@pytest.fixture(scope="session")
def gemma() -> Iterator[Real]:
    return Real(gemma3())


def test_short_prompt(smol):
    ids = smol.tokenizer("The three laws of motion are", return_tensors="pt").input_ids
    expected = smol.generate(ids)
    with art_torch.patch(smol.model, None):
        assert torch.equal(smol.generate(ids, smol.cache()), expected)
        assert torch.equal(smol.generate(ids, DynamicCache()), expected)


def test_long_prompt(smol):
    ids = smol.text(2000)
    expected = smol.generate(ids)
    with art_torch.patch(smol.model, None) as handle:
        assert torch.equal(smol.generate(ids, smol.cache()), expected)
    assert handle.stats.read_fraction() == 1.0
    assert handle.stats.tokens_present()[0] == sum(range(2001, 2000 + TOKENS))


def test_left_padded_batch(smol):
    lengths = (150, 20, 97, 64)
    ids = torch.zeros(4, max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = smol.text(length, start=300 * row)
        mask[row, -length:] = 1
    expected = smol.generate(ids, attention_mask=mask)
    with art_torch.patch(smol.model, None):
        assert torch.equal(smol.generate(ids, smol.cache(), attention_mask=mask), expected)


def test_beam_search(smol):
    ids = smol.text(90)
    expected = smol.generate(ids, num_beams=3)
    cache = smol.cache()
    with art_torch.patch(smol.model, None):
        assert torch.equal(smol.generate(ids, cache, num_beams=3), expected)
    # Beams with a common past share its pages.
    assert cache.tables[0].pages.pages_in_use < 3 * -(-(90 + TOKENS) // cache.page_size)


def test_prompt_lookup(smol):
    ids = smol.text(120)
    ids = torch.cat([ids, ids[:, :60]], dim=1)
    expected = smol.generate(ids)
    with art_torch.patch(smol.model, None):
        got = smol.generate(ids, smol.cache(), prompt_lookup_num_tokens=5)
    assert torch.equal(got, expected)


def test_two_turns(smol):
    first, second = smol.text(100), smol.text(50, start=1000)

    def talk(cache):
        so_far = smol.generate(first, cache)
        return smol.generate(torch.cat([so_far, second], dim=1), cache)

    expected = talk(DynamicCache())
    with art_torch.patch(smol.model, None):
        assert torch.equal(talk(smol.cache()), expected)


def test_gemma_long_prompt(gemma):
    ids = gemma.text(3000)
    expected = gemma.generate(ids)
    cache = gemma.cache()
    with art_torch.patch(gemma.model, None):
        assert torch.equal(gemma.generate(ids, cache), expected)
    window = gemma.model.config.sliding_window
    pages = {window: table.pages.pages_in_use for window, table in cache.tables.items()}
    assert pages[window] <= -(-window // cache.page_size) + 1
    assert pages[0] == -(-(3000 + TOKENS - 1) // cache.page_size)


@pytest.mark.parametrize(("name", "tokens"), [("smol", 1200), ("gemma", 700)])
def test_calls_agree_with_the_reference(name, tokens, request):
    real, recorder = request.getfixturevalue(name), Recorder()
    with art_torch.patch(real.model, art_torch.Stability(), on_call=recorder) as handle:
        real.generate(real.text(tokens), real.cache(), max_new_tokens=3)
    assert len(recorder.calls) == 2 * real.model.config.num_hidden_layers
    assert recorder.stopped > 0
    assert recorder.inside <= 0.01 * recorder.compared
    assert handle.stats.read_fraction() < 1.0


def question(smol) -> torch.Tensor:
    """A text of 3,000 tokens that says one thing once, 700 tokens before its end."""
    turns = [
        {"role": "user", "content": TEXT.read_text().strip()},
        {"role": "assistant", "content": "Thank you. What would you like to know about it?"},
        {
            "role": "user",
            "content": "When did the Bergen Linux User's Group demonstrate carrier pigeon IP?",
        },
    ]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return smol.tokenizer.apply_chat_template(turns, **options)["input_ids"]


def test_the_guided_walk_finds_a_fact(smol):
    """By the same rule the default walk stops before it gets there."""
    ids = question(smol)
    cache = smol.cache()
    with art_torch.patch(smol.model, None):
        smol.model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    rule = art_torch.Stability(0.01, 5e-5, 2)
    answers, read = {}, {}
    for walk in ("guided", "sink_recent"):
        with art_torch.patch(smol.model, rule, walk=walk, measure_mass=True) as handle:
            own = copy.deepcopy(cache)
            answer = smol.generate(ids, own, max_new_tokens=22)[0, ids.shape[1] :]
        answers[walk] = smol.tokenizer.decode(answer)
        read[walk] = handle.stats.read_fraction()
        mass = handle.stats.mass_read()
        print(f"{walk}: {read[walk]:.1%} read, {mass.true.mean():.2%} of the mass: {answers[walk]}")
        if walk == "guided":
            assert (mass.estimated - mass.true).abs().mean() < 0.03
            codes = own.tables[0].codes.groups
            assert codes.bytes_in_use < 0.04 * own.bytes_in_use  # of float32 keys and values
    assert "28 April 2001" in answers["guided"]
    assert "28 April 2001" not in answers["sink_recent"]
    assert read["guided"] < 0.35


def test_guided_without_a_rule(smol):
    """Padded batch, beams, prompt lookup and a second turn: the tokens are those of sdpa."""
    ids = torch.cat([smol.text(140), smol.text(120)], dim=1)
    mask = torch.ones(2, 260, dtype=torch.long)
    mask[1, :50] = 0
    batch = torch.cat([ids, ids.roll(50, dims=1)]) * mask

    def run(cache):
        kept = cache()
        first = smol.generate(ids, kept, prompt_lookup_num_tokens=5, max_new_tokens=20)
        more = torch.cat([first, smol.text(20, start=1000)], dim=1)
        second = smol.generate(more, kept, max_new_tokens=20)
        third = smol.generate(batch, cache(), attention_mask=mask, max_new_tokens=20)
        return first, second, third, smol.generate(ids, cache(), num_beams=2, max_new_tokens=20)

    expected = run(DynamicCache)
    with art_torch.patch(smol.model, None, walk="guided") as handle:
        got = run(smol.cache)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert handle.stats.read_fraction() == 1.0
