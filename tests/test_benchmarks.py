"""The benchmark scripts run, and the README's tables are what their results say."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from scripts import BENCHMARKS, benchmark_fixture, run_script

DECODE = {
    "device": "A CPU",
    "driver": None,
    "cores": 2,
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "ceiling_gbps": 20.0,
    "rows": [
        {"case": "B1_S64_p64", "impl": "art_dense", "us": 110.0, "us_min": 100.0, "bytes": 1},
        {"case": "B1_S64_p64", "impl": "art_never", "us": 112.0, "us_min": 102.0, "bytes": 1},
        {"case": "B1_S64_p64", "impl": "art_half", "us": 59.0, "us_min": 55.0, "bytes": 1},
        {"case": "B1_S64_p64", "impl": "sdpa_packed", "us": 260.0, "us_min": 250.0, "bytes": 1},
    ],
}


def gpu_row(case, impl, us, note="", num_bytes=1000):
    times = {"us": us, "us_min": us and us - 1, "us_max": us and us + 1}
    return {"case": case, "impl": impl, **times, "bytes": num_bytes, "note": note}


LARGE = "B8_S8192_H32/8_D128_bf16_p16"
RAGGED = "B32_S32768_H32/8_D128_bf16_p16_ragged"
GPU = {
    "device": "A GPU",
    "driver": "580.0",
    "versions": {"torch": "2.11.0"},
    "commit": "abc",
    "ceiling_gbps": 4000.0,
    "rows": [
        gpu_row(LARGE, "read", 195.0),
        gpu_row(LARGE, "art_dense", 200.0, "max error 2.0e-03"),
        gpu_row(LARGE, "art_never", 202.0, "max error 2.0e-03"),
        gpu_row(LARGE, "art_half", 120.0, "reads 50.0%, max error 2.0e-03", 500),
        gpu_row(LARGE, "flashinfer_fa2", 210.0),
        gpu_row(LARGE, "flashinfer_xqa", None, "ValueError: no"),
        gpu_row(RAGGED, "art_dense", 90.0, "WRONG: max error 5.0e-01"),
        gpu_row(RAGGED, "flashinfer_fa2", 100.0),
        gpu_row(RAGGED, "flashinfer_xqa", 95.0),
    ],
}


def guided_row(case, impl, kl):
    row = {"texts": "held_out", "case": case, "impl": impl, "windows": 20.0}
    return row | {"read": 0.1504, "kl": kl, "top1": 0.9611}


BALANCED = "guided (0.03, 0.00045, 2)"
GUIDED = {
    "device": "A CPU",
    "versions": {"torch": "2.13.0"},
    "commit": "new",
    "model": "A model",
    "presets": {"quality": [0.01, 5e-5, 2], "balanced": [0.03, 0.00045, 2]},
    "summary": [
        guided_row("S8192", BALANCED, 0.0123),
        guided_row("S4096", BALANCED, 0.0077),
        guided_row("S4096", "codes2 (0.03, 0.00045, 2)", 0.5),
        guided_row("S4096", BALANCED, 0.9) | {"texts": "tuning"},
        guided_row("S4096", "sink_recent (0.03, 0.00045, 2)", 0.19),
        {"case": "S4096_needles", "impl": "exact", "found": 69, "of": 69, "read": 1.0},
        {"case": "S4096_needles", "impl": BALANCED, "found": 68, "of": 69, "read": 0.2},
        {"case": "S2048_needles", "impl": BALANCED, "found": 68, "of": 68, "read": 0.3},
    ],
    "rows": [
        {"impl": BALANCED, "commit": "new"},
        {"impl": "sink_recent (0.03, 0.00045, 2)", "commit": "old"},
        {"impl": "codes2 (0.03, 0.00045, 2)", "commit": "older"},
    ],
}


make_tables = benchmark_fixture("make_tables")
gpu_points = benchmark_fixture("gpu_points")
gpu_report = benchmark_fixture("gpu_report")


@pytest.fixture
def results(tmp_path):
    (tmp_path / "decode-a-cpu.json").write_text(json.dumps(DECODE))
    return tmp_path


def test_tables_are_filled_from_results(make_tables, results):
    text = "a\n<!-- table:decode -->\nold figures\n<!-- /table -->\nb\n"
    filled = make_tables.fill(text, results)
    assert "old figures" not in filled
    assert "| `B1_S64_p64` | 0.10 | +2.0% | x 0.55 | 2.50 x |" in filled
    assert filled.startswith("a\n<!-- table:decode -->\n")
    assert filled.endswith("<!-- /table -->\nb\n")
    assert make_tables.fill(filled, results) == filled


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("<!-- table:speed -->\n<!-- /table -->", ValueError, "one of decode, decode_excerpt, "),
        ("<!-- table:walks -->\n<!-- /table -->", FileNotFoundError, "run benchmarks/bench_walks"),
        ("<!-- table:decode -->\n", ValueError, "1 sections .* are opened and 0 are closed"),
    ],
)
def test_broken_sections_are_refused(make_tables, results, text, error, message):
    with pytest.raises(error, match=message):
        make_tables.fill(text, results)


def test_check_finds_typed_figures(results):
    readme = results / "README.md"
    readme.write_text("<!-- table:decode -->\n<!-- /table -->\n")
    arguments = (str(readme), "--results", str(results))
    assert run_script("make_tables.py", *arguments, "--check").returncode == 1
    assert run_script("make_tables.py", *arguments).returncode == 0
    assert run_script("make_tables.py", *arguments, "--check").returncode == 0
    readme.write_text(readme.read_text().replace("2.50 x", "9.99 x"))
    done = run_script("make_tables.py", *arguments, "--check")
    assert done.returncode == 1
    assert "tables differ from the results" in done.stderr


def test_tables_are_current(make_tables):
    pages = make_tables.pages()
    assert {"README.md", "cpu.md", "gpu.md", "kvpress.md"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert make_tables.fill(text, make_tables.RESULTS) == text, page


def test_bench_gpu_steps_runs(make_tables, tmp_path):
    output = tmp_path / "gpu_steps-a-cpu.json"
    done = run_script("bench_gpu_steps.py", "--smoke", "--output", str(output))
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    graphed = ["exact_graphed", "quality", "balanced", "fast"]
    assert [row["impl"] for row in rows] == ["sdpa_dynamic", "sdpa_static", "exact", *graphed]
    for row in rows:
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
        assert (row["read"] < 1) == row["guided"] == (row["impl"] in graphed[1:])
    filled = make_tables.fill("<!-- table:gpu_steps -->\n<!-- /table -->\n", tmp_path)
    assert "`balanced`, graph" in filled
    assert filled.count("| `B2_S") == 1


def test_bench_steps_runs(make_tables, tmp_path):
    output = tmp_path / "steps-a-cpu.json"
    done = run_script("bench_steps.py", "--quick", "--threads", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    names = ["sdpa", "sdpa_static", "exact", "sink_recent", "guided"]
    assert [row["impl"] for row in rows] == 2 * names
    assert {row["case"].split("_")[2] for row in rows} == {"f32", "bf16"}
    for row in rows:
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
        assert (row["read"] == 1) == (row["impl"] in names[:3])
    filled = make_tables.fill("<!-- table:steps -->\n<!-- /table -->\n", tmp_path)
    assert filled.count("| x 1.00 |") >= 2
    assert filled.count("| `guided`, rule of `balanced` |") == 2


@pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress is not installed")
def test_bench_presses_runs(make_tables, tmp_path):
    output = tmp_path / "presses-a-cpu.json"
    done = run_script("bench_presses.py", "--quick", "--output", str(output))
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    names = ["press", "exact", "sink_recent", "guided"]
    assert [row["impl"] for row in rows] == 7 * names
    whole = rows[0]["kv_bytes"]
    for row in rows:
        if row["impl"] == "press":
            assert row["kv_bytes"] == pytest.approx(row["keeps"] * whole, rel=0.05)
        if row["impl"] in names[:2]:
            assert row["read"] == 1.0
            assert row["kl_press"] < 1e-9
        if row["keeps"] < 1:
            assert row["kl_full"] > 1e-6
    filled = make_tables.fill("<!-- table:presses -->\n<!-- /table -->\n", tmp_path)
    assert filled.count("| PyramidKV, 20% |") == 4


def test_bench_guided_decode_runs(make_tables, tmp_path):
    output = tmp_path / "guided_decode-a-cpu.json"
    arguments = ("--quick", "--rounds", "1", "--output", str(output))
    done = run_script("bench_guided_decode.py", *arguments)
    assert done.returncode == 0, done.stderr
    cases = {}
    for row in json.loads(output.read_text())["rows"]:
        cases.setdefault(row["case"], []).append(row["impl"])
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
    guided = [f"art_guided_{what}" for what in ("walk", 5, 10, 15, 25)]
    assert list(cases.values()) == 4 * [["art_dense", *guided, "sdpa_packed"]]
    filled = make_tables.fill("<!-- table:guided_decode -->\n<!-- /table -->\n", tmp_path)
    assert filled.count("| `B") == 4


def test_guided_table(make_tables, tmp_path):
    (tmp_path / "guided-a-cpu.json").write_text(json.dumps(GUIDED))
    # Without the package's walk there is nothing to show.
    only_simulated = GUIDED | {"summary": GUIDED["summary"][2:3], "rows": GUIDED["rows"][2:]}
    (tmp_path / "guided-b-cpu.json").write_text(json.dumps(only_simulated))
    text = "<!-- table:guided -->\nold figures\n<!-- /table -->\n"
    head, rule, *lines = make_tables.fill(text, tmp_path).splitlines()[3:-1]
    # There is no column for facts that were not looked for.
    assert head == "| walk, rule | S4096: read | KL | top-1 | found | S8192: read | KL | top-1 |"
    assert rule.count("---:") == 7
    assert lines == [
        "| exact | 100.0% | 0 | 100.0% | 69 of 69 | 100.0% | 0 | 100.0% |",
        "| `guided`, `balanced` | 15.0% | 0.0077 | 96.1% | 68 of 69 | 15.0% | 0.012 | 96.1% |",
        "| `sink_recent`, rule of `balanced` | 15.0% | 0.19 | 96.1% | - | - | - | - |",
    ]
    conditions = make_tables.guided_table(GUIDED).splitlines()[0]
    assert "A model; 20 windows of texts" in conditions
    assert "commit new, old." in conditions


def test_gpu_section_may_lack_results(make_tables, results):
    text = "a\n<!-- table:gpu -->\nold figures\n<!-- /table -->\nb\n"
    assert make_tables.fill(text, results) == "a\n<!-- table:gpu -->\n<!-- /table -->\nb\n"
    (results / "gpu-a-gpu.json").write_text(json.dumps(GPU))
    filled = make_tables.fill(text, results)
    assert (
        "A plain read reaches 4,000 GB/s. A GPU; driver 580.0; torch 2.11.0; commit abc." in filled
    )
    assert f"| `{LARGE}` | 200.0 | 210.0 fa2 | 0.952 | +1.0% | 1.20 | - | - | - |" in filled
    whole = f"| `{LARGE}` | 200.0 | 210.0 fa2 | 0.952 | +1.0% | 1.20 | - | - | 98% | - | - | - |"
    assert whole in make_tables.gpu_table(GPU)
    assert f"| `{RAGGED}` | 90.0 | 95.0 xqa | 0.947 | - |" in filled
    assert make_tables.fill(filled, results) == filled


def test_parts_of_a_guided_walk(gpu_report):
    case = "B1_S131072_H32/8_D128_bf16_p16"
    walk = {"impl": "art_guided_walk", "us": 30.0, "note": "scores 20.0 us, order 7.0 us"}
    read = {"impl": "read", "us": 100.0, "bytes": 1000, "note": ""}
    rows = [{"case": case, **row} for row in (walk | {"bytes": 100}, read)]
    ratios = gpu_report.cases_of(rows)[case].ratios
    assert ratios["scores / read of codes"] == pytest.approx(2.0)
    assert ratios["order / scores"] == pytest.approx(0.35)
    (verdict,) = (v for v in gpu_report.verdicts(rows) if v.title == "order at B1 128k, us")
    assert (verdict.value, verdict.text) == (7.0, "missed at 1 of 1")


def test_gpu_goals(gpu_report):
    verdicts = {verdict.title: verdict for verdict in gpu_report.verdicts(GPU["rows"])}
    mean = verdicts["dense / FlashInfer, mean"]
    assert mean.value == pytest.approx(200 / 210)
    assert mean.text == "met at all 1"
    ragged = verdicts["ragged: dense / FlashInfer"]
    assert (ragged.at, ragged.missed, ragged.of) == (RAGGED, 1, 1)
    assert verdicts["half / (dense x fraction)"].value == pytest.approx(1.2)
    assert verdicts["B > 1, from 100 us: of plain read"].missed == 0
    assert "uneven / (dense x fraction)" not in verdicts
    assert gpu_report.problems(GPU["rows"]) == [
        f"{LARGE} flashinfer_xqa: ValueError: no",
        f"{RAGGED} art_dense: WRONG: max error 5.0e-01",
    ]


def test_gpu_points(gpu_points):
    points = gpu_points.parse_points(gpu_points.TABLE)
    assert len({point.name for point in points}) == len(points) >= 60
    for point in points:
        assert point.kv_bytes <= gpu_points.MAX_KV_BYTES
        assert "art_half" in point.implementations or point.ragged
        assert max(point.lens) <= point.tokens
        count = gpu_points.num_inputs(point.kv_bytes)
        assert count >= 2
        assert count * point.kv_bytes >= gpu_points.L2_BYTES
    measured = {(point.num_q_heads, point.num_kv_heads) for point in points}
    assert measured == {(32, 8), (64, 8), (32, 32), (9, 3)}
    assert {point.batch for point in points} == {1, 2, 4, 8, 16, 32, 64, 128}
    assert {point.page_size for point in points} == {16, 64, 256}
    with pytest.raises(ValueError, match="not a point: '1x8k 32/8'"):
        gpu_points.parse_points("1x8k 32/8")


def test_watchdog_ends_a_process_that_hangs():
    program = (
        "import gpu_timing, time\n"
        "with gpu_timing.watchdog(30, lambda: print('early')): pass\n"
        "with gpu_timing.watchdog(0.1, lambda: print('late', flush=True)): time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (3, "late\n")


def test_bench_gpu_lists_its_points():
    done = run_script("bench_gpu.py", "--list", "--only", "_p256|art_oldest")
    assert done.returncode == 0, done.stderr
    *lines, total = done.stdout.splitlines()
    assert total.startswith(f"{len(lines)} points, ")
    assert all("_p256" in line or line.endswith("GiB  art_oldest") for line in lines)


def test_bench_gpu_goes_on_where_it_stopped(tmp_path):
    smoke = ("--smoke", "--out", str(tmp_path), "--commit", "abc")
    done = run_script("bench_gpu.py", *smoke, "--only", "_ragged|art_half", "--budget", "0")
    assert done.returncode == 0, done.stderr
    assert "0 of 2 points; run again to go on" in done.stdout
    done = run_script("bench_gpu.py", *smoke, "--only", "_ragged|art_half")
    assert done.returncode == 0, done.stderr
    (output,) = tmp_path.glob("gpu-*.json")
    first = json.loads(output.read_text())["rows"]
    done = run_script("bench_gpu.py", *smoke)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["commit"] == "abc"
    assert all(row in results["rows"] for row in first)
    rows = {(row["case"], row["impl"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 23
    dense, half = (rows["B1_S1024_H8/2_D64_bf16_p16", f"art_{name}"] for name in ("dense", "half"))
    assert 2 * half["bytes"] == dense["bytes"]
    for (_, impl), row in rows.items():
        assert "WRONG" not in row["note"]
        if impl.startswith("art_") or impl == "read":
            assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
        else:
            assert row["us"] is None
            assert row["note"]
    assert "| `B1_S1024_H8/2_D64_bf16_p16` |" in output.with_suffix(".md").read_text()
    done = run_script("bench_gpu.py", "--report", str(output))
    assert done.returncode == 0, done.stderr
    assert "criterion everywhere: never / dense" in done.stdout
    done = run_script("bench_gpu.py", "--smoke", "--out", str(tmp_path), "--commit", "abd")
    assert "was measured with commit abc" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_gpu_needs_a_gpu(tmp_path):
    done = run_script("bench_gpu.py", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr
