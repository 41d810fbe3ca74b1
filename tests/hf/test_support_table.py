"""docs/models.md is what tools/support_table.py writes, and what it says holds."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("support_table")


@pytest.fixture(scope="module")
def documented(tool):
    rows, _ = tool.parse(tool.DOCUMENT.read_text())
    return {row.family: row for row in rows}


def test_the_document_is_what_the_script_writes(tool):
    text = tool.DOCUMENT.read_text()
    rows, version = tool.parse(text)
    assert tool.render(rows, version) == text
    assert [row.family for row in rows] != []
    assert len({row.family for row in rows}) == len(rows)


def test_families_that_were_there_before_are_in_it(documented):
    """Versions of transformers differ in the newest families only."""
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(known & set(documented)) > 0.9 * len(known)


WORKING = [
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
]


@pytest.mark.parametrize("family", WORKING)
def test_a_family_that_works(tool, documented, family):
    row = tool.guarded(family, 120)
    assert row.section == "works", row
    assert row.layers == "4 of 4"
    assert documented[family] == row


@pytest.mark.parametrize(
    ("family", "section", "reason"),
    [
        ("bloom", "refused", "does not use transformers' attention interface"),
        ("mamba", "refused", "none of its modules is a causal attention"),
        ("deepseek_v3", "partly", "ARTCache does not hold the latent keys of MLA"),
        ("diffllama", "partly", "computes with cached values before its attention"),
        ("llama4", "partly", "chunked attention is not supported by ARTCache"),
    ],
)
def test_a_family_that_does_not(tool, documented, family, section, reason):
    row = tool.guarded(family, 120)
    assert row.section == section, row
    assert reason in row.own_cache + row.art_cache
    assert documented[family].section == section
    assert reason in documented[family].own_cache + documented[family].art_cache


def test_a_family_that_takes_too_long_or_dies(tool, monkeypatch):
    monkeypatch.setattr(tool, "row_of", lambda _: time.sleep(60))
    row = tool.guarded("llama", 0.5)
    assert (row.section, row.own_cache) == ("not tested", "not tested: took longer than 0.5 s")
    monkeypatch.setattr(tool, "row_of", lambda _: sys.exit(3))
    row = tool.guarded("llama", 60)
    assert row.own_cache == "not tested: its process ended with code 3"


def test_a_wrong_model_is_noticed(tool, monkeypatch):
    """The comparison can fail: a walk that leaves tokens out is no exact attention."""
    patch = tool.art_torch.patch

    def stopping(model, criterion, walk="sink_recent"):
        rule = tool.art_torch.Stability(0.5, 0.5, 1)
        return patch(model, rule, walk, block_size=16, num_pinned=1)

    model = tool.build("llama")
    batch = tool.eager_batch(model)
    assert tool.compare(model, batch, "sink_recent", lambda: None)[0] == tool.WORKS
    monkeypatch.setattr(tool.art_torch, "patch", stopping)
    assert tool.compare(model, batch, "sink_recent", lambda: None)[0].startswith("7 steps read ")
    wrong = [logits + 1 for logits in batch.logits]
    monkeypatch.undo()
    batch.logits = tuple(wrong)
    answer, _ = tool.compare(model, batch, "sink_recent", lambda: None)
    assert answer.startswith("logits differ by up to 1")


def test_only_some_are_printed(tool, monkeypatch, capsys):
    before = tool.DOCUMENT.read_text()
    monkeypatch.setattr(sys, "argv", ["support_table.py", "--only", "llama,bloom"])
    assert tool.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama | LlamaForCausalLM | 4 of 4 | yes | yes | yes"
    assert lines[1].startswith("bloom | BloomForCausalLM | - | refused: ")
    assert tool.DOCUMENT.read_text() == before
    monkeypatch.setattr(sys, "argv", ["support_table.py", "--only", "lama"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "has no families ['lama']" in capsys.readouterr().err
