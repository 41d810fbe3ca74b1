"""Two processes that share the heads of a model decode as one process does.

Started with torchrun, this file is what the processes run; pytest starts it so, and compares.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import LAYERS, PAD, TINY, VOCAB, prompt
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import art_torch
from art_torch.stats import ReadStats

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
RANKS = 2
STEPS = 6
RULE = art_torch.Stability(d_scale=0.3, d_direction=0.1, patience=1)
SMALL = {"num_pinned": 1, "block_size": 16, "unit_size": 8}
MODELS = ("gemma2", "gpt_oss", "llama", "phi3", "qwen3")
# Their attention is not split: every rank has all heads.
WHOLE = ("gpt_oss", "phi3")
SETTINGS = {
    "off": {"criterion": None},
    "on": {"criterion": RULE, "measure_mass": True} | SMALL,
    "guided": {"criterion": RULE, "walk": "guided"},
}


def save_model(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = TINY[name]()
    config.vocab_size = VOCAB + 1  # even: of the output layer each rank has a half
    model = AutoModelForCausalLM.from_config(config)
    if name == "gpt_oss":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, std=1.0)
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)


class Recorder:
    """Where each KV head stopped, call by call: int32 ``[batch, num_kv_heads]``."""

    def __init__(self) -> None:
        self.stops: list[torch.Tensor] = []

    def __call__(self, layer: int, arguments: dict[str, Any], result: Any) -> None:
        self.stops.append(result.stop_block.clone())


def decode(model: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """What a rank, or a process of its own, sees of one generation."""
    recorder = Recorder()
    cache = art_torch.ARTCache(model.config)
    ids = prompt(2, 330)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    ids[0, :17] = PAD
    with art_torch.patch(model, on_call=recorder, **settings) as handle:
        tokens = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
        )
    heads = cache.layers[0].storage.num_kv_heads
    return {"tokens": tokens, "stops": recorder.stops, "handle": handle, "heads": heads}


def of_stats(stats: ReadStats) -> dict[str, Any]:
    return {
        "read": stats.tokens_read(),
        "present": stats.tokens_present(),
        "steps": stats.steps,
        "fraction": stats.read_fraction(),
        "fallbacks": stats.exact_fallbacks,
        "per_step": [stats.per_step(layer) for layer in stats.layers],
    }


def run_rank(folder: Path) -> None:
    """Every model with every setting, on this rank alone and together with the others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name in MODELS:
        own = AutoModelForCausalLM.from_pretrained(folder / name)
        split = AutoModelForCausalLM.from_pretrained(
            folder / name, distributed_config=DistributedConfig(tp_plan="auto")
        )
        for setting, arguments in SETTINGS.items():
            alone, together = decode(own, arguments), decode(split, arguments)
            gathered = together.pop("handle").gather_stats()
            handle = alone.pop("handle")
            ranks = [None] * RANKS
            dist.all_gather_object(ranks, together)
            result = {"alone": alone, "ranks": ranks}
            result |= {"stats": of_stats(gathered), "alone_stats": of_stats(handle.stats)}
            if "measure_mass" in arguments:
                result["mass"] = gathered.mass_read(), handle.stats.mass_read()
            results[f"{name} {setting}"] = result
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


def torchrun(ranks: int, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={ranks}", str(script), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in MODELS:
        save_model(name, folder / name)
    done = torchrun(RANKS, Path(__file__), str(folder))
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def cases(*settings: str) -> Any:
    return pytest.mark.parametrize("case", [f"{n} {s}" for n in MODELS for s in settings])


@cases(*SETTINGS)
def test_tokens_are_those_of_one_process(results, case):
    for of_rank in results:
        result = of_rank[case]
        for rank in result["ranks"]:
            assert torch.equal(rank["tokens"], result["alone"]["tokens"])


@cases(*SETTINGS)
def test_a_rank_has_its_share_of_the_heads(results, case):
    result = results[0][case]
    share = 1 if case.startswith(WHOLE) else RANKS
    for rank in result["ranks"]:
        assert rank["heads"] * share == result["alone"]["heads"]


@cases("on", "guided")
def test_heads_stop_where_they_stop_in_one_process(results, case):
    result = results[0][case]
    alone = result["alone"]["stops"]
    assert len(alone) == (STEPS - 1) * LAYERS
    assert any((stops >= 0).any() for stops in alone)
    ranks = [rank["stops"] for rank in result["ranks"]]
    for call, stops in enumerate(alone):
        of_ranks = [stops_of_rank[call] for stops_of_rank in ranks]
        together = of_ranks[0] if case.startswith(WHOLE) else torch.cat(of_ranks, dim=1)
        assert torch.equal(together, stops)


@cases(*SETTINGS)
def test_gathered_statistics_are_those_of_one_process(results, case):
    for of_rank in results:
        result = of_rank[case]
        torch.testing.assert_close(result["stats"], result["alone_stats"], rtol=0, atol=0)
        assert result["stats"]["steps"] == STEPS - 1
        assert result["stats"]["fraction"] < 1 or not case.endswith("on")


@cases("on")
def test_gathered_mass_is_that_of_one_process(results, case):
    gathered, alone = results[1][case]["mass"]
    torch.testing.assert_close(gathered, alone, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (gathered.true < 1).any()


# ---------------------------------------------------------------- the example

EXAMPLE = ROOT / "examples" / "tensor_parallel.py"


def tokens_of(done: subprocess.CompletedProcess[str]) -> list[int]:
    assert done.returncode == 0, done.stderr
    text = done.stdout.partition("tokens: [")[2].partition("]")[0]
    return [int(token) for token in text.split(",")]


def test_the_example_writes_what_one_process_writes(tmp_path):
    save_model("llama", tmp_path)
    arguments = ("--model", str(tmp_path), "--preset", "none", "--max-new-tokens", "5")
    both, one = (torchrun(ranks, EXAMPLE, *arguments) for ranks in (RANKS, 1))
    assert tokens_of(both) == tokens_of(one)
    assert len(tokens_of(both)) == 5
    for done, heads in ((both, 1), (one, 2)):
        assert f"over gloo on cpu, {heads} of 2 KV heads in each" in done.stdout
        assert done.stdout.count("KV tokens read, 4 decode steps") == 1


def test_the_example_reads_less_by_a_preset():
    done = torchrun(RANKS, EXAMPLE, "--max-new-tokens", "3")
    assert len(tokens_of(done)) == 3
    assert "2 processes over gloo on cpu, 2 of 4 KV heads in each" in done.stdout
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("│   all"))
    assert 0 < float(row.split("│")[2].strip(" %")) < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "start this with torchrun"),
        (("--max-new-tokens", "1"), "must be at least 2, got 1"),
        (("--prompt", "Once"), "--prompt needs --model"),
    ],
)
def test_the_example_says_what_is_wrong(arguments, message):
    command = [sys.executable, str(EXAMPLE), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
