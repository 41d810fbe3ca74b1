"""What is truly left after each entry of an explicit walk, and calls of the bare operators."""

import math

import torch
from cases import Inputs
from coded import visible_of
from contract import plain

from art_torch.criterion import rules_of


def with_true_rest(inputs):
    """The same case with `log_rest` to float32; NaN where nobody may look."""
    host = inputs.to("cpu")
    options = host.options
    walk, lens, unit = options["walk"], options["walk_lens"], options.get("unit_size", 16)
    batch, num_q_heads = host.tensors[0].shape[:2]
    group = num_q_heads // walk.shape[1]
    rest = torch.full((batch, num_q_heads, walk.shape[-1]), math.nan)
    for b, h in [(b, h) for b in range(batch) for h in range(walk.shape[1])]:
        heads = slice(h * group, (h + 1) * group)
        later = torch.full((group,), -math.inf, dtype=torch.float64)
        for i in reversed(range(int(lens[b, h]))):
            tokens = _tokens(int(walk[b, h, i]), unit, visible_of(host, b, h))
            if len(tokens) == 0:
                continue
            rest[b, heads, i] = later.float()
            _, lse, _ = plain(host, b, heads, h, tokens, torch.float64)
            later = torch.logaddexp(later, lse)
    return Inputs(inputs.tensors, {**inputs.options, "log_rest": rest.to(inputs.tensors[0].device)})


def _tokens(unit, unit_size, visible):
    first, end = unit * unit_size, (unit + 1) * unit_size
    return torch.arange(
        max(first, visible.start), max(first, visible.start, min(end, visible.stop))
    )


def without_rest(inputs):
    """The same call for criteria that do not care what is left."""
    return Inputs(inputs.tensors, {k: v for k, v in inputs.options.items() if k != "log_rest"})


def bare_arguments(inputs, criterion):
    """Arguments of torch.ops.art.decode_attention, from those of the wrapper."""
    options = {k: v for k, v in inputs.options.items() if v is not None}
    if isinstance(options["walk"], str):
        options["walk_order"] = options.pop("walk")
    if isinstance(options.get("num_pinned"), torch.Tensor):
        options["num_pinned_per_head"] = options.pop("num_pinned")
    stability, residual_mass, all_agree = rules_of(criterion)
    options["criterion"] = 8 * all_agree
    if stability is not None:
        options["criterion"] += 1
        options |= {name: getattr(stability, name) for name in ("d_scale", "d_direction")}
        options["patience"] = stability.patience
    if residual_mass is not None:
        options["criterion"] += 2
        options["residual_mass"] = residual_mass.eps
    return options
