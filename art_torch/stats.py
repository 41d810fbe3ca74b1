"""How much of the KV cache was read: per layer, KV head and step."""

from __future__ import annotations

from collections import deque
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from art_torch.mass import MassRead, MassSums
from art_torch.rank_stats import LayerShare

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ReadStats"]

# Of all heads together, or int64 [num_kv_heads] where they differ.
Present = int | npt.NDArray[np.int64]

_CHUNK = 64  # steps kept as they came before they are added up


class _LayerCounts:
    """Counts of one layer. Results wait in a list, so that a step costs no tensor operation."""

    def __init__(self, kept_steps: int) -> None:
        self.waiting: list[tuple[Tensor, npt.NDArray[np.bool_] | None, Present]] = []
        self.read: Tensor | None = None  # int64 [Hkv]
        self.present: Present = 0
        self.steps = 0
        chunks = max(1, kept_steps // _CHUNK)
        self.kept_read: deque[Tensor] = deque(maxlen=chunks)  # int64 [steps, Hkv]
        self.kept_present: deque[list[Present]] = deque(maxlen=chunks)
        self.device_read: Tensor | None = None  # int64 [Hkv]
        self.device_present: Tensor | None = None  # int64 []
        self.device_steps: Tensor | None = None  # int64 []

    def flush(self) -> None:
        if not self.waiting:
            return
        rows = []
        for tokens_read, used, _ in self.waiting:
            if used is not None:
                tokens_read = tokens_read[torch.from_numpy(used).to(tokens_read.device)]
            rows.append(tokens_read.sum(0))
        read, present = torch.stack(rows), [present for *_, present in self.waiting]
        total = read.sum(0)
        self.read = total if self.read is None else self.read + total
        self.present = self.present + sum(present)
        self.steps += len(present)
        self.waiting.clear()
        self._keep(read, present)

    def _keep(self, read: Tensor, present: list[Present]) -> None:
        if self.kept_read and len(self.kept_read[-1]) < _CHUNK:  # somebody asked in between
            read = torch.cat([self.kept_read.pop(), read])
            present = self.kept_present.pop() + present
        self.kept_read.extend(read.split(_CHUNK))
        self.kept_present.extend(
            present[start : start + _CHUNK] for start in range(0, len(present), _CHUNK)
        )


class ReadStats:
    """Tokens read over tokens present, of the decode steps of a patched model.

    Present are the tokens that exact attention would read (of a sliding window, those inside); a
    layer that stays exact counts as read in full. Pad rows are left out. Counting waits for no
    device; asking for a number does.

    Args:
        kept_steps: Steps whose counts are kept one by one; totals cover all steps.
    """

    def __init__(self, kept_steps: int = 16384) -> None:
        self._kept_steps = kept_steps
        self._layers: dict[int, _LayerCounts] = {}
        self._mass: dict[int, MassSums] = {}
        self._exact_fallbacks = 0

    # ---------------------------------------------------------------- counting

    def add(
        self,
        layer: int,
        tokens_read: Tensor,
        present: Present,
        rows: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Counts one step of one layer.

        Args:
            layer: Index of the layer.
            tokens_read: int32 ``[batch, num_kv_heads]``; must not be written to afterwards.
            present: Tokens visible to the rows together; int64 ``[num_kv_heads]`` where heads hold
                different tokens.
            rows: bool ``[batch]``, the rows that count; None for all.
        """
        counts = self._layers.get(layer)
        if counts is None:
            counts = self._layers[layer] = _LayerCounts(self._kept_steps)
        counts.waiting.append((tokens_read, rows, present))
        if len(counts.waiting) >= _CHUNK:
            counts.flush()

    def add_mass(self, layer: int, true: Tensor, estimated: Tensor | None) -> None:
        """Counts the softmax mass that one step of one layer has read.

        Args:
            layer: Index of the layer.
            true: ``[rows, num_q_heads]``, share of the mass.
            estimated: ``[rows, num_kv_heads]``, as the key codes say; None without them.
        """
        self._mass.setdefault(layer, MassSums()).add(true, estimated)

    def prepare_on_device(self, layer: int, num_kv_heads: int, device: torch.device) -> None:
        """Makes the counters of :meth:`add_on_device`, so that a compiled step only adds to them.

        Args:
            layer: Index of the layer.
            num_kv_heads: KV heads of the layer.
            device: Of the counters.
        """
        counts = self._layers.setdefault(layer, _LayerCounts(self._kept_steps))
        if counts.device_read is None:
            # Made under inference_mode(), the counters could not be written to outside of it.
            with torch.inference_mode(False):
                counts.device_read = torch.zeros(num_kv_heads, dtype=torch.int64, device=device)
                counts.device_present = torch.zeros((), dtype=torch.int64, device=device)
                counts.device_steps = torch.zeros((), dtype=torch.int64, device=device)
            if device.type != "cpu":  # a compiled step that is recorded keeps adding to them
                for counter in (counts.device_read, counts.device_present, counts.device_steps):
                    torch._dynamo.mark_static_address(counter, guard=False)

    def add_on_device(
        self, layer: int, tokens_read: Tensor, seq_lens: Tensor, window: int | None
    ) -> None:
        """Counts one step with tensor arithmetic only; its steps are kept as totals.

        Args:
            layer: Index of the layer.
            tokens_read: int32 ``[batch, num_kv_heads]``.
            seq_lens: int32 ``[batch]``.
            window: Tokens a query sees; None for all.
        """
        self.prepare_on_device(layer, tokens_read.shape[1], tokens_read.device)
        counts = self._layers[layer]
        assert counts.device_read is not None
        assert counts.device_present is not None
        assert counts.device_steps is not None
        visible = seq_lens if window is None else seq_lens.clamp(max=window)
        counts.device_read.add_(tokens_read.sum(0))
        counts.device_present.add_(visible.sum())
        counts.device_steps.add_(1)

    def count_exact_fallback(self) -> None:
        """Counts one call of one layer that a decode step handed to exact attention."""
        self._exact_fallbacks += 1

    def reset(self) -> None:
        """Forgets all counts."""
        for layer, old in list(self._layers.items()):
            counts = self._layers[layer] = _LayerCounts(self._kept_steps)
            # A compiled step keeps adding to these.
            for name in ("device_read", "device_present", "device_steps"):
                if (counter := getattr(old, name)) is not None:
                    setattr(counts, name, counter.zero_())
        self._mass.clear()
        self._exact_fallbacks = 0

    # ---------------------------------------------------------------- asking

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that were counted."""
        return sorted(layer for layer, counts in self._layers.items() if self._steps_of(counts))

    @property
    def steps(self) -> int:
        """Decode steps counted (of the layer with most)."""
        return max((self._steps_of(counts) for counts in self._layers.values()), default=0)

    @property
    def exact_fallbacks(self) -> int:
        """Calls of single layers that fell back to exact attention; they are not in the counts."""
        return self._exact_fallbacks

    def tokens_read(self) -> Tensor:
        """int64 ``[layers, num_kv_heads]``, summed over rows and steps; -1 where there is no head.

        Rows are the layers of :attr:`layers`.
        """
        return self._per_head(0)

    def tokens_present(self) -> Tensor:
        """int64 ``[layers]``, tokens one head could have read, summed over rows and steps.

        Where a press left more to some heads than to others, the mean over the heads, rounded.
        """
        totals = (self._totals(self._layers[layer])[1] for layer in self.layers)
        return torch.tensor([round(float(present.double().mean())) for present in totals])

    def _per_head(self, which: int) -> Tensor:
        """Tokens read (0) or present (1), int64 ``[layers, num_kv_heads]``, -1 for no head."""
        rows = [self._totals(self._layers[layer])[which] for layer in self.layers]
        width = max((len(row) for row in rows), default=0)
        table = torch.full((len(rows), width), -1, dtype=torch.int64)
        for index, row in enumerate(rows):
            table[index, : len(row)] = row
        return table

    def fractions(self) -> Tensor:
        """float64 ``[layers, num_kv_heads]``, read over present; NaN where there is no head."""
        read = self.tokens_read().to(torch.float64)
        return read.where(read >= 0, torch.nan) / self._per_head(1)

    def read_fraction(self) -> float:
        """Tokens read over tokens present, all layers, KV heads and steps together.

        Raises:
            ValueError: No decode step has run yet.
        """
        self._require_steps()
        read, present = (self._per_head(which).clamp(min=0).sum() for which in (0, 1))
        return float(read / present)

    def mass_read(self) -> MassRead:
        """Softmax mass read by each of :attr:`layers`, true and estimated.

        Raises:
            ValueError: It was not measured; see ``measure_mass`` of :func:`art_torch.patch`.
        """
        if not self._mass:
            raise ValueError("softmax mass is measured with patch(..., measure_mass=True) only")
        nothing = (torch.nan,) * 3
        rows = [
            self._mass[layer].means() if layer in self._mass else nothing for layer in self.layers
        ]
        return MassRead(*torch.tensor(rows, dtype=torch.float64).T)

    def per_step(self, layer: int) -> tuple[Tensor, Tensor]:
        """The kept steps of one layer, oldest first.

        Steps on a preallocated cache, compiled and recorded ones among them, are in the totals
        only.

        Args:
            layer: Index of the layer.

        Returns:
            Tokens read, int64 ``[steps, num_kv_heads]``, and tokens present, int64 ``[steps]``
            (the rounded mean over the heads where they differ).

        Raises:
            KeyError: The layer was not counted.
        """
        counts = self._layers[layer]
        counts.flush()
        if not counts.kept_read:
            return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        present = [round(np.mean(value)) for chunk in counts.kept_present for value in chunk]
        return torch.cat([chunk.cpu() for chunk in counts.kept_read]), torch.tensor(present)

    # ---------------------------------------------------------------- several ranks

    def shares(self) -> dict[int, LayerShare]:
        """The counts of each layer, on the CPU, to be sent to other ranks."""
        shares = {}
        for layer in self.layers:
            counts = self._layers[layer]
            read, present = self._totals(counts)
            mass = self._mass.get(layer, MassSums()).per_step()
            shares[layer] = LayerShare(
                read, present, self._steps_of(counts), *self.per_step(layer), mass
            )
        return shares

    @classmethod
    def of_shares(cls, shares: dict[int, LayerShare], exact_fallbacks: int) -> ReadStats:
        """Statistics with the counts of :meth:`shares`, to be asked and shown."""
        stats = cls()
        for layer, share in shares.items():
            counts = stats._layers[layer] = _LayerCounts(stats._kept_steps)
            counts.read, counts.steps = share.read, share.steps
            counts.present = share.present.numpy()
            if len(share.step_read):
                counts.kept_read.append(share.step_read)
                counts.kept_present.append(share.step_present.tolist())
            if len(share.mass[0]):
                stats._mass[layer] = MassSums.of_steps(*share.mass)
        stats._exact_fallbacks = exact_fallbacks
        return stats

    def _steps_of(self, counts: _LayerCounts) -> int:
        on_device = 0 if counts.device_steps is None else int(counts.device_steps)
        return counts.steps + len(counts.waiting) + on_device

    def _totals(self, counts: _LayerCounts) -> tuple[Tensor, Tensor]:
        """Tokens read and present, int64 ``[num_kv_heads]`` each."""
        counts.flush()
        parts = [part.cpu() for part in (counts.read, counts.device_read) if part is not None]
        on_device = 0 if counts.device_present is None else int(counts.device_present)
        read, present = torch.stack(parts).sum(0), torch.as_tensor(counts.present + on_device)
        return read, present.expand_as(read)

    def _require_steps(self) -> None:
        if not self.steps:
            raise ValueError("no decode step has run with the patched model yet")

    # ---------------------------------------------------------------- showing

    def table(self) -> Table:
        """The numbers of :meth:`summary` as a rich table."""
        from rich.table import Table

        self._require_steps()
        table = Table(title=f"KV tokens read, {self.steps} decode steps")
        mass = torch.stack(self.mass_read()).T if self._mass else torch.empty(len(self.layers), 0)
        titles = ("mass read", "lowest", "estimated")[: mass.shape[1]]
        for title in ("layer", "mean", "lowest head", "highest head", "tokens present", *titles):
            table.add_column(title, justify="right")
        present = self.tokens_present().tolist()
        for layer, row, count, shares in zip(
            self.layers, self.fractions(), present, mass, strict=True
        ):
            row = row[~row.isnan()]
            cells = (f"{x:.1%}" for x in (row.mean(), row.min(), row.max()))
            more = ("" if x.isnan() else f"{x:.2%}" for x in shares)
            table.add_row(str(layer), *cells, f"{count:,}", *more)
        table.add_section()
        table.add_row("all", f"{self.read_fraction():.1%}", "", "", f"{sum(present):,}")
        if self._exact_fallbacks:
            table.caption = f"{self._exact_fallbacks:,} layer calls fell back to exact attention"
        return table

    def summary(self) -> None:
        """Prints, per layer, the part of the KV cache that was read.

        Raises:
            ValueError: No decode step has run yet.
            ModuleNotFoundError: The package ``rich`` is missing.
        """
        from rich.console import Console

        Console().print(self.table())

    def plot(self, path: str | PathLike[str]) -> None:
        """Saves a heat map, layers x KV heads, of the part of the KV cache that was read.

        Args:
            path: Image file; its ending chooses the format.

        Raises:
            ValueError: No decode step has run yet.
            ModuleNotFoundError: The package ``matplotlib`` is missing.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter

        self._require_steps()
        fractions = self.fractions().T.numpy()
        heads, layers = fractions.shape
        figure = Figure(
            figsize=(min(16.0, 3.2 + 0.32 * layers), min(10.0, 1.9 + 0.32 * heads)),
            dpi=150,
            layout="constrained",
        )
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        image = axes.imshow(
            fractions, aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest"
        )
        axes.set_xlabel("layer")
        axes.set_ylabel("KV head")
        axes.set_xticks(range(0, layers, max(1, layers // 16)))
        axes.set_xticklabels([str(self.layers[i]) for i in axes.get_xticks().astype(int)])
        axes.set_yticks(range(0, heads, max(1, heads // 16)))
        axes.set_title(
            f"KV tokens read: {self.read_fraction():.1%} over {self.steps} decode steps", loc="left"
        )
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("read / present")
        figure.savefig(path)
