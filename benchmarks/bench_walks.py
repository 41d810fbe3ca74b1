"""What stopping early loses: every walk and criterion in SmolLM2-135M-Instruct, float32.

    python benchmarks/bench_walks.py            # minutes; writes results/walks-<device>.json
    python benchmarks/bench_walks.py --quick    # a short context and few settings; only prints

The text is data/jargon_file.txt. Every document is prefilled once, exactly. Then, per setting:

    read, KL   the text's next tokens are fed one by one. How much of the cache was read, and the
               mean of KL(exact || setting) over the predictions of the following token.
    found      eight facts were put into a document at eight depths. For each, its sentence is
               begun, and the greedy continuation must contain the fact. Of the prompt all but the
               last token is prefilled, so the setting decides about every token of the answer.

Exact is the same operator without a criterion, measured the same way.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT, describe_machine, load_smollm2, progress_bar, write_results
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

import art_torch
from art_torch import ARTCache, Stability
from art_torch.integrations.transformers import cache_argument

TEXT = Path(__file__).resolve().parent / "data" / "jargon_file.txt"
WALKS = ("oldest_first", "recent_first", "sink_recent")
CRITERIA = (Stability(0.01, 5e-5, 2), Stability.paper(), Stability(0.03, 4.5e-4, 2))
FACTS = (
    ("The dog of the lighthouse keeper is called", "Bramble"),
    ("The secret code of the north gate is", "4817"),
    ("The favourite fruit of Professor Lindqvist is the", "papaya"),
    ("The ferry to Tarnby leaves from pier", "23"),
    ("The violin of Anna Keller was made in", "Lisbon"),
    ("The password of the old mainframe is", "marigold"),
    ("The bakery on Mill Street was opened in", "1874"),
    ("The ship of Captain Moreau is painted", "orange"),
)
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Setting:
    """A walk with a criterion; exact where that is None."""

    walk: str
    criterion: Stability | None

    @property
    def name(self) -> str:
        if self.criterion is None:
            return "exact"
        rule = self.criterion
        return f"{self.walk} ({rule.d_scale:g}, {rule.d_direction:g}, {rule.patience})"


@dataclass
class Forced:
    """A document in the cache, and what follows it in the text."""

    cache: ARTCache
    following: Tensor  # int64 [steps]
    exact: Tensor | None = None  # log-probabilities [steps, vocabulary]


@dataclass
class Needles:
    """A document with facts in the cache, and the prompts that begin their sentences."""

    cache: ARTCache
    prompts: list[Tensor]  # int64 [tokens]
    answers: list[str]


@dataclass
class Sizes:
    contexts: tuple[int, ...]
    documents: int
    forced_tokens: int
    settings: list[Setting]

    @property
    def steps(self) -> int:
        """Prefills and settings, for the progress bar."""
        return len(self.contexts) * (1 + self.documents + len(self.settings))


class Model:
    """The model and its tokenizer, and passes of tokens through it."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_smollm2()

    def encode(self, text: str) -> Tensor:
        return self.tokenizer(text, return_tensors="pt").input_ids[0]

    def forward(self, tokens: Tensor, cache: ARTCache) -> Tensor:
        """Logits ``[vocabulary]`` after the last of ``tokens`` (int64 ``[n]``)."""
        output = self.model(tokens[None], logits_to_keep=1, **{cache_argument(self.model): cache})
        return output.logits[0, -1]

    def prefilled(self, tokens: Tensor) -> ARTCache:
        cache = ARTCache(self.model.config)
        with art_torch.patch(self.model, None):
            self.forward(tokens, cache)
        return cache


def with_facts(text: str) -> str:
    """Puts the facts at eight equally spaced depths of the text, between sentences."""
    ends = [match.end() for match in re.finditer(r"\.\s", text)]
    for index in reversed(range(len(FACTS))):
        beginning, fact = FACTS[index]
        wanted = (index + 0.5) / len(FACTS) * len(text)
        at = min(ends, key=lambda end: abs(end - wanted))
        text = f"{text[:at]}{beginning} {fact}. {text[at:]}"
    return text


def make_forced(model: Model, text: Tensor, context: int, sizes: Sizes, index: int) -> Forced:
    # Documents overlap only where the text is too short for all of them.
    spare = len(text) - context - sizes.forced_tokens
    start = spare * index // max(1, sizes.documents - 1) if index else 0
    end = start + context
    cache = model.prefilled(text[start:end])
    return Forced(cache, text[end : end + sizes.forced_tokens])


def make_needles(model: Model, text: Tensor, context: int) -> Needles:
    facts = len(model.encode(with_facts(model.tokenizer.decode(text[:context])))) - context
    document = with_facts(model.tokenizer.decode(text[: context - facts]))
    cache = model.prefilled(model.encode(document + "\n\n"))
    prompts = [model.encode(beginning) for beginning, _ in FACTS]
    return Needles(cache, prompts, [fact for _, fact in FACTS])


