"""The texts of bench_guided.py: some to tune settings on, others to report, and facts to find."""

from __future__ import annotations

import hashlib
import lzma
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DATA = Path(__file__).resolve().parent / "data"
TUNING = ("jargon_file", "sqlite_docs", "devils_dictionary")
HELD_OUT = ("kjv", "debian_handbook", "licences", "python_source")

# Beginnings of sentences that end in a fact.
FACTS = (
    ("The dog of the lighthouse keeper is called", "Bramble"),
    ("The secret code of the north gate is", "4817"),
    ("The favourite fruit of Professor Lindqvist is the", "papaya"),
    ("The ferry to Tarnby leaves from pier", "23"),
    ("The violin of Anna Keller was made in", "Lisbon"),
    ("The password of the old mainframe is", "marigold"),
    ("The bakery on Mill Street was opened in", "1874"),
    ("The ship of Captain Moreau is painted", "orange"),
    ("The parrot of the innkeeper speaks fluent", "Portuguese"),
    ("The meeting with Doctor Okafor is on", "Thursday"),
    ("The spare key of the greenhouse lies under the", "bucket"),
    ("The winner of the chess match in Varna was", "Petrov"),
    ("The tallest tree in Harrow Park is an", "elm"),
    ("The train to Oldenburg departs from platform", "9"),
    ("The painter of the blue mural is called", "Rosalind"),
    ("The combination of the safe in the cellar is", "7305"),
    ("The river behind the monastery is called the", "Selwyn"),
    ("The cat of Mrs Albright was born in", "March"),
    ("The treasure of the island is hidden in the", "chapel"),
    ("The telephone number of the clockmaker is", "5521"),
    ("The horse of Sergeant Quill is named", "Thunder"),
    ("The medicine of the old queen was made from", "lavender"),
    ("The library in Aldermoor closes at", "seven"),
    ("The brother of Ingrid Solheim lives in", "Toronto"),
    ("The bridge over the Kestrel was built in", "1932"),
    ("The instrument that young Tobias plays is the", "cello"),
    ("The stone in the ring of the duchess is a", "sapphire"),
    ("The recipe of Aunt Matilda needs three cups of", "flour"),
    ("The name of the abandoned mine is", "Redwater"),
    ("The soup of the monks is made from", "pumpkin"),
    ("The flag of the small republic is", "purple"),
    ("The guard of the eastern tower is called", "Edmund"),
    ("The number of the hotel room is", "618"),
    ("The capital of the lost kingdom was", "Velmora"),
    ("The boat race is won by the crew from", "Bristol"),
    ("The wedding of Clara and Henrik is in", "August"),
)
DEPTHS = 9


def read_text(name: str) -> str:
    """A text of the data folder by its name, ``TUNING`` or ``HELD_OUT``."""
    plain = DATA / f"{name}.txt"
    if plain.exists():
        return plain.read_text(encoding="utf-8")
    return lzma.decompress((DATA / f"{name}.txt.xz").read_bytes()).decode("utf-8")


def digest(name: str) -> str:
    return hashlib.sha256(read_text(name).encode("utf-8")).hexdigest()[:16]


def encode(tokenizer: Any, text: str) -> Tensor:
    """Tokens int64 ``[n]`` without any special ones."""
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]


def beginning(tokenizer: Any) -> Tensor:
    """What the model's inputs begin with, int64 ``[0]`` or ``[1]``."""
    ids = tokenizer("a").input_ids
    first = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return torch.tensor(first, dtype=torch.int64)


def windows(tokenizer: Any, name: str, length: int, most: int) -> list[Tensor]:
    """Adjacent windows of ``length`` tokens, at most ``most`` of them."""
    first = beginning(tokenizer)
    tokens = encode(tokenizer, read_text(name))
    size = length - len(first)
    count = min(most, len(tokens) // size)
    return [torch.cat((first, tokens[i * size : (i + 1) * size])) for i in range(count)]


def haystack_text(index: int) -> str:
    return HELD_OUT[index % len(HELD_OUT)]


def facts_of(index: int) -> list[tuple[str, str]]:
    """The facts of document ``index``, one per depth."""
    # Every fact occurs once in as many documents as that takes, then again at another depth.
    first = index * DEPTHS + index * DEPTHS // len(FACTS)
    return [FACTS[(first + depth) % len(FACTS)] for depth in range(DEPTHS)]


def with_facts(text: str, facts: list[tuple[str, str]]) -> str:
    """Puts the facts at depths of 10 to 90 % of the text, between sentences or lines."""
    ends = [match.end() for match in re.finditer(r"[.:]\s|\n", text)]
    for index in reversed(range(len(facts))):
        start, fact = facts[index]
        wanted = (index + 1) / (len(facts) + 1) * len(text)
        at = min(ends, key=lambda end: abs(end - wanted))
        text = f"{text[:at]}{start} {fact}. {text[at:]}"
    return text


def haystack(tokenizer: Any, index: int, length: int) -> Tensor:
    """Document ``index`` with its facts, of almost ``length`` tokens so that a question fits."""
    tokens, facts = encode(tokenizer, read_text(haystack_text(index))), facts_of(index)
    spare = 64 + len(encode(tokenizer, " ".join(" ".join(fact) for fact in facts)))
    start = index // len(HELD_OUT) * length % (len(tokens) - length)
    text = tokenizer.decode(tokens[start : start + length - spare])
    document = encode(tokenizer, with_facts(text, facts) + "\n\n")
    return torch.cat((beginning(tokenizer), document))
