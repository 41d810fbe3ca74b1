"""What every call of the operator must satisfy against the float64 reference."""

import inspect
import math
from typing import NamedTuple

import pytest
import torch

from art_torch import decode_attention, reference


class Tally(NamedTuple):
    """(sequence, KV head) pairs seen, inside the decision margin, and stopped elsewhere there."""

    pairs: int = 0
    inside: int = 0
    different: int = 0

    def __add__(self, other):
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))


def check(inputs, criterion, result=None):
    """Compare one call with the reference: stops, tokens read, outputs and lse."""
    expected = inputs.call(reference.decode_attention, criterion=criterion)
    margin = reference.decision_margin(expected, criterion, inputs.dtype)
    result = inputs.call(decode_attention, criterion=criterion) if result is None else result
    assert result.out.dtype == inputs.dtype
    assert result.lse.dtype == torch.float32
    assert result.stop_block.dtype == result.tokens_read.dtype == torch.int32
    result = type(result)(*(t.cpu() for t in result))

    different = result.stop_block != expected.stop_block
    assert not (different & ~margin).any(), (
        f"stop blocks {result.stop_block.tolist()}, reference {expected.stop_block.tolist()}, "
        f"inside the margin {margin.tolist()}"
    )
    batch, num_kv_heads = margin.shape
    group = expected.out.shape[1] // num_kv_heads
    for b in range(batch):
        for h in range(num_kv_heads):
            _check_group(inputs, result, expected, b, h, slice(h * group, (h + 1) * group))
    return Tally(margin.numel(), int(margin.sum()), int(different.sum()))


def _check_group(inputs, result, expected, b, h, heads):
    stop = int(result.stop_block[b, h])
    tokens = tokens_until(inputs, b, h, stop)
    assert result.tokens_read[b, h] == len(tokens)
    out, lse = result.out[b, heads].double(), result.lse[b, heads].double()
    if len(tokens) == 0:
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        return
    if stop == expected.stop_block[b, h]:
        exact_out, exact_lse = expected.out[b, heads], expected.lse[b, heads]
    else:  # inside the margin, where stopping there is as right
        exact_out, exact_lse, _ = plain(inputs, b, heads, h, tokens, torch.float64)

    # Twice the error of plain PyTorch in the same dtype, an eps of the largest output (the least
    # that any result rounded to that dtype may be allowed), and the rounding of a float32 logit.
    plain_out, _, _ = plain(inputs, b, heads, h, tokens, inputs.dtype)
    _, plain_lse, magnitude = plain(inputs, b, heads, h, tokens, torch.float32)
    error = (out - exact_out).abs().max()
    allowed = 2 * (plain_out - exact_out).abs().max()
    allowed += (torch.finfo(inputs.dtype).eps + 2.0**-24 * magnitude) * exact_out.abs().max()
    assert error <= allowed, f"sequence {b}, KV head {h}: error {error:.2e} > {allowed:.2e}"

    # lse is float32 for every dtype; n terms of a sum that is folded block by block add up sqrt(n)
    # roundings, and half types may sum rounded probabilities.
    error = (lse - exact_lse).abs().max()
    allowed = 2 * (plain_lse - exact_lse).abs().max()
    roundings = len(tokens) ** 0.5 + exact_lse.abs().max() + magnitude
    allowed += torch.finfo(torch.float32).eps * roundings
    allowed += reference.PROBABILITY_ROUNDING.get(inputs.dtype, 0.0)
    assert error <= allowed, f"sequence {b}, KV head {h}: lse error {error:.2e} > {allowed:.2e}"


def tokens_until(inputs, b, h, stop):
    """Tokens of one head up to a stop block (-1: the whole walk), in walk order."""
    lens, options = inputs.tensors[-1], inputs.options
    starts, walk, pinned = (options.get(k) for k in ("seq_starts", "walk", "num_pinned"))
    unit, block = options.get("unit_size", 16), options.get("block_size", 64)
    seq_len = int(lens[b] if lens.ndim == 1 else lens[b, h])
    start = 0 if starts is None else int(starts[b])
    visible = reference.visible_tokens(seq_len, start, options.get("sliding_window"))
    if isinstance(walk, torch.Tensor):
        order = walk[b, h, : options["walk_lens"][b, h]].tolist()
    else:
        order = reference.walk_order(walk, visible, unit)
    if pinned is None:
        pinned = reference.default_pinned(walk, unit)
    pinned = int(pinned[b, h]) if isinstance(pinned, torch.Tensor) else pinned
    blocks = reference.cut_blocks(order, pinned, visible, block, unit)
    return torch.cat([torch.zeros(0, dtype=torch.long), *blocks[: stop + 1 if stop >= 0 else None]])


def plain(inputs, b, heads, h, tokens, dtype):
    """Softmax attention of one group over these tokens in plain PyTorch, computed in `dtype`.

    Returns out and lse as float64, and the magnitude of the terms that the logits are summed from.
    """
    query, _, _, table, lens = (t.cpu() for t in inputs.tensors)
    key_cache, value_cache = (t.cpu() for t in inputs.caches)
    options = inputs.options
    table = table[b] if table.ndim == 2 else table[b, h]
    page_size = key_cache.shape[1]
    pages, slots = table[tokens // page_size].long(), tokens % page_size
    keys, values = key_cache[pages, slots, h].to(dtype), value_cache[pages, slots, h].to(dtype)
    scale = options.get("scale") or 1 / math.sqrt(query.shape[-1])
    query = query[b, heads].to(dtype) * scale
    logits = query @ keys.T
    magnitude = (query.abs() @ keys.abs().T).max()
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    if options.get("alibi_slopes") is not None:
        slopes = options["alibi_slopes"].cpu()[heads, None].to(dtype)
        logits = logits + slopes * (tokens - (int(lens[b]) - 1)).to(dtype)
    lse = logits.logsumexp(-1)
    magnitude += logits.abs().max()
    if options.get("attn_sinks") is not None:
        logits = torch.cat([logits, options["attn_sinks"].cpu()[heads, None].to(dtype)], -1)
    out = torch.softmax(logits, -1)[:, : len(tokens)] @ values
    return out.double(), lse.double(), float(magnitude)


def call(function, given):
    """Call with what the function takes: the reference has no `out`, for example."""
    known = inspect.signature(function).parameters
    return function(**{k: v for k, v in given.items() if k in known})


def assert_refused(function, given, kind, *words):
    """The call raises, and the message holds these words: what came, and the argument's name."""
    with pytest.raises(kind) as caught:
        call(function, given)
    assert all(part in str(caught.value) for part in words), str(caught.value)
    assert len(str(caught.value)) > len("".join(words))
