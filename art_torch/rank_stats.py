"""Statistics of all ranks of a tensor-parallel group, put together.

Tensor parallelism gives each rank some KV heads of every layer, so a rank counts those alone. All
ranks take the same steps; what differs between them is only which heads they see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["LayerShare", "all_shares", "join_shares"]


class LayerShare(NamedTuple):
    """What one rank has counted of one layer, on the CPU.

    Attributes:
        read: int64 ``[num_kv_heads]``, tokens read by the heads of the rank.
        present: int64 ``[num_kv_heads]``, tokens each head could have read.
        steps: Decode steps.
        step_read: int64 ``[kept_steps, num_kv_heads]``, of the steps that are kept one by one.
        step_present: int64 ``[kept_steps]``, the mean over the heads of the rank.
        mass: float64 ``[mass_steps]`` each: true, lowest and estimated share of the softmax mass;
            empty where it was not measured. The estimate is NaN where the step was not guided.
    """

    read: Tensor
    present: Tensor
    steps: int
    step_read: Tensor
    step_present: Tensor
    mass: tuple[Tensor, Tensor, Tensor]


Shares = dict[int, LayerShare]


def all_shares(shares: Shares, group: dist.ProcessGroup | None) -> list[Shares]:
    """The shares of all ranks of a group, in the order of the ranks.

    Args:
        shares: Those of this rank, by layer.
        group: None for all ranks.

    Raises:
        RuntimeError: torch.distributed is not available, or not initialised.
        ValueError: This rank is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "statistics can be gathered while torch.distributed is initialised: start the script "
            'with torchrun, and load the model with DistributedConfig(tp_plan="auto")'
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in the group: call this on its ranks only")
    gathered: list[Shares] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, shares, group=group)
    return gathered


def join_shares(ranks: list[Shares], num_kv_heads: Mapping[int, int]) -> Shares:
    """One share for each layer, with the KV heads of all ranks.

    Args:
        ranks: The shares of each rank, in the order of their heads.
        num_kv_heads: KV heads of each layer in the whole model. Where every rank has them all, as
            in a layer that is not split, the first rank speaks for the others.

    Raises:
        ValueError: The ranks have not counted the same steps, or their heads are not those of the
            model.
    """
    layers = [sorted(shares) for shares in ranks]
    for rank, found in enumerate(layers):
        if found != layers[0]:
            raise ValueError(
                f"every rank must have counted the same layers, got {layers[0]} on rank 0 and "
                f"{found} on rank {rank}"
            )
    return {
        layer: _join(layer, [shares[layer] for shares in ranks], num_kv_heads[layer])
        for layer in layers[0]
    }


def _join(layer: int, shares: list[LayerShare], num_kv_heads: int) -> LayerShare:
    first = shares[0]
    for rank, share in enumerate(shares):
        if share.steps != first.steps:
            raise ValueError(
                f"every rank must have taken the same steps, got {first.steps} of layer {layer} on "
                f"rank 0 and {share.steps} on rank {rank}"
            )
    heads = [len(share.read) for share in shares]
    if all(count == num_kv_heads for count in heads):
        return first
    if sum(heads) != num_kv_heads:
        raise ValueError(
            f"layer {layer} has {num_kv_heads} KV heads, the ranks have counted {heads}: gather "
            "over the group of the tensor parallelism"
        )
    measured = [len(share.mass[0]) for share in shares]
    if len(set(measured)) > 1:
        raise ValueError(
            f"every rank must have measured the mass of the same steps, got {measured} steps of "
            f"layer {layer}: patch with the same measure_mass on all ranks"
        )
    weights = torch.tensor(heads, dtype=torch.float64) / num_kv_heads
    true, lowest, estimated = (
        torch.stack(values) for values in zip(*(share.mass for share in shares), strict=True)
    )
    # A press may leave more to the heads of one rank than to those of another, which then alone has
    # enough to be guided.
    guided = weights[:, None] * ~estimated.isnan()
    estimate = (guided * estimated.nan_to_num()).sum(0) / guided.sum(0)
    step_present = torch.stack([share.step_present for share in shares])
    return first._replace(
        read=torch.cat([share.read for share in shares]),
        present=torch.cat([share.present for share in shares]),
        step_read=torch.cat([share.step_read for share in shares], dim=1),
        step_present=(weights @ step_present.double()).round().long(),
        mass=(weights @ true, lowest.amin(0), estimate),
    )
