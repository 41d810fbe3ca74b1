"""The example and the snippet of docs/continuous_batching.md do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import models

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example(tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("The library opens at nine. " * 60)
    questions = ("--question", "When does it open?", "--question", "What opens?")
    said = run(
        "examples/continuous_batching.py",
        *("--document", str(document), "--max-new-tokens", "3", "--patience", "1", *questions),
    )
    assert re.search(r"exact: \d tokens in .* s\nART: +\d tokens in", said)
    assert 0 < float(re.search(r"ART read ([\d.]+)%", said)[1]) < 100
    assert said.count("  exact: ") == said.count("  ART:   ") == 2


def test_snippet():
    page = (ROOT / "docs" / "continuous_batching.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert '"HuggingFaceTB/SmolLM2-135M-Instruct"' in snippet
    snippet = snippet.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(models.smollm2()))
    said = run("-c", snippet)
    assert re.search(r"^\d+% of the cache read$", said, re.MULTILINE)
    assert "Error" not in said
