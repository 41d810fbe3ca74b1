"""Which tokens the rows of a cache hold, counted on the host: pads, windows and lengths.

Pad tokens are not stored, and a window leaves tokens behind. So a token has two numbers: its padded
position, as the caller counts, and its index among the stored tokens of its row. Nothing here knows
pages; :mod:`art_torch.cache` finds them by the index.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from art_torch.page_map import BoolArray, IntArray

__all__ = ["TokenCounts"]


class TokenCounts:
    """The tokens of each row.

    Args:
        rows: Sequences, empty at first.
        window: Tokens a query sees, its own included; None for all.

    Attributes:
        lens: int32 ``[rows]``, tokens that are no pads. Changed in place by :meth:`append` and
            :meth:`crop`: a tensor may share its memory.
        padded_len: Tokens per row, pads included.
        real: bool ``[rows, padded_len]``, False for a pad; None if there never was one.
        kept_from: int64 ``[rows]``, index of the first token that is still stored.
        static_len: Above 0 while a :class:`~art_torch.static_lengths.StaticLengths` counts instead,
            up to this length; what is here are the counts of before.
    """

    def __init__(self, rows: int, window: int | None) -> None:
        self.window = window
        self.lens: npt.NDArray[np.int32] = np.zeros(rows, np.int32)
        self.padded_len = 0
        self.real: BoolArray | None = None
        self.kept_from: IntArray = np.zeros(rows, np.int64)
        self.static_len = 0
        self._changed()

    def _changed(self) -> None:
        """Forgets what was computed: the layers of a pass ask for it one after another."""
        self._visible: int | None = None
        self._longest: int | None = None

    # ---------------------------------------------------------------- changes

    def append(
        self, lens: npt.NDArray[np.int32 | np.int64], tokens: int, real: BoolArray | None
    ) -> None:
        """Counts new tokens.

        Args:
            lens: int ``[rows]``, what becomes of :attr:`lens`.
            tokens: New tokens a row, pads included.
            real: bool ``[rows, tokens]``, False for a pad; None if there is none.
        """
        if self.real is None and real is not None and not real.all():
            self.real = np.ones((len(lens), self.padded_len), np.bool_)
        if self.real is not None:
            new = np.ones((len(lens), tokens), np.bool_) if real is None else real
            self.real = np.concatenate([self.real, new], axis=1)
        self.lens[:] = lens
        self.padded_len += tokens
        self._changed()

    def replace_pads(self, padded_len: int) -> None:
        """Rows are as long as this from now on, and what pads there were is up to the caller."""
        self.real, self.padded_len = None, padded_len

    def crop(self, tokens: int) -> None:
        """Removes the last ``tokens`` padded positions of every row.

        Raises:
            ValueError: ``tokens`` is negative or more than there are.
            RuntimeError: The window has already dropped tokens that would be visible again.
        """
        if not 0 <= tokens <= self.padded_len:
            raise ValueError(f"can crop 0 to {self.padded_len} tokens, got {tokens}")
        end = self.padded_len - tokens
        removed = tokens if self.real is None else self.real[:, end:].sum(1)
        lens = self.lens.astype(np.int64) - removed
        if tokens > 0 and (self.kept_from > self.invisible(lens)).any():
            raise RuntimeError(
                f"cannot crop {tokens} tokens: the sliding window of {self.window} has dropped "
                "tokens that would be visible again; call activate_past_recording() first"
            )
        if self.real is not None:
            self.real = self.real[:, :end]
        self.lens[:] = lens
        self.padded_len = end
        self._changed()

    def forget_before(self, first: IntArray) -> None:
        """Tokens before index ``first``, int64 ``[rows]``, are stored no more."""
        if self.window is not None:  # or nothing is ever forgotten
            self.kept_from = np.maximum(self.kept_from, first)

    def begin_static(self, length: int) -> None:
        """Leaves counting to tensors, for rows of up to this length."""
        self.static_len = length
        self._changed()

    def end_static(self, lens: npt.NDArray[np.int32], tokens: int) -> None:
        """Counts again, after so many tokens a row; ``lens`` are what the tensors say."""
        self.static_len = 0
        self.append(lens, tokens, None)

    def select(self, rows: IntArray) -> None:
        """Row i becomes the old row ``rows[i]``."""
        self.lens, self.kept_from = self.lens[rows], self.kept_from[rows]
        self.real = None if self.real is None else self.real[rows]
        self._changed()

    # ---------------------------------------------------------------- totals

    @property
    def known_lens(self) -> npt.NDArray[np.int32]:
        """:attr:`lens`, for who must not ask while only a tensor knows them.

        Raises:
            RuntimeError: The cache is preallocated.
        """
        if self.static_len:
            raise RuntimeError(
                f"the lengths of a cache that is preallocated for {self.static_len} tokens are "
                "tensors: read seq_lens, or call leave_static() first"
            )
        return self.lens

    @property
    def longest(self) -> int:
        """Tokens of the longest row; not while the cache is preallocated."""
        if self._longest is None:
            self._longest = int(self.known_lens.max(initial=0))
        return self._longest

    def visible_total(self, rows: BoolArray | None = None) -> int:
        """Tokens the queries of the last pass may see, summed over the rows (or some of them).

        Not while the cache is preallocated.
        """
        if rows is None and self._visible is not None:
            return self._visible
        lens = self.known_lens
        lens = lens if self.window is None else np.minimum(lens, self.window)
        if rows is not None:
            return int(lens[rows].sum())
        self._visible = int(lens.sum())
        return self._visible

    # ---------------------------------------------------------------- what a window shows

    def invisible(self, lens: IntArray) -> IntArray:
        """Tokens that the next queries of rows of these lengths cannot see, int64 ``[rows]``."""
        if self.window is None:
            return np.zeros_like(lens)
        return np.maximum(0, lens + 1 - self.window)

    def first_needed(self, before: IntArray, after: IntArray) -> IntArray:
        """First token worth storing: a prefill longer than the window leaves only its end.

        That is what its own last query sees, for layers that share these keys may ask with it.

        Args:
            before: int64 ``[rows]``, lengths before the prefill.
            after: int64 ``[rows]``, lengths after it.
        """
        if self.window is None:
            return np.zeros_like(before)
        is_long = after - before >= self.window
        return np.where(is_long, np.maximum(0, after - self.window), 0)

    # ---------------------------------------------------------------- from positions to indices

    def new_indices(
        self, tokens: int, real: BoolArray | None, keep_from: IntArray
    ) -> tuple[IntArray, BoolArray]:
        """Indices of tokens that :meth:`append` is about to count.

        Args:
            tokens: As there.
            real: As there.
            keep_from: int64 ``[rows]``, index of the first one to store.

        Returns:
            Indices, and which of them are to be stored, ``[rows, tokens]`` each.
        """
        rank = np.arange(tokens)[None, :] if real is None else real.cumsum(1) - 1
        index = self.lens.astype(np.int64)[:, None] + rank
        stored = index >= keep_from[:, None]
        return index, stored if real is None else stored & real

    def indices(self, start: int, end: int) -> tuple[IntArray, BoolArray]:
        """Indices at padded positions, and which are stored, ``[rows, end - start]`` each."""
        if self.real is None:
            index = np.tile(np.arange(start, end), (len(self.lens), 1))
            return index, index >= self.kept_from[:, None]
        index = self.real.cumsum(1)[:, start:end] - 1
        return index, self.real[:, start:end] & (index >= self.kept_from[:, None])
