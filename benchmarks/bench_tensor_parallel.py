"""Decode steps of a model that is split among the GPUs of one machine, beside those of one GPU.

    torchrun --nproc-per-node 2 benchmarks/bench_tensor_parallel.py                # two minutes
    torchrun --nproc-per-node 2 benchmarks/bench_tensor_parallel.py --budget 90    # stops earlier
    torchrun --nproc-per-node 2 benchmarks/bench_tensor_parallel.py --smoke        # needs no GPU

First it checks, in float32, that the ranks together do what one device does: with thresholds off
the tokens of transformers' own attention, with a rule the same stop decisions for each KV head, and
the same statistics once they are gathered. Then it times decode steps of a model of the shape of
Llama 3.1 8B in bfloat16, split by transformers' own plan, with random weights and a cache of random
keys and values:

    art_dense       ARTCache, reads everything
    art_half        thresholds that every block meets, and a patience that ends half way
    art_guided_10   the guided walk, which ends after a tenth, also where reading all is faster
    sdpa_dynamic    the model's own attention on a DynamicCache
    sdpa_static     the same on a StaticCache

A step is what `model(...)` does in Python, so small ones take as long as their kernels take to be
launched (`us_until_launched` in the rows). All but sdpa_dynamic are therefore also timed as CUDA
graphs, unless `--no-graphs` is given. Where one GPU has no room for the cache of all layers, fewer
are timed, here and there, and the time of all is computed.

Writes `results/tensor-parallel-<device>.json` after every row, and a table beside it.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_gpu import driver_version, package_version
from common import RESULTS, _commit, device_name, slug, write_results
from gpu_timing import watchdog
from tp_checks import Check, run_checks
from tp_models import (
    Ranks,
    check_divisible,
    joined_ranks,
    llama_8b,
    smollm2,
    split_model,
    tiny,
    whole_model,
)
from tp_report import markdown_of
from tp_steps import (
    IMPLEMENTATIONS,
    SMOKE_FREE_BYTES,
    Point,
    Row,
    make_points,
    measure,
    profiled,
    release,
)
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import art_torch

PROMPT = 400  # tokens, of the checks
GRACE_SECONDS = 60  # past the budget, before a run that hangs is ended


class Results:
    """The result file of the first rank; the others write nothing."""

    def __init__(self, ranks: Ranks, folder: Path, commit: str | None) -> None:
        self.ranks = ranks
        on_gpu = ranks.device.type == "cuda"
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
            "art_torch": art_torch.__version__,
            "transformers": package_version("transformers"),
        }
        device = torch.cuda.get_device_name() if on_gpu else device_name()
        self.content: dict[str, Any] = {
            "device": device,
            "gpus": ranks.size,
            "driver": driver_version() if on_gpu else None,
            "versions": {name: text for name, text in versions.items() if text},
            "commit": commit or _commit(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "checks": [],
            "rows": [],
        }
        self.path = folder / f"tensor-parallel-{slug(device)}.json"

    def add(self, checks: list[Check], rows: list[Row]) -> None:
        """Adds to the file, and shows what was added."""
        if not self.ranks.first:
            return
        self.content["checks"] += checks
        self.content["rows"] += rows
        write_results("tensor-parallel", self.content, self.path)
        self.path.with_suffix(".md").write_text(markdown_of(self.content))
        for check in checks:
            print("passed" if check["passed"] else "FAILED", check, flush=True)
        for row in rows:
            print(row, flush=True)


def check_models(ranks: Ranks, results: Results, smoke: bool) -> None:
    models = {"tiny Llama": tiny(ranks.size), "SmolLM2-135M shape": smollm2(smoke, ranks.size)}
    for name, config in models.items():
        check_divisible(config, ranks.size)
        results.add(run_checks(name, config, ranks, PROMPT), [])
        release(ranks)


def time_models(ranks: Ranks, results: Results, smoke: bool, deadline: float, graphs: bool) -> None:
    """Every point on all GPUs, and then on the first one alone while the others wait."""
    config = llama_8b(smoke, ranks.size)
    check_divisible(config, ranks.size)
    split = split_model(config, torch.bfloat16, ranks.device, ranks.size)
    if ranks.size == 1:
        whole = split
    else:
        whole = whole_model(config, torch.bfloat16, ranks.device) if ranks.first else None
    with profiled(ranks):  # its first use leaves traces: all that is timed comes after it
        ranks.synchronize()
    release(ranks)
    smoke_free = SMOKE_FREE_BYTES * ranks.size
    free = smoke_free if smoke else torch.cuda.mem_get_info(ranks.device)[0]
    captured = {1: graphs, ranks.size: graphs}  # until it fails once

    def add(model: LlamaForCausalLM, impl: str, point: Point, gpus: int) -> None:
        rows = measure(model, impl, point, ranks, gpus, captured[gpus])
        captured[gpus] &= not any(row["note"].startswith("not captured") for row in rows)
        results.add([], rows)

    for point in make_points(config, ranks.from_first(free), smoke):
        for impl in IMPLEMENTATIONS if ranks.size > 1 else ():
            if not ranks.from_first(time.monotonic() < deadline):
                return
            add(split, impl, point, ranks.size)
        if ranks.first:
            for impl in IMPLEMENTATIONS:
                if time.monotonic() < deadline:
                    add(whole, impl, point, 1)
        ranks.wait()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode steps on several GPUs, and on one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--budget", type=float, default=150, help="seconds; 0 checks only")
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="tiny models, on the CPU")
    return parser.parse_args()


def main() -> None:
    started = time.monotonic()
    arguments = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("art_torch").setLevel(logging.ERROR)  # what walks lose is not measured here
    on_gpu = not arguments.smoke
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs NVIDIA GPUs (try --smoke)")
    deadline = started + arguments.budget
    with (
        watchdog(arguments.budget + GRACE_SECONDS, lambda: print("the run hangs", flush=True)),
        joined_ranks(on_gpu) as ranks,
    ):
        if on_gpu:  # torchrun leaves one thread, and weights of the checks are drawn on the CPU
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.size))
        results = Results(ranks, arguments.out, arguments.commit)
        check_models(ranks, results, arguments.smoke)
        time_models(ranks, results, arguments.smoke, deadline, not arguments.no_graphs)
        if ranks.first:
            print(f"{len(results.content['rows'])} rows in {results.path}", flush=True)
            failed = [check for check in results.content["checks"] if not check["passed"]]
        wrong = ranks.from_first(len(failed) if ranks.first else 0)
    if wrong:
        sys.exit(f"{wrong} checks failed")


if __name__ == "__main__":
    main()
