"""Which model families of transformers work when patched: writes docs/models.md.

    python tools/support_table.py                     # every family, writes docs/models.md
    python tools/support_table.py --only llama,gpt2   # some, printed only

Of every family with a causal language model a tiny random one is built, in float32. It generates a
few tokens from a left-padded batch with its own eager attention, and then patched with thresholds
off (criterion None): with its own cache, with an ARTCache, and with an ARTCache and the guided
walk. Tokens and logits have to be the same, and attention layers have to have gone through the
operator. Each family has a process and a time limit of its own.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tiny_families import PAD, VOCAB, CannotBuild, build, one_line
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import art_torch

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "models.md"
PROMPT, PADS, NEW = 208, 13, 8
SECONDS = 90
RTOL, ATOL = 1e-4, 1e-3
WORKS = "yes"


@dataclass
class Row:
    """What came of one family.

    Attributes:
        family: Its ``model_type``.
        model: Class of the model.
        layers: How many layers went through the operator.
        own_cache: "yes", or why not: patched, with the cache the model makes itself.
        art_cache: The same with an ``ARTCache``.
        guided: The same with an ``ARTCache`` and the guided walk.
    """

    family: str
    model: str
    layers: str
    own_cache: str
    art_cache: str
    guided: str

    @property
    def section(self) -> str:
        """Where the row belongs."""
        if self.own_cache.startswith(REFUSED):
            return REFUSED
        if self.own_cache.startswith(UNTESTED):
            return UNTESTED
        return "works" if self.own_cache == self.art_cache == self.guided == WORKS else "partly"


# What the cell of these says begins with the section.
REFUSED, UNTESTED = "refused", "not tested"
INTRODUCTION = (
    "Written by `python tools/support_table.py` with transformers {version}; do not edit. Of every "
    "family in transformers with a causal language model a tiny random one is built, in float32, "
    "and generates a few tokens from a left-padded batch: with its own eager attention, and "
    "patched with thresholds off (`criterion=None`)."
)
SECTIONS = {
    "works": (
        "Works",
        "Tokens and logits are those of the model's eager attention: patched with its own cache, "
        "with an `ARTCache`, and with the guided walk. *Layers* is how many of the tiny model's "
        "layers decode by the operator; others are no attention (linear attention, say), or the "
        "same layers over again (`hrm_text`).",
    ),
    "partly": (
        "Works in part",
        "Something works as above, and something is refused or differs: the cell says what.",
    ),
    REFUSED: ("Refused by `art_torch.patch`", "With the error that it raises."),
    UNTESTED: (
        "Not tested",
        "No tiny model could be built from a small config alone, or it does not generate from text "
        "alone with its own eager attention. It may work; nothing here says so.",
    ),
}
COLUMNS = {
    "works": ("family", "model", "layers"),
    "partly": tuple(field.name for field in fields(Row)),
    REFUSED: ("family", "model", "own_cache"),
    UNTESTED: ("family", "model", "own_cache"),
}
TITLES = {
    "family": "family",
    "model": "model",
    "layers": "layers",
    "own_cache": "its own cache",
    "art_cache": "`ARTCache`",
    "guided": "guided walk",
}


# ---------------------------------------------------------------- one family


@dataclass
class Batch:
    """A left-padded prompt and what eager attention makes of it."""

    ids: Tensor
    mask: Tensor
    sequences: Tensor
    logits: tuple[Tensor, ...]


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any = None) -> Any:
    """Greedy tokens and their logits, with the model's own cache or another one."""
    torch.manual_seed(0)  # for what draws numbers in a forward pass
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        do_sample=False,
        num_beams=1,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )


