from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from art_torch.stats import ReadStats


def filled(steps: int = 200, layers: tuple[int, ...] = (0, 2), heads: int = 3) -> ReadStats:
    stats = ReadStats()
    for step in range(steps):
        for layer in layers:
            read = torch.full((2, heads), 10 + layer, dtype=torch.int32)
            read[:, 0] = step % 7
            stats.add(layer, read, present=100)
    return stats


def test_totals():
    stats = filled()
    first = sum(2 * (step % 7) for step in range(200))
    assert stats.layers == [0, 2]
    assert stats.steps == 200
    expected = torch.tensor([[first, 4000, 4000], [first, 4800, 4800]])
    assert torch.equal(stats.tokens_read(), expected)
    assert stats.tokens_present().tolist() == [20000, 20000]
    torch.testing.assert_close(stats.fractions(), expected.double() / 20000)
    assert stats.read_fraction() == pytest.approx(expected.sum().item() / (6 * 20000))


def test_per_step():
    read, present = filled().per_step(2)
    assert read.shape == (200, 3)
    assert read[:, 0].tolist() == [2 * (step % 7) for step in range(200)]
    assert (read[:, 1:] == 24).all()
    assert present.tolist() == [100] * 200


def test_rows_that_do_not_count():
    stats = ReadStats()
    read = torch.tensor([[1, 2], [30, 40], [500, 600]], dtype=torch.int32)
    stats.add(0, read, present=70, rows=np.array([True, False, True]))
    stats.add(0, read[:2], present=80)  # the batch may shrink
    assert stats.tokens_read().tolist() == [[501 + 31, 602 + 42]]
    assert stats.tokens_present().tolist() == [150]


def test_layers_with_different_heads():
    stats = ReadStats()
    stats.add(0, torch.ones(1, 4, dtype=torch.int32), present=2)
    stats.add(1, torch.ones(1, 1, dtype=torch.int32), present=4)
    assert stats.tokens_read().tolist() == [[1, 1, 1, 1], [1, -1, -1, -1]]
    assert stats.fractions()[1].isnan().tolist() == [False, True, True, True]
    assert stats.read_fraction() == pytest.approx(5 / (4 * 2 + 4))


def test_memory_is_bounded():
    stats = ReadStats(kept_steps=128)
    for step in range(1000):
        stats.add(0, torch.full((1, 1), step, dtype=torch.int32), present=1000)
    assert stats.steps == 1000
    assert stats.tokens_read().item() == sum(range(1000))  # all steps
    read, present = stats.per_step(0)
    assert len(read) == len(present) <= 128  # the last ones
    assert read[-1].item() == 999


def test_questions_do_not_shorten_what_is_kept():
    asked, left_alone = ReadStats(kept_steps=256), ReadStats(kept_steps=256)
    for step in range(1000):
        for stats in (asked, left_alone):
            stats.add(0, torch.full((1, 2), step, dtype=torch.int32), present=1000 + step)
        if step % 3:
            asked.read_fraction()
    for stats in (asked, left_alone):
        read, present = stats.per_step(0)
        assert read[:, 0].tolist() == list(range(1000 - len(read), 1000))
        assert (present == 1000 + read[:, 1]).all()
        assert len(read) == 3 * 64 + 1000 % 64
        assert stats.tokens_read().tolist() == [[sum(range(1000))] * 2]


def test_counting_on_the_device():
    stats = ReadStats()
    read = torch.tensor([[5, 7], [6, 8]], dtype=torch.int32)
    stats.add(3, read, present=30)
    stats.add_on_device(3, read, torch.tensor([20, 100], dtype=torch.int32), window=32)
    assert stats.steps == 2
    assert stats.tokens_read().tolist() == [[22, 30]]
    assert stats.tokens_present().tolist() == [30 + 20 + 32]
    assert stats.per_step(3)[1].tolist() == [30]  # the other step is in the totals only
    with pytest.raises(KeyError):
        stats.per_step(4)
    stats.reset()
    assert stats.layers == []
    stats.add_on_device(3, read, torch.tensor([20, 100], dtype=torch.int32), window=None)
    assert stats.tokens_present().tolist() == [120]


def test_nothing_counted_yet(tmp_path):
    stats = ReadStats()
    for ask in (stats.read_fraction, stats.summary, lambda: stats.plot(tmp_path / "map.png")):
        with pytest.raises(ValueError, match="no decode step has run"):
            ask()


def test_summary(capsys):
    stats = filled()
    stats.count_exact_fallback()
    stats.summary()
    text = capsys.readouterr().out
    assert "200 decode steps" in text
    assert f"{stats.read_fraction():.1%}" in text
    assert "24.0%" in text  # highest head of layer 2
    assert "1 layer calls fell back to exact attention" in text


@pytest.mark.parametrize("layers", [1, 30])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot(tmp_path, layers, ending):
    path = tmp_path / f"map.{ending}"
    filled(steps=3, layers=tuple(range(layers)), heads=8).plot(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") if ending == "png" else b"</svg>" in data
    if ending == "png":
        import matplotlib.image

        image = matplotlib.image.imread(path)[..., :3]
        assert math.isclose(image.max(), 1.0, abs_tol=0.01)
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_mass_is_shown_beside_what_was_read():
    stats = filled(steps=2)
    assert len(stats.table().columns) == 5
    with pytest.raises(ValueError, match="measured with patch"):
        stats.mass_read()
    stats.add_mass(2, torch.tensor([[0.9, 0.7]]), None)
    stats.add_mass(2, torch.tensor([[1.0, 0.8]]), torch.tensor([[0.95]]))
    mass = stats.mass_read()
    assert mass.true[1].item() == pytest.approx(0.85)
    assert mass.lowest[1].item() == pytest.approx(0.7)
    assert mass.estimated[1].item() == pytest.approx(0.95)  # of the guided steps
    assert torch.stack(mass)[:, 0].isnan().all()  # layer 0 was not measured
    cells = [list(column.cells) for column in stats.table().columns]
    assert [column[1] for column in cells[5:]] == ["85.00%", "70.00%", "95.00%"]
    assert [column[0] for column in cells[5:]] == ["", "", ""]
    stats.reset()
    with pytest.raises(ValueError, match="measured with patch"):
        stats.mass_read()
