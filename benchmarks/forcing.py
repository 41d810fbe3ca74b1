"""Teacher forcing many tokens in one pass: exactly what single steps would give, much sooner.

In a decode step only the attention looks back. So all following tokens of a text can go through
the model in one pass, if every token attends as one row of a batch of decode steps on the same
cache: row t sees the tokens up to its own, in the order and with the rule that is measured.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "art_forcing"
CHUNK = 512  # tokens of a prefill pass
UNIT = 16
GROUP = 64  # tokens coded together, and tokens of a block


@dataclass
class Step:
    """What a rule sees of one layer: ``rows`` decode steps on one cache."""

    layer: int
    query: Tensor  # [rows, num_q_heads, head_dim]
    keys: Tensor  # [num_kv_heads, tokens, head_dim], the new ones included
    values: Tensor
    seq_lens: Tensor  # int32 [rows]
    present: int  # tokens before the pass
    scale: float
    memory: dict[Any, Any]  # kept as long as the document; for codes of its keys


# Returns the output [rows, num_q_heads, head_dim] and tokens read int32 [rows, num_kv_heads].
Rule = Callable[[Step], tuple[Tensor, Tensor]]


@dataclass
class Document:
    """Keys and values of all layers, ``present`` tokens of them valid."""

    capacity: int
    present: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)  # [num_kv_heads, capacity, head_dim]
    values: dict[int, Tensor] = field(default_factory=dict)
    memory: dict[Any, Any] = field(default_factory=dict)


@dataclass
class _Pass:
    document: Document
    rule: Rule | None  # None while prefilling
    seq_lens: Tensor
    read: list[Tensor] = field(default_factory=list)  # share of the visible tokens, per layer


class Forcing:
    """A model whose attention is ours while :meth:`prefill` and :meth:`force` run."""

    def __init__(self, model: Any) -> None:
        self.model = model
        AttentionInterface.register(NAME, self._attention)
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)
        model.set_attn_implementation(NAME)
        self._pass: _Pass | None = None

    def prefill(self, tokens: Tensor, capacity: int, document: Document | None = None) -> Document:
        """A document of ``tokens`` (int64 ``[n]``) with room for ``capacity`` tokens.

        Args:
            tokens: What the document holds afterwards.
            capacity: Tokens it must be able to hold, a multiple of 64.
            document: One that holds the first of these tokens, to go on with.
        """
        document = document or Document(capacity)
        document.memory.clear()
        for start in range(document.present, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            self._run(document, chunk, None, 1)
            document.present = start + len(chunk)
        return document

    @contextlib.contextmanager
    def aside(self, document: Document, tokens: Tensor) -> Iterator[None]:
        """Has ``tokens`` behind the document, prefilled, and takes them away again."""
        present = document.present
        self._run(document, tokens, None, 1)
        document.present += len(tokens)
        try:
            yield
        finally:
            document.present = present

    def force(self, document: Document, tokens: Tensor, rule: Rule) -> tuple[Tensor, float]:
        """Predictions after each of ``tokens``, and the share of tokens read.

        Returns:
            Logits ``[tokens, vocabulary]``, and the mean over rows, layers with a rule and heads.
        """
        return self._run(document, tokens, rule, len(tokens))

    def _run(
        self, document: Document, tokens: Tensor, rule: Rule | None, keep: int
    ) -> tuple[Tensor, float]:
        positions = torch.arange(document.present, document.present + len(tokens))
        self._pass = _Pass(document, rule, (positions + 1).to(torch.int32))
        try:
            output = self.model(
                tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep
            )
            read = self._pass.read
        finally:
            self._pass = None
        return output.logits[0], float(torch.stack(read).mean()) if read else math.nan

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        assert self._pass is not None
        document, layer, start = self._pass.document, module.layer_idx, self._pass.document.present
        if layer not in document.keys:
            for store, new in ((document.keys, key), (document.values, value)):
                store[layer] = new.new_zeros(new.shape[1], document.capacity, new.shape[3])
        end = start + key.shape[2]
        document.keys[layer][:, start:end] = key[0]
        document.values[layer][:, start:end] = value[0]
        keys, values = document.keys[layer][:, :end], document.values[layer][:, :end]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self._pass.rule is None or sliding_window is not None:
            out = _causal(query, keys, values, start, scale, sliding_window)
            return out, None
        step = Step(
            layer,
            query[0].transpose(0, 1),
            keys,
            values,
            self._pass.seq_lens,
            start,
            scale,
            document.memory,
        )
        result, tokens_read = self._pass.rule(step)
        self._pass.read.append((tokens_read / self._pass.seq_lens[:, None]).mean())
        return result[None], None


def _causal(
    query: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, window: int | None
) -> Tensor:
    """Exact attention ``[1, rows, num_q_heads, head_dim]`` of new tokens."""
    first = 0 if window is None else max(0, start + 1 - window)
    rows = torch.arange(start, start + query.shape[2])[:, None]
    columns = torch.arange(first, keys.shape[1])[None]
    mask = columns <= rows
    if window is not None:
        mask &= columns > rows - window
    groups = query.shape[1] // keys.shape[0]
    k = keys[None, :, first:].repeat_interleave(groups, 1)
    v = values[None, :, first:].repeat_interleave(groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, k, v, attn_mask=mask[None, None], scale=scale
    )
    return out.transpose(1, 2)