def run_forced(model: Model, forced: Forced) -> Tensor:
    """Log-probabilities of the next token after each of the following ones."""
    logits = [model.forward(token[None], forced.cache) for token in forced.following]
    forced.cache.crop(-len(forced.following))
    # In float64, or the divergence of equal predictions would be noise of either sign.
    return torch.stack(logits).double().log_softmax(-1)


def run_needle(model: Model, needles: Needles, index: int) -> bool:
    """Whether the greedy continuation contains the fact."""
    prompt, cache = needles.prompts[index], needles.cache
    model.forward(prompt[:-1], cache)
    token, answer = prompt[-1], []
    for _ in range(ANSWER_TOKENS):
        token = model.forward(token[None], cache).argmax()
        answer.append(int(token))
    cache.crop(-(len(prompt) - 1 + ANSWER_TOKENS))
    return needles.answers[index] in model.tokenizer.decode(answer)


def measure(
    model: Model, setting: Setting, documents: list[Forced], needles: Needles
) -> dict[str, Any]:
    divergences = []
    with art_torch.patch(model.model, setting.criterion, setting.walk) as handle:
        for forced in documents:
            logs = run_forced(model, forced)
            if setting.criterion is None:
                forced.exact = logs
            assert forced.exact is not None
            divergences.append((forced.exact.exp() * (forced.exact - logs)).sum(-1))
    read = handle.stats.read_fraction()
    with art_torch.patch(model.model, setting.criterion, setting.walk) as handle:
        found = [run_needle(model, needles, index) for index in range(len(needles.prompts))]
    divergence = torch.cat(divergences)
    return {
        "read": round(read, 4),
        "kl": float(f"{float(divergence.mean()):.4g}"),
        "kl_max": float(f"{float(divergence.max()):.4g}"),
        "found": sum(found),
        "needles": len(found),
        "found_at": [int(hit) for hit in found],
        "needle_read": round(handle.stats.read_fraction(), 4),
    }


def run(model: Model, sizes: Sizes, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    text = model.encode(TEXT.read_text(encoding="utf-8"))
    rows = []
    for context in sizes.contexts:
        documents = []
        for index in range(sizes.documents):
            documents.append(make_forced(model, text, context, sizes, index))
            advance(f"prefill {context}")
        needles = make_needles(model, text, context)
        advance(f"prefill {context}")
        for setting in sizes.settings:
            rule = setting.criterion
            row = {
                "case": f"S{context}",
                "impl": setting.name,
                "walk": setting.walk if rule else None,
                "criterion": [rule.d_scale, rule.d_direction, rule.patience] if rule else None,
            }
            rows.append({**row, **measure(model, setting, documents, needles)})
            advance(f"{context} {setting.name}")
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="KV tokens read, and what that loses", box=SIMPLE)
    table.add_column("context")
    table.add_column("walk and criterion")
    for title in ("read", "KL", "largest KL", "found", "read then"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row["case"],
            row["impl"],
            f"{row['read']:.1%}",
            f"{row['kl']:.2g}",
            f"{row['kl_max']:.2g}",
            f"{row['found']} of {row['needles']}",
            f"{row['needle_read']:.1%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="What stopping early loses, by walk and criterion")
    parser.add_argument("--quick", action="store_true", help="short; writes no result file")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--documents", type=int, default=3, help="for read and KL, per context")
    parser.add_argument("--forced-tokens", type=int, default=32, help="per document")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    settings = [Setting(walk, rule) for walk in WALKS for rule in CRITERIA]
    exact = Setting(WALKS[-1], None)  # first: the others are compared with it
    sizes = Sizes(
        tuple(arguments.contexts), arguments.documents, arguments.forced_tokens, [exact, *settings]
    )
    if arguments.quick:
        sizes = Sizes((512,), 1, 4, [exact, settings[-1]])
    # The warning about what a walk loses is what this measures.
    logging.getLogger("art_torch").setLevel(logging.ERROR)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    model = Model()
    results = describe_machine("transformers")
    with torch.inference_mode(), progress_bar("bench_walks", sizes.steps) as advance:
        rows = run(model, sizes, advance)
    digest = hashlib.sha256(TEXT.read_bytes()).hexdigest()[:16]
    results.update(
        model="SmolLM2-135M-Instruct, float32",
        text=f"{TEXT.relative_to(ROOT)} (sha256 {digest})",
        documents=sizes.documents,
        forced_tokens=sizes.forced_tokens,
        rows=rows,
    )
    console.print(f"{results['model']}; text: {results['text']}")
    show(rows, console)
    if arguments.output or not arguments.quick:
        console.print(f"written to {write_results('walks', results, arguments.output)}")


if __name__ == "__main__":
    main()
