"""A model whose heads are split among several processes decodes with ART.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py    # a small Llama with random weights
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --model path/or/hub-id --prompt "Once"

One process for each GPU, over NCCL; without a GPU they share the CPU, over gloo. The number of KV
heads must be a multiple of that of the processes. All of them write the same text; the first one
prints it, and what the KV heads of all have read.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

import art_torch
from art_torch import PRESETS, ARTCache, Stability


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder or hub id; a small Llama with random weights if left out")
    add("--prompt", help="text to continue, with --model; random tokens if left out")
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    add("--walk", default="guided", choices=["guided", "sink_recent", "oldest_first"])
    add("--preset", default="balanced", choices=[*PRESETS, "none"], help="none reads everything")
    add("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()
    if arguments.prompt is not None and arguments.model is None:
        parser.error("--prompt needs --model: random weights have no tokenizer")
    if arguments.max_new_tokens < 2:
        parser.error(f"--max-new-tokens must be at least 2, got {arguments.max_new_tokens}")
    if "RANK" not in os.environ:
        parser.error("start this with torchrun, such as: torchrun --nproc-per-node 2 <this file>")
    return arguments


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins the other processes, and yields the device of this one."""
    if torch.cuda.is_available():
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(
                f"there must be a GPU for each process, got {torch.cuda.device_count()} GPUs for "
                f"{os.environ['LOCAL_WORLD_SIZE']} processes"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # also where NCCL puts what it sends
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def random_llama(folder: str, ranks: int) -> None:
    """Saves a small Llama. Every process makes its own, with the same weights.

    That is before it joins the others, after which transformers saves in the first one alone.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128 * ranks,
        hidden_size=64 * ranks,
        intermediate_size=96 * ranks,
        num_hidden_layers=4,
        num_attention_heads=4 * ranks,
        num_key_value_heads=2 * ranks,
        head_dim=32,
        initializer_range=0.3,  # large enough for uneven attention
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def load(folder: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The part of a model that belongs to this process."""
    if dist.get_world_size() == 1:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, distributed_config=DistributedConfig(tp_plan="auto")
    )


def generate(
    arguments: argparse.Namespace, folder: str, device: torch.device, console: Console
) -> None:
    model = load(folder, getattr(torch, arguments.dtype), device)
    if arguments.prompt is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, 1500), generator=generator)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(arguments.prompt, return_tensors="pt").input_ids
    criterion: Stability | str | None = arguments.preset
    if arguments.preset == "none":
        criterion = None
    elif arguments.walk != "guided":
        criterion = PRESETS[arguments.preset]
    cache = ARTCache(model.config)
    # This shows what a walk reads, also where it saves no time.
    with art_torch.patch(model, criterion, arguments.walk, exact_where_faster=False) as handle:
        output = model.generate(
            ids.to(device),
            past_key_values=cache,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,  # drawn tokens would have to be drawn alike in all processes
        )
    new = output[0, ids.shape[1] :].tolist()
    console.print(f"tokens: {new}" if arguments.prompt is None else tokenizer.decode(new))
    own = handle.stats.tokens_read().shape[1]
    stats = handle.gather_stats()  # by all processes together
    console.print(stats.table())
    console.print(
        f"{dist.get_world_size()} processes over {dist.get_backend()} on {device.type}, "
        f"{own} of {stats.tokens_read().shape[1]} KV heads in each"
    )


def main() -> None:
    arguments = parse_arguments()
    transformers_logging.disable_progress_bar()
    if quiet := int(os.environ["RANK"]) > 0:
        logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            random_llama(folder, int(os.environ["WORLD_SIZE"]))
        with process_group() as device:
            generate(arguments, arguments.model or folder, device, Console(quiet=quiet))


if __name__ == "__main__":
    main()
