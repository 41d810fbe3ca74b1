"""The benchmark scripts run, and the README's tables are what their results say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

DECODE = {
    "device": "A CPU",
    "driver": None,
    "cores": 2,
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "ceiling_gbps": 20.0,
    "rows": [
        {"case": "B1_S64", "impl": "art_dense", "us": 110.0, "us_min": 100.0, "bytes": 1},
        {"case": "B1_S64", "impl": "art_never", "us": 112.0, "us_min": 102.0, "bytes": 1},
        {"case": "B1_S64", "impl": "art_half", "us": 59.0, "us_min": 55.0, "bytes": 1},
        {"case": "B1_S64", "impl": "sdpa_packed", "us": 260.0, "us_min": 250.0, "bytes": 1},
    ],
}


@pytest.fixture
def make_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import make_tables

    return make_tables


@pytest.fixture
def results(tmp_path):
    (tmp_path / "decode-a-cpu.json").write_text(json.dumps(DECODE))
    return tmp_path


def run_script(name, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_tables_are_filled_from_results(make_tables, results):
    text = "a\n<!-- table:decode -->\nold figures\n<!-- /table -->\nb\n"
    filled = make_tables.fill(text, results)
    assert "old figures" not in filled
    assert "| `B1_S64` | 0.10 | +2.0% | x 0.55 | 0.25 | 2.50 x |" in filled
    assert filled.startswith("a\n<!-- table:decode -->\n")
    assert filled.endswith("<!-- /table -->\nb\n")
    assert make_tables.fill(filled, results) == filled


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("<!-- table:speed -->\n<!-- /table -->", ValueError, "one of decode, memory, walks"),
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
    arguments = ("--readme", str(readme), "--results", str(results))
    assert run_script("make_tables.py", *arguments, "--check").returncode == 1
    assert run_script("make_tables.py", *arguments).returncode == 0
    assert run_script("make_tables.py", *arguments, "--check").returncode == 0
    readme.write_text(readme.read_text().replace("2.50 x", "9.99 x"))
    done = run_script("make_tables.py", *arguments, "--check")
    assert done.returncode == 1
    assert "tables differ from the results" in done.stderr


def test_tables_of_the_readme_are_current(make_tables):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert make_tables.fill(text, make_tables.RESULTS) == text


def test_bench_decode_runs(tmp_path):
    output = tmp_path / "decode.json"
    done = run_script("bench_decode.py", "--quick", "--cases", "_p64", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "criterion that never fires" in done.stdout
    measured = json.loads(output.read_text())
    assert measured["device"]
    assert measured["simd"]
    cases = {row["case"] for row in measured["rows"]}
    assert "B1_S2048_H9/3_D64_bf16_p64" in cases
    impls = ["art_dense", "art_never", "art_half", "sdpa_packed", "read"]
    for case in cases:
        rows = {row["impl"]: row for row in measured["rows"] if row["case"] == case}
        assert list(rows) == impls
        assert 2 * rows["art_half"]["bytes"] == rows["art_dense"]["bytes"]
        for row in rows.values():
            assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
