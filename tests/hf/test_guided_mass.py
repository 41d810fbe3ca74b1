"""patch(measure_mass=True): how much softmax mass was read, with the guided walk and others."""

from __future__ import annotations

import pytest
import torch
from test_exact import cache_of, generate, left_padded
from test_guided import RULE, full_layers, guided
from tiny_models import LAYERS, prompt

import art_torch
from art_torch import guided_walk


def test_measured_mass(tiny):
    model, shares = tiny("gpt_oss"), []
    full = full_layers(model)

    def on_call(layer, arguments, result):
        if layer not in full:
            return
        names = ("query", "key_cache", "value_cache", "block_table", "seq_lens", "scale")
        exact = art_torch.reference.decode_attention(**{n: arguments[n] for n in names})
        true = (result.lse.cpu().double() - exact.lse.double()).exp()
        tensors = {n: arguments[n] for n in names[:2] + names[3:]}
        codes = {n: arguments[n] for n in ("key_codes", "code_table", "attn_sinks")}
        log_mass = guided_walk(**tensors, **codes).log_mass.cpu().double()
        units = -(-result.tokens_read.cpu() // 16)
        read = [log_mass[0, head, : units[0, head]].exp().sum() for head in range(2)]
        estimated = torch.stack(read) / log_mass[0].exp().sum(-1)
        shares.append((true.mean(), true.min(), estimated.mean()))

    with guided(model, RULE, on_call=on_call, measure_mass=True, block_size=16) as handle:
        generate(model, prompt(1, 500), art_torch.ARTCache(model.config), max_new_tokens=5)
    mass = handle.stats.mass_read()
    means = torch.tensor(shares)
    assert means.shape == (4 * len(full), 3)
    layer = full[0]
    assert float(mass.true[layer]) == pytest.approx(float(means[:, 0].mean()), abs=1e-5)
    assert float(mass.lowest[layer]) == pytest.approx(float(means[:, 1].min()), abs=1e-5)
    assert float(mass.estimated[layer]) == pytest.approx(float(means[:, 2].mean()), abs=1e-5)
    assert 0 < mass.lowest[layer] < mass.true[layer] < 1
    windows = [i for i in range(LAYERS) if i not in full]
    assert mass.estimated[windows].isnan().all()
    assert len(handle.stats.table().columns) == 8
    handle.stats.reset()
    with pytest.raises(ValueError, match="measure_mass=True"):
        handle.stats.mass_read()


@pytest.mark.parametrize("kind", ["art", "dynamic"])
def test_mass_of_other_walks(tiny, kind):
    model = tiny("gemma2")
    ids, mask = left_padded(2, 330)
    sizes = {"num_pinned": 1, "block_size": 16, "unit_size": 8, "measure_mass": True}
    shares = []
    for criterion in (None, RULE):
        with art_torch.patch(model, criterion, **sizes) as handle:
            cache = cache_of(kind, model)
            generate(model, ids, cache, attention_mask=mask, max_new_tokens=4)
        shares.append(handle.stats.mass_read())
    torch.testing.assert_close(shares[0].lowest, torch.ones(LAYERS).double(), atol=1e-5, rtol=0)
    assert shares[1].true[2] < 1.0  # the layer without a window
    assert (shares[1].lowest <= shares[1].true + 1e-9).all()
    assert shares[1].estimated.isnan().all()
