"""The measurements of bench_guided.py, in processes of their own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import guided_texts
import torch
import torch.multiprocessing as mp
from common import ROOT
from forcing import Document, Forcing
from guided_rules import Setting, rule_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

FORCED = 64  # decode steps of a window: every length of the uncoded tail occurs once
EXACT = Setting()
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A window of a text at several lengths, or a document with facts, and what to measure."""

    text: str
    index: int
    contexts: tuple[int, ...]
    settings: tuple[Setting, ...]
    needles: bool = False

    @property
    def window(self) -> int:
        """Names it in rows: the first token of the window, or the number of the document."""
        return self.index if self.needles else self.index * max(self.contexts)

    def cases(self) -> list[str]:
        return [f"S{context}{'_needles' if self.needles else ''}" for context in self.contexts]

    def key(self, case: str, setting: Setting) -> tuple[Any, ...]:
        return case, self.text, self.window, setting.name


# ---------------------------------------------------------------- measurement


class Measurement:
    """The model, and what is measured with it."""

    def __init__(self, name: str, emit: Callable[[Row], None]) -> None:
        self.tokenizer, self.forcing = load_tokenizer(name), Forcing(load_model(name))
        self.emit = emit

    def run(self, task: Task, done: set[tuple[Any, ...]]) -> None:
        missing = [
            (case, context)
            for case, context in zip(task.cases(), task.contexts, strict=True)
            if any(task.key(case, setting) not in done for setting in task.settings)
        ]
        if missing and task.needles:
            for case, context in missing:
                self._needles(task, case, context, done)
        elif missing:
            self._windows(task, missing, done)

    def _windows(self, task: Task, cases: list[tuple[str, int]], done: set[Any]) -> None:
        longest = max(task.contexts)
        tokens = guided_texts.windows(self.tokenizer, task.text, longest, task.index + 1)[-1]
        document: Document | None = None
        for case, context in cases:
            # A longer window goes on where the shorter one was measured.
            document = self.forcing.prefill(tokens[: context - FORCED], longest, document)
            following = tokens[context - FORCED : context]
            exact, _ = self.forcing.force(document, following, rule_of(EXACT))
            logs = exact.double().log_softmax(-1)
            for setting in task.settings:
                if task.key(case, setting) in done:
                    continue
                logits, read = self.forcing.force(document, following, rule_of(setting))
                divergence = (logs.exp() * (logs - logits.double().log_softmax(-1))).sum(-1)
                agree = (logits.argmax(-1) == exact.argmax(-1)).double()
                measured = {
                    "read": round(read, 5),
                    "kl": float(f"{float(divergence.mean()):.4g}"),
                    "kl_max": float(f"{float(divergence.max()):.4g}"),
                    "top1": round(float(agree.mean()), 5),
                }
                self._emit(task, case, setting, measured)

    def _needles(self, task: Task, case: str, context: int, done: set[Any]) -> None:
        facts = guided_texts.facts_of(task.index)
        tokens = guided_texts.haystack(self.tokenizer, task.index, context)
        document = self.forcing.prefill(tokens, context)
        for setting in (EXACT, *task.settings):
            if task.key(case, setting) in done:
                continue
            margins, reads = zip(
                *(self._find(document, fact, setting) for fact in facts), strict=True
            )
            measured = {
                "read": round(sum(reads) / len(reads), 5),
                "margins": [float(f"{margin:.3g}") for margin in margins],
            }
            self._emit(task, case, setting, measured)

    def _find(
        self, document: Document, fact: tuple[str, str], setting: Setting
    ) -> tuple[float, float]:
        """By how many nats the fact is the greedy continuation of its beginning; the share read.

        Of the fact's tokens after those before it, the least that one is likelier than all others:
        above 0, the fact is found. All but the last token of the beginning are prefilled, as
        prompts are.
        """
        prompt = guided_texts.encode(self.tokenizer, fact[0])
        answer = guided_texts.encode(self.tokenizer, " ".join(fact))[len(prompt) :]
        with self.forcing.aside(document, prompt[:-1]):
            steps = torch.cat((prompt[-1:], answer[:-1]))
            logits, read = self.forcing.force(document, steps, rule_of(setting))
        own = logits.gather(-1, answer[:, None])[:, 0]
        others = logits.scatter(-1, answer[:, None], -torch.inf).amax(-1)
        return float((own - others).min()), read

    def _emit(self, task: Task, case: str, setting: Setting, measured: Row) -> None:
        row = {"case": case, "text": task.text, "window": task.window, "impl": setting.name}
        self.emit({**row, **measured})


def folder_of(name: str) -> Path:
    sys.path.append(str(ROOT / "examples"))
    import models

    return {"smollm2": models.smollm2, "gemma3": models.gemma3}[name]()


def load_tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(folder_of(name))


def load_model(name: str) -> Any:
    transformers_logging.disable_progress_bar()  # it would tear the benchmark's own
    return AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32).eval()


# ---------------------------------------------------------------- work and workers


def work(name: str, tasks: Any, rows: Any, done: set[tuple[Any, ...]]) -> None:
    """One process: takes tasks until a None comes; puts rows, and None or an error at the end."""
    try:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        logging.getLogger("art_torch").setLevel(logging.ERROR)
        with torch.inference_mode():
            measurement = Measurement(name, rows.put)
            while (task := tasks.get()) is not None:
                measurement.run(task, done)
        rows.put(None)
    except BaseException as error:
        rows.put(f"{type(error).__name__}: {error}")
        raise


def measure(name: str, tasks: list[Task], done: set[Any], workers: int) -> Iterator[Row]:
    """Rows as they are measured by ``workers`` processes."""
    context = mp.get_context("spawn")
    todo, rows = context.Queue(), context.Queue()
    for task in [*tasks, *[None] * workers]:
        todo.put(task)
    processes = [
        context.Process(target=work, args=(name, todo, rows, done), daemon=True)
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    while workers:
        row = rows.get()
        if isinstance(row, str):
            raise RuntimeError(f"a worker failed with {row}")
        if row is None:
            workers -= 1
        else:
            yield row