def eager_batch(model: PreTrainedModel) -> Batch:
    """What all others are compared with.

    Raises:
        ValueError: The logits are of no use.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (2, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :PADS], mask[0, :PADS] = PAD, 0
    expected = generate(model, ids, mask)
    if not all(logits.isfinite().all() for logits in expected.logits):
        raise ValueError("logits of the random model are not finite")
    return Batch(ids, mask, expected.sequences, expected.logits)


def compare(
    model: PreTrainedModel, batch: Batch, walk: str, cache: Callable[[], Any]
) -> tuple[str, int]:
    """Generates with a patched model: "yes" or what went wrong, and layers by the operator."""
    notes: list[str] = []
    with art_torch.patch(model, None, walk) as handle:
        try:
            got = generate(model, batch.ids, batch.mask, cache())
        except Exception as error:  # the message is what the table is for
            return one_line(error), 0
        stats = handle.stats
        notes = sorted({text for text in logged if "exact" in text})
    logged.clear()
    layers = len(stats.layers)
    if stats.exact_fallbacks or layers == 0:
        return notes[0] if notes else "no layer decodes by the operator", layers
    # Some models call the attention of a layer several times in a pass.
    if stats.steps % (NEW - 1) or stats.read_fraction() != 1.0:
        return f"{stats.steps} steps read {stats.read_fraction():.0%}", layers
    worst = max((a - b).abs().max().item() for a, b in zip(got.logits, batch.logits, strict=True))
    pairs = zip(got.logits, batch.logits, strict=True)
    if all(torch.allclose(a, b, RTOL, ATOL) for a, b in pairs) and torch.equal(
        got.sequences, batch.sequences
    ):
        return WORKS, layers
    return f"logits differ by up to {worst:.2g}", layers


def row_of(family: str) -> Row:
    """Tries one family, in this process."""
    row = Row(family, class_name(family), "", "", "", "")
    try:
        model = build(family)
    except CannotBuild as error:
        row.own_cache = f"{UNTESTED}: {error}"
        return row
    row.model = type(model).__name__
    with torch.no_grad():
        try:
            art_torch.patch(model, None).unpatch()
        except ValueError as error:
            row.own_cache = f"{REFUSED}: {one_line(error)}"
            return row
        try:
            batch = eager_batch(model)
        except Exception as error:  # as above
            row.own_cache = f"{UNTESTED}: eager: {one_line(error)}"
            return row
        row.own_cache, layers = compare(model, batch, "sink_recent", lambda: None)
        row.layers = f"{layers} of {number_of_layers(model)}"
        make_cache = lambda: art_torch.ARTCache(model.config)  # noqa: E731
        row.art_cache, _ = compare(model, batch, "sink_recent", make_cache)
        row.guided, _ = compare(model, batch, "guided", make_cache)
        if row.guided == row.art_cache != WORKS:
            row.guided = "the same"
    return row


def number_of_layers(model: PreTrainedModel) -> int:
    """Layers of any kind."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def class_name(family: str) -> str:
    """The class that transformers names for a family."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return name if isinstance(name, str) else name[0]


logged: list[str] = []


class Listener(logging.Handler):
    """Keeps what art_torch says."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a message."""
        logged.append(record.getMessage())


# ---------------------------------------------------------------- all of them


def in_a_process(family: str, connection: Connection) -> None:
    """Tries one family and sends its row."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    logger = logging.getLogger("art_torch")
    logger.handlers, logger.propagate = [Listener()], False
    connection.send(row_of(family))


def guarded(family: str, seconds: float = SECONDS) -> Row:
    """Tries one family in a process of its own, for some seconds at most."""
    context = multiprocessing.get_context("fork")  # libraries are loaded once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=in_a_process, args=(family, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            row: Row = ours.recv()
            return row
        why = f"took longer than {seconds:g} s"
    except EOFError:
        process.join()
        why = f"its process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return Row(family, class_name(family), "", f"{UNTESTED}: {why}", "", "")


def try_families(families: Iterable[str], seconds: float) -> list[Row]:
    """Tries one family after the other, under a progress bar."""
    families, rows = list(families), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(families))
        for family in families:
            progress.update(task, description=f"{family:>28}")
            rows.append(guarded(family, seconds))
            progress.advance(task)
    return rows


# ---------------------------------------------------------------- the document


def render(rows: list[Row], version: str) -> str:
    """The document. ``parse`` reads it back."""
    parts = ["# Models that can be patched", paragraph(INTRODUCTION.format(version=version))]
    for section, (title, explanation) in SECTIONS.items():
        mine = [row for row in rows if row.section == section]
        names = COLUMNS[section]
        lines = [[title_of(section, name) for name in names], ["---"] * len(names)]
        lines += [
            [getattr(row, name).removeprefix(section + ": ") for name in names] for row in mine
        ]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts += [f"## {title}: {len(mine)}", paragraph(explanation), table]
    return "\n\n".join(parts) + "\n"


def paragraph(text: str) -> str:
    """Text in lines of the usual length."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def title_of(section: str, name: str) -> str:
    """The heading of a column."""
    is_reason = section in (REFUSED, UNTESTED) and name == "own_cache"
    return "why" if is_reason else TITLES[name]


def parse(text: str) -> tuple[list[Row], str]:
    """The rows of a document and its version of transformers.

    Raises:
        ValueError: It is not a document of ``render``.
    """
    found = re.search(r"with\s+transformers\s+(\S+);", text)
    if found is None:
        raise ValueError("the document does not say which transformers it was made with")
    rows = []
    sections = re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]
    for section, content in zip(SECTIONS, sections, strict=True):
        lines = [line for line in content.splitlines() if line.startswith("|")][2:]
        for line in lines:
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            given = dict(zip(COLUMNS[section], cells, strict=True))
            if section == "works":
                given |= {"own_cache": WORKS, "art_cache": WORKS, "guided": WORKS}
            elif section in (REFUSED, UNTESTED):
                given["own_cache"] = f"{section}: {given['own_cache']}"
            blank = {field.name: "" for field in fields(Row)}
            rows.append(Row(**blank | given))
    return rows, found[1]


def main() -> int:
    """Tries them and writes the document, or prints some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="families, with commas between them; nothing is written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of a family")
    options = parser.parse_args()
    known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    families = known if options.only is None else options.only.split(",")
    if unknown := sorted(set(families) - set(known)):
        parser.error(f"transformers {transformers.__version__} has no families {unknown}")
    rows = try_families(families, options.seconds)
    if options.only is not None:
        for row in rows:
            print(" | ".join(cell or "-" for cell in astuple(row)))
        return 0
    DOCUMENT.write_text(render(rows, transformers.__version__))
    counts = {name: sum(row.section == name for row in rows) for name in SECTIONS}
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
