"""The decode benchmark on the CPU runs, and its peers, goals and table are right."""

import json

import pytest
from scripts import benchmark_fixture, run_script

import art_torch

cpu_peers = benchmark_fixture("cpu_peers")
make_tables = benchmark_fixture("make_tables")
decode_report = benchmark_fixture("decode_report")


def test_bench_decode_runs(tmp_path):
    output = tmp_path / "decode.json"
    done = run_script("bench_decode.py", "--quick", "--no-peers", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "B3_S256_H8/2_D64_f16_p64_ragged" in done.stdout
    measured = json.loads(output.read_text())
    assert measured["device"]
    assert measured["simd"]
    assert set(measured["call_us"]) == {"torch.ops.art", "art_torch"}
    assert all(us > 0 for us in measured["call_us"].values())
    cases = list(dict.fromkeys(row["case"] for row in measured["rows"]))
    assert len(cases) == 9
    for case in cases:
        rows = {row["impl"]: row for row in measured["rows"] if row["case"] == case}
        fractions = ["art_half", "art_tenth"] if "_S2048" in case else []
        int8 = ["art_int8", "art_int8_never", "art_int8_half"] if "_f32" in case else []
        int8 = int8 if fractions else int8[:2]
        tokens_last = ["art_tokens_last"] if fractions and "_f16_" not in case else []
        ours = ["art_dense", "art_never", *fractions, *int8, *tokens_last]
        assert list(rows) == [*ours, "sdpa_packed", "read"]
        if fractions:
            assert 2 * rows["art_half"]["bytes"] == rows["art_dense"]["bytes"]
        for row in rows.values():
            assert 0 < row["us_min"] <= row["us"] <= row["us_max"]


def test_bench_decode_says_which_peers_are_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("ART_TORCH_CACHE", str(tmp_path))
    done = run_script("bench_decode.py", "--quick", "--cases", "S1024_H8/2_D128_f32")
    assert done.returncode == 0, done.stderr
    for peer in ("vllm", "ggml"):
        assert f"{peer} is left out: no {tmp_path}/peers" in done.stdout.replace("\n", "")


@pytest.mark.skipif(not art_torch.info().cpu_targets.get("avx2"), reason="no AVX2 here")
def test_bench_decode_held_to_avx2(tmp_path):
    output = tmp_path / "decode.json"
    arguments = ("--quick", "--avx2", "--cases", "S1024_H8/2_D128_f32", "--output", str(output))
    done = run_script("bench_decode.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["simd"] == "avx2"
    assert "onnxruntime is left out: it chooses the instructions itself" in done.stdout


def test_cpu_peers_are_right(cpu_peers):
    """What is installed of them; a wrong output would end the benchmark."""
    peers, reasons = cpu_peers.find_peers(avx2=False)
    if not peers:
        pytest.skip(f"no peer is installed: {reasons}")
    from decode_implementations import check
    from decode_inputs import Case, make_inputs

    seen = set()
    for dtype in ("f32", "bf16", "f16"):
        for ragged in (False, True):
            case = Case(2, 256, 4, 2, 64, dtype, 64, 1, ragged)
            inputs = make_inputs(case)
            for peer in peers.values():
                implementations = peer(case, inputs)
                check(case, inputs, implementations)
                seen |= set(implementations)
                for implementation in implementations.values():
                    implementation.tolerance /= 1e6
                if implementations:
                    with pytest.raises(RuntimeError, match="must be within"):
                        check(case, inputs, implementations)
    assert len(seen) >= len(peers)


def test_decode_goals(decode_report):
    Case = decode_report.Case
    goals = decode_report.GOALS
    gqa = Case(1, 8192, 32, 8, 128, "bf16", 64, 1)
    mha = Case(1, 8192, 32, 32, 128, "bf16", 1024, 2)
    rows = [
        {"impl": "art_dense", "us_min": 100.0, "bytes": 1000},
        {"impl": "art_half", "us_min": 80.0, "bytes": 500},
        {"impl": "read", "us_min": 50.0, "bytes": 1000},
        {"impl": "vllm", "us_min": 250.0, "bytes": 1000},
    ]
    measured = {row["impl"]: row for row in rows}
    assert goals["vllm"].figure(measured) == 2.5
    assert goals["ort"].figure(measured) is None
    assert goals["read"].figure(measured) == 0.5
    assert goals["half"].figure(measured) == pytest.approx((80 - 25) / 50)
    assert not goals["half"].met(goals["half"].figure(measured), 1.06)
    assert goals["read"].limit(gqa, "avx512bf16") == 0.58
    assert goals["read"].limit(mha, "avx512bf16") == 0.90
    assert goals["ggml f16"].limit(mha, "amx") == 1.6
    assert goals["vllm"].limit(mha, "amx") == 1.9
    assert goals["vllm"].limit(gqa, "avx2") is None
    assert goals["sdpa"].limit(gqa, "avx2") is None


def test_table_has_the_peers_that_were_measured(make_tables):
    def rows(case, **us):
        return [{"case": case, "impl": impl, "us_min": value} for impl, value in us.items()]

    results = {
        "device": "A CPU",
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "ceiling_gbps": 20.0,
        "rows": [
            *rows(
                "B1_S8192_H9/3_D64_bf16_p64", art_dense=100, art_never=101, art_half=55, vllm=250
            ),
            *rows("B8_S8192_H9/3_D64_f32_p64_ragged", art_dense=100, art_never=99, sdpa_packed=300),
            *rows("B1_S128_H9/3_D64_bf16_p64", art_dense=9, art_never=9),
            *rows("B1_S8192_H9/3_D64_f16_p64_t2", art_dense=9, art_never=9),
            *rows("B1_S8192_H9/3_D64_bf16_p1024", art_dense=9, art_never=9),
        ],
    }
    _, header, rule, *lines = make_tables.decode_table(results).strip().splitlines()[1:]
    assert header == "| case | art_dense ms | art_never | art_half | / sdpa | / vLLM |"
    assert rule == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines == [
        "| `B1_S8192_H9/3_D64_bf16_p64` | 0.10 | +1.0% | x 0.55 |  | 2.50 x |",
        "| `B8_S8192_H9/3_D64_f32_p64_ragged` | 0.10 | -1.0% |  | 3.00 x |  |",
        "| `B1_S128_H9/3_D64_bf16_p64` | 0.01 | +0.0% |  |  |  |",
        "| `B1_S8192_H9/3_D64_f16_p64_t2` | 0.01 | +0.0% |  |  |  |",
    ]
    assert "`B1_S8192" not in make_tables.decode_excerpt(results)
