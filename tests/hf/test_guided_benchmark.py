"""What bench_guided.py measures is what a patched model does, and its simulations are right."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import art_torch
from art_torch import ResidualMass, Stability

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import forcing
        import guided_report
        import guided_rules
        import guided_texts
        import walk_makers
    finally:
        sys.path.remove(str(BENCHMARKS))
    names = (forcing, guided_report, guided_rules, guided_texts, walk_makers)
    return {module.__name__: module for module in names}


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    return LlamaForCausalLM(config).eval()


def a_step(modules, tokens=400, rows=3, present=384):
    torch.manual_seed(1)
    query, keys = torch.randn(rows, 4, 32), torch.randn(2, tokens, 32)
    lens = torch.arange(tokens - rows + 1, tokens + 1, dtype=torch.int32)
    return modules["forcing"].Step(0, 3 * query, keys, keys.clone(), lens, present, 32**-0.5, {})


@torch.inference_mode()
def test_one_pass_is_many_steps(modules):
    rules, forcing = modules["guided_rules"], modules["forcing"]
    model = small_llama()
    tokens = torch.randint(0, 97, (500,))
    expected = model(tokens[None]).logits[0, 470:]
    forced = forcing.Forcing(model)
    document = forced.prefill(tokens[:470], 512)
    exact, read = forced.force(document, tokens[470:], rules.rule_of(rules.Setting()))
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-5)
    assert read == 1
    setting = rules.Setting("codes2", rules.matching(0.3, 1) & ResidualMass(0.3))
    together, read = forced.force(document, tokens[470:], rules.rule_of(setting))
    assert 0 < read < 1
    for index, token in enumerate(tokens[470:]):
        alone, _ = forced.force(document, token[None], rules.rule_of(setting))
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-5)
        document.present += 1


def test_codes_are_close_and_few(modules):
    makers = modules["walk_makers"]
    torch.manual_seed(0)
    keys = torch.randn(2, 128, 32)
    for bits in (2, 4):
        near = makers.coded(bits, makers.min_max())(keys)
        groups, codes = keys.unflatten(1, (-1, 64)), near.unflatten(1, (-1, 64))
        step = (groups.amax(2) - groups.amin(2)) / (2**bits - 1)
        assert ((codes - groups).abs() <= 0.51 * step[:, :, None] + 1e-2).all()
        assert max(len(codes[0, 0, :, d].unique()) for d in range(32)) <= 2**bits


def test_walk_has_pinned_units_first_then_descending_mass(modules):
    step = a_step(modules)
    walk = modules["guided_rules"].WALKS["oracle"](step)
    assert walk.num_pinned.tolist() == [[9, 9]] * 2 + [[9, 9]]
    for row in range(3):
        length = int(step.seq_lens[row])
        for head in range(2):
            units = walk.units[row, head, : walk.lens[row, head]].tolist()
            assert sorted(units) == list(range(25))
            assert units[:9] == [0, 1, 2, 3, 20, 21, 22, 23, 24]
            logits = step.query[row, 2 * head : 2 * head + 2] @ step.keys[head, :length].T
            shares = (logits * step.scale).softmax(-1)
            mass = [float(shares[:, 16 * u : 16 * u + 16].sum(1).max()) for u in units[9:]]
            assert mass == sorted(mass, reverse=True)


def test_log_rest_is_the_mass_of_later_units(modules):
    step = a_step(modules)
    walk = modules["guided_rules"].WALKS["oracle"](step)
    rest = modules["guided_rules"].log_rest_of(walk)
    assert rest.shape == (3, 4, 25)
    for row in range(3):
        length = int(step.seq_lens[row])
        for head in range(4):
            logits = step.query[row, head] @ step.keys[head // 2, :length].T * step.scale
            units = walk.units[row, head // 2].tolist()
            for entry in range(24):
                later = [j for j in range(length) if j // 16 in units[entry + 1 :]]
                expected = logits[later].logsumexp(0)
                torch.testing.assert_close(rest[row, head, entry], expected, rtol=1e-4, atol=1e-4)
    assert (rest[..., -1] == -torch.inf).all()


CRITERIA = [
    Stability(0.3, 0.1, 1),
    ResidualMass(0.3),
    Stability(0.3, 0.1, 1) & ResidualMass(0.2),
    Stability(0.3, 0.1, 1) | ResidualMass(0.2),
]
NAMES = [
    "guided (0.3, 0.1, 1)",
    "guided mass 0.3",
    "guided (0.3, 0.1, 1) and mass 0.2",
    "guided (0.3, 0.1, 1) or mass 0.2",
]


@pytest.mark.parametrize(("criterion", "name"), list(zip(CRITERIA, NAMES, strict=True)), ids=NAMES)
@torch.inference_mode()
def test_forced_steps_are_those_of_a_patched_model(modules, criterion, name):
    """Row by row through ``art_torch.patch`` and an ``ARTCache``, past the end of a group."""
    rules, forcing = modules["guided_rules"], modules["forcing"]
    setting = rules.Setting("guided", criterion)
    assert setting.name == name
    tokens = torch.randint(0, 97, (530,), generator=torch.Generator().manual_seed(3))
    forced = forcing.Forcing(small_llama())
    document = forced.prefill(tokens[:500], 576)
    together, read = forced.force(document, tokens[500:], rules.rule_of(setting))
    model = small_llama()
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, criterion, walk="guided") as handle:
        model(tokens[None, :500], past_key_values=cache)
        logits = [model(token[None, None], past_key_values=cache).logits for token in tokens[500:]]
    torch.testing.assert_close(together, torch.cat(logits, dim=1)[0], rtol=1e-4, atol=1e-5)
    assert 0.4 < read < 0.95
    assert handle.stats.read_fraction() == pytest.approx(read, abs=2e-3)


def test_presets_are_those_of_the_package(modules):
    rules = modules["guided_rules"]
    names = [rules.Setting("guided", rule).name for rule in art_torch.PRESETS.values()]
    assert [modules["guided_report"].labels(art_torch.PRESETS)(name) for name in names] == [
        f"{name} = {preset}" for name, preset in zip(names, art_torch.PRESETS, strict=True)
    ]


def test_facts_are_in_the_document_at_their_depths(modules):
    texts = modules["guided_texts"]
    facts = texts.facts_of(0)
    first = [fact for index in range(4) for fact in texts.facts_of(index)]
    assert sorted(first) == sorted(texts.FACTS)
    document = texts.with_facts("A sentence that says little. " * 500, facts)
    for index, (start, fact) in enumerate(facts):
        at = document.index(f"{start} {fact}.") / len(document)
        assert at == pytest.approx((index + 1) / 10, abs=0.03)


def test_texts_can_be_read(modules):
    texts = modules["guided_texts"]
    for name in (*texts.TUNING, *texts.HELD_OUT):
        assert len(texts.read_text(name)) > 60_000
    assert not set(texts.TUNING) & set(texts.HELD_OUT)


def test_interval_holds_the_mean(modules):
    low, high = modules["guided_report"].interval([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4


def test_summaries_count_only_facts_that_the_exact_model_finds(modules):
    same = {"case": "S64_needles", "text": "kjv", "window": 0}
    rows = [
        {**same, "impl": "exact", "read": 1.0, "margins": [2.5, 0.3, -1.0]},
        {**same, "impl": "guided", "read": 0.2, "margins": [0.5, 0.0, 1.0]},
        {"case": "S64", "text": "kjv", "window": 0, "impl": "guided", "read": 0.1, "kl": 0.5}
        | {"kl_max": 1.0, "top1": 0.9},
    ]
    fidelity, exact, guided = modules["guided_report"].summaries(rows)
    assert (fidelity["texts"], fidelity["windows"], fidelity["kl"]) == ("held_out", 1, 0.5)
    assert (exact["found"], exact["of"]) == (2, 2)
    # A tie is not found.
    assert (guided["found"], guided["of"], guided["lost"]) == (1, 2, [0.3])
