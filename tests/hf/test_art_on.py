"""With a stopping rule: every call of the operator does what the reference says, and is counted."""

from __future__ import annotations

import pytest
import torch
from test_exact import cache_of, generate, left_padded
from tiny_models import LAYERS, prompt

import art_torch
from art_torch import reference

CRITERION = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
# Small enough to decide inside the windows of the tiny models.
SIZES = {"num_pinned": 1, "block_size": 16, "unit_size": 8}


class Recorder:
    """Replays each call through the reference, at once: the pages change later."""

    def __init__(self):
        self.calls: list[tuple[int, torch.Tensor, int]] = []  # layer, tokens read, present
        self.compared = self.stopped = self.inside = 0

    def __call__(self, layer, arguments, result):
        named = dict(arguments)
        criterion = named["criterion"]
        expected = reference.decode_attention(**named)
        inside = reference.decision_margin(expected, criterion, named["query"].dtype)
        same = expected.stop_block == result.stop_block
        assert (same | inside).all()
        self.inside += int(inside.sum())
        self.compared += inside.numel()
        self.stopped += int((result.stop_block >= 0).sum())
        group = result.out.shape[1] // same.shape[1]
        heads = same.repeat_interleave(group, dim=1)
        torch.testing.assert_close(
            result.out[heads].double(), expected.out[heads], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            result.tokens_read[same], expected.tokens_read[same], rtol=0, atol=0
        )
        self.calls.append((layer, result.tokens_read.clone(), self.present(named)))

    @staticmethod
    def present(named):
        starts = named["seq_starts"]
        total = 0
        for row, length in enumerate(named["seq_lens"].tolist()):
            start = 0 if starts is None else int(starts[row])
            total += len(reference.visible_tokens(length, start, named["sliding_window"]))
        return total


@pytest.mark.parametrize("walk", ["sink_recent", "oldest_first", "recent_first"])
@pytest.mark.parametrize("kind", ["art", "int8", "dynamic", "static"])
def test_calls_agree_with_the_reference(any_tiny, kind, walk):
    recorder = Recorder()
    ids, mask = left_padded(2, 330)
    with art_torch.patch(any_tiny, CRITERION, walk=walk, on_call=recorder, **SIZES) as handle:
        generate(
            any_tiny,
            ids,
            cache_of(kind, any_tiny, length=340),
            attention_mask=mask,
            max_new_tokens=6,
        )
    assert len(recorder.calls) == 5 * LAYERS
    assert recorder.stopped > 0
    assert recorder.inside <= 0.01 * recorder.compared
    assert handle.stats.exact_fallbacks == 0

    read = torch.stack(
        [
            sum(tokens.sum(0) for layer, tokens, _ in recorder.calls if layer == i)
            for i in range(LAYERS)
        ]
    )
    present = [sum(n for layer, _, n in recorder.calls if layer == i) for i in range(LAYERS)]
    assert torch.equal(handle.stats.tokens_read(), read)
    assert handle.stats.tokens_present().tolist() == present
    fraction = read.sum().item() / (sum(present) * read.shape[1])
    assert handle.stats.read_fraction() == pytest.approx(fraction)
    assert fraction < 1.0
    for layer in range(LAYERS):
        steps, seen = handle.stats.per_step(layer)
        calls = [call for call in recorder.calls if call[0] == layer]
        assert torch.equal(steps, torch.stack([tokens.sum(0) for _, tokens, _ in calls]))
        assert seen.tolist() == [n for *_, n in calls]


def test_beams_agree_with_the_reference(tiny):
    model, recorder = tiny("gemma2"), Recorder()
    with art_torch.patch(model, CRITERION, on_call=recorder, **SIZES):
        generate(
            model, prompt(1, 250), art_torch.ARTCache(model.config), num_beams=3, max_new_tokens=20
        )
    assert recorder.stopped > 0


def test_skip_layers_and_per_layer(tiny):
    model = tiny("llama")
    seen: dict[int, art_torch.Stability | None] = {}

    def on_call(layer, arguments, _):
        seen[layer] = arguments["criterion"]

    other = art_torch.Stability(d_scale=torch.tensor([0.5, 0.1]), d_direction=0.1, patience=1)
    settings = {"skip_layers": [0], "per_layer": {2: other, 3: None}, "on_call": on_call} | SIZES
    with art_torch.patch(model, CRITERION, **settings) as handle:
        generate(model, prompt(1, 400), max_new_tokens=5)
    assert seen == {0: None, 1: CRITERION, 2: other, 3: None}
    fractions = handle.stats.fractions()
    assert (fractions[[0, 3]] == 1.0).all()
    assert (fractions[[1, 2]] < 1.0).all()


def test_two_models_with_different_settings(tiny):
    first, second = tiny("llama"), tiny("qwen3")
    ids = prompt(1, 400)
    exact = generate(second, ids, max_new_tokens=5)
    with (
        art_torch.patch(first, CRITERION, **SIZES) as stopping,
        art_torch.patch(second, None, walk="oldest_first") as reading_all,
    ):
        generate(first, ids, max_new_tokens=5)
        got = generate(second, ids, max_new_tokens=5)
        assert torch.equal(got.sequences, exact.sequences)
    assert stopping.stats.read_fraction() < 1.0
    assert reading_all.stats.read_fraction() == 1.0
    assert stopping.stats.steps == reading_all.stats.steps == 4
