"""Models of bench_tensor_parallel.py, whole and split among the ranks, and the ranks themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

COLLECTIVE_SECONDS = 180  # longer than the other ranks wait for the first one alone


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def synchronize(self) -> None:
        """Waits for the device of this rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def from_first(self, value: Any) -> Any:
        """What the first rank passes, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def from_all(self, value: Any) -> list[Any]:
        """What each rank passes, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.device.type == "cuda":
            dist.barrier(device_ids=[self.device.index])
        else:
            dist.barrier()


@contextmanager
def joined_ranks(on_gpu: bool) -> Iterator[Ranks]:
    """Joins the other processes that torchrun has started."""
    if "RANK" not in os.environ:
        raise SystemExit("start this with torchrun, such as: torchrun --nproc-per-node 2 <file>")
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    if on_gpu:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(
                f"there must be a GPU for each process, got {torch.cuda.device_count()} for "
                f"{os.environ['LOCAL_WORLD_SIZE']} (without one try --smoke)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- shapes


def llama_8b(smoke: bool, ranks: int) -> LlamaConfig:
    """The shape of Llama 3.1 8B; tiny for trying the script out."""
    if smoke:
        return _config(4, 64, 96, 4 * ranks, 2 * ranks, 32, 128 * ranks, 0.02)
    return _config(32, 4096, 14336, 32, 8, 128, 128256, 0.02)


def tiny(ranks: int) -> LlamaConfig:
    return _config(4, 64 * ranks, 96 * ranks, 4 * ranks, 2 * ranks, 32, 128 * ranks, 0.3)


def smollm2(smoke: bool, ranks: int) -> LlamaConfig:
    """The shape of SmolLM2-135M; of its 3 KV heads there are as many more as the ranks need."""
    kv_heads = -(-3 // ranks) * ranks
    layers, vocab = (2, 128 * ranks) if smoke else (30, 49152)
    return _config(layers, 576, 1536, 3 * kv_heads, kv_heads, 64, vocab, 0.1)


def _config(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    initializer_range: float,
) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        # Attention of random models is even, and their best tokens are close, unless it is large.
        initializer_range=initializer_range,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def check_divisible(config: LlamaConfig, ranks: int) -> None:
    """Ends the run where a model cannot be split among so many ranks."""
    for name in ("num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % ranks:
            raise SystemExit(
                f"{name} {getattr(config, name)} must be a multiple of the processes, got {ranks}"
            )


# ---------------------------------------------------------------- weights


def whole_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """All of a model with random weights, made where it is used."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def split_model(
    config: LlamaConfig,
    dtype: torch.dtype,
    device: torch.device,
    ranks: int,
    weights: dict[str, torch.Tensor] | None = None,
) -> LlamaForCausalLM:
    """This rank's part of a model, split by transformers' own plan.

    Without weights each rank draws its own part where it is used: nothing is as large as the whole
    model, and no file is written. Models of this kind differ from any whole model.
    """
    if ranks == 1:
        model = whole_model(config, dtype, device)
        if weights is not None:
            model.load_state_dict(weights)
        return model
    torch.manual_seed(0)
    return LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=weights or {},
        dtype=dtype,
        distributed_config=DistributedConfig(tp_plan="auto"),
    ).eval()
