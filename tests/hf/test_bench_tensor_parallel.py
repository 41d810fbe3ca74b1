"""The benchmark of tensor parallelism, on the CPU with tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_tensor_parallel import RANKS, torchrun

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "bench_tensor_parallel.py"
IMPLEMENTATIONS = ("art_dense", "art_half", "art_guided_10", "sdpa_dynamic", "sdpa_static")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    done = torchrun(RANKS, SCRIPT, "--smoke", "--out", str(folder), "--commit", "abc")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("tensor-parallel-*.json")
    return path


def test_ranks_do_what_one_device_does(output):
    results = json.loads(output.read_text())
    assert results["commit"] == "abc"
    assert results["gpus"] == RANKS
    assert {check["model"] for check in results["checks"]} == {"tiny Llama", "SmolLM2-135M shape"}
    assert len(results["checks"]) == 6
    for check in results["checks"]:
        assert check["passed"]
        assert check["different"] == 0
        assert check["compared"] > 0


def test_times_of_one_device_and_of_all(output):
    rows = json.loads(output.read_text())["rows"]
    cases = {row["case"] for row in rows}
    assert cases == {"B1_S1024_H8/4_D32_bf16_L4", "B2_S1024_H8/4_D32_bf16_L2"}
    by_key = {(row["case"], row["impl"], row["gpus"], row["graph"]): row for row in rows}
    in_graphs = len(IMPLEMENTATIONS) - 1
    assert len(by_key) == len(rows) == len(cases) * (len(IMPLEMENTATIONS) + in_graphs) * 2
    for (case, impl, _, graph), row in by_key.items():
        assert row["note"] == ""
        assert 0 < row["us_until_launched"] <= row["us"] <= row["us_max"]
        assert row["us_min"] <= row["us"]
        assert graph or row["us_kernels"] > 0
        if case.endswith("_L4"):
            assert row["us_all_layers"] == row["us"]
        else:
            of_layer = row["us"] - row["us_half_layers"]
            assert row["us_all_layers"] == pytest.approx(row["us"] + 2 * of_layer)
        if impl.startswith("art_"):
            assert row["kv_heads_counted"] == 4
            at_most = {"art_dense": 1.0, "art_half": 0.52, "art_guided_10": 0.25}[impl]
            assert at_most - 0.05 < row["read"] <= at_most


def test_table(output):
    text = output.with_suffix(".md").read_text()
    assert "commit abc" in text
    lines = text.splitlines()
    assert sum(line.startswith("| `B1_S1024_H8/4_D32_bf16_L4` |") for line in lines) == 5
    assert sum(line.endswith("| yes |") for line in lines) == 6
    widths = {line.count("|") for line in lines if line.startswith("| `B")}
    assert widths == {14}


def test_points(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from tp_models import llama_8b
    from tp_steps import make_points

    points = make_points(llama_8b(smoke=False, ranks=2), 55 << 30, smoke=False)
    assert {(point.batch, point.tokens >> 10) for point in points} == {
        (batch, thousands) for batch in (1, 8, 32) for thousands in (8, 32)
    }
    for point in points:
        assert point.layers * point.layer_bytes < 50 << 30
        assert point.layers == 32 or point.layer_bytes == 4 << 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_gpus_and_torchrun():
    done = torchrun(1, SCRIPT)
    assert done.returncode != 0
    assert "needs NVIDIA GPUs (try --smoke)" in done.stderr
