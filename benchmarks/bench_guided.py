"""What the guided walk loses on real text, and whether facts are still found.

    python benchmarks/bench_guided.py            # an hour; writes results/guided-fidelity-*.json
    python benchmarks/bench_guided.py --quick    # one short window, few settings; only prints
    python benchmarks/bench_guided.py --parts tuning    # the grid that the presets come from
    python benchmarks/bench_guided.py --model gemma3 --contexts 8192 16384

Every row is written as soon as it is measured, and rows that the file already has are not measured
again. The walks are made in PyTorch (walk_makers.py); the reading and the stopping are the
operator's. Texts and their licences: data/README.md.

    read     share of the visible KV tokens that decode steps read, mean over layers and KV heads
             (of Gemma: of the layers without a window). Key codes are not counted.
    KL       of the text's last 64 tokens of a window every one is a decode step; the mean of
             KL(exact || setting) over their predictions. The interval resamples windows.
    top-1    how often the likeliest next token is the exact model's.
    found    facts lie at nine depths of a document. A fact counts if the exact model completes its
             sentence with it, token by token, greedily; then it is found or not by a setting.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import guided_report
import guided_texts
import torch
import torch.multiprocessing as mp
from common import RESULTS, ROOT, describe_machine, progress_bar, slug
from forcing import Document, Forcing
from guided_rules import WALKS, Setting, matching, rule_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

PARTS = ("tuning", "held_out", "needles")
TUNING_WINDOWS = 2  # per text, at most
FORCED = 64  # decode steps of a window: every length of the uncoded tail occurs once
# Mean KL of .003, .01 and .03 on the tuning texts at 4k and 8k (--parts tuning).
PRESETS = {
    "quality": matching(0.011, 2),
    "balanced": matching(0.035, 2),
    "fast": matching(0.075, 1),
}
CURVE = [matching(d_scale, 2) for d_scale in (0.01, 0.03, 0.09)]
GRID = (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.045, 0.06, 0.09, 0.13)
MODELS = {"smollm2": "SmolLM2-135M-Instruct, float32", "gemma3": "Gemma 3 270M, float32"}
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


def key_of(row: Row) -> tuple[Any, ...]:
    return row["case"], row["text"], row["window"], row["impl"]


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
            results = [self._find(document, fact, setting) for fact in facts]
            measured = {
                "read": round(sum(read for _, read in results) / len(results), 5),
                "found_at": [int(found) for found, _ in results],
            }
            self._emit(task, case, setting, measured)

    def _find(
        self, document: Document, fact: tuple[str, str], setting: Setting
    ) -> tuple[bool, float]:
        """Whether the greedy continuation of the beginning is the fact; and the share read.

        It is if every token of the fact is the likeliest one after the tokens before it.
        """
        prompt = guided_texts.encode(self.tokenizer, fact[0])
        both = guided_texts.encode(self.tokenizer, " ".join(fact))
        answer = both[len(prompt) :]
        logits, read = self.forcing.force(document, both[:-1], rule_of(setting), len(answer))
        return bool((logits.argmax(-1) == answer).all()), read

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


# ---------------------------------------------------------------- what is measured


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    tokenizer, contexts = load_tokenizer(arguments.model), tuple(sorted(arguments.contexts))

    def windows(texts: tuple[str, ...], most: int, settings: tuple[Setting, ...]) -> list[Task]:
        tasks = [
            Task(text, index, contexts, settings)
            for text in texts
            for index in range(len(guided_texts.windows(tokenizer, text, contexts[-1], most)))
        ]
        # An interrupted run should have something of every text.
        return sorted(tasks, key=lambda task: task.index)

    tasks = []
    if "tuning" in arguments.parts:
        tasks += windows(guided_texts.TUNING, TUNING_WINDOWS, tuning_settings())
    guided = [Setting("guided", rule) for rule in PRESETS.values()]
    if "held_out" in arguments.parts:
        curves = [Setting(walk, rule) for walk in WALKS for rule in CURVE]
        settings = tuple(dict.fromkeys([*guided, *curves]))
        tasks += windows(guided_texts.HELD_OUT, arguments.windows, settings)
    if "needles" in arguments.parts:
        others = [Setting(walk, PRESETS["balanced"]) for walk in WALKS]
        settings = tuple(dict.fromkeys([*guided, *others]))
        for index in range(arguments.haystacks):
            text = guided_texts.haystack_text(index)
            for context in sorted({2048, *contexts}):
                tasks.append(Task(text, index, (context,), settings, needles=True))
    return tasks


def tuning_settings() -> tuple[Setting, ...]:
    """Rules to choose the presets from, alone and with the estimated mass."""
    stable = [matching(d_scale, patience) for patience in (1, 2, 3) for d_scale in GRID]
    shares = (0.05, 0.1, 0.2, 0.3, 0.4)
    return (
        *[Setting("guided", rule) for rule in stable],
        *[Setting("guided", None, eps, corrected=True) for eps in shares],
        *[Setting("guided", None, eps, corrected=False) for eps in shares],
        *[
            Setting("guided", matching(d_scale, 1), eps, join)
            for join in ("and", "or")
            for d_scale in (0.02, 0.045, 0.09)
            for eps in shares[1:]
        ],
    )


def quick_tasks() -> list[Task]:
    settings = (Setting("guided", PRESETS["balanced"]), Setting("sink_recent", PRESETS["balanced"]))
    return [
        Task("kjv", 0, (1024,), settings),
        Task("kjv", 0, (1024,), settings, needles=True),
    ]


def number_of_rows(tasks: list[Task], done: set[Any]) -> int:
    return sum(
        task.key(case, setting) not in done
        for task in tasks
        for case in task.cases()
        for setting in ((EXACT, *task.settings) if task.needles else task.settings)
    )


# ---------------------------------------------------------------- the result file


def head(model: str) -> Row:
    results = describe_machine("transformers")
    texts = {
        kind: {name: guided_texts.digest(name) for name in names}
        for kind, names in (
            ("tuning", guided_texts.TUNING),
            ("held_out", guided_texts.HELD_OUT),
        )
    }
    presets = {
        name: [rule.d_scale, rule.d_direction, rule.patience] for name, rule in PRESETS.items()
    }
    results.update(model=MODELS[model], forced_tokens=FORCED, presets=presets, texts=texts)
    return results


def write(path: Path, results: Row, rows: list[Row], summary: list[Row]) -> None:
    """Rewrites the file; an interrupted run leaves the previous one."""
    text = json.dumps(results, indent=1)[:-2]
    for name, part in (("summary", summary), ("rows", rows)):
        lines = ",\n".join("  " + json.dumps(row) for row in part)
        text += f',\n "{name}": [\n{lines}\n ]'
    temporary = path.with_suffix(".part")
    temporary.write_text(text + "\n}\n")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the guided walk loses on real text")
    parser.add_argument("--quick", action="store_true", help="short; writes no result file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[1:])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--windows", type=int, default=6, help="per held-out text, at most")
    parser.add_argument("--haystacks", type=int, default=8, help="documents with nine facts each")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    results = head(arguments.model)
    suffix = "" if arguments.model == "smollm2" else f"-{arguments.model}"
    default = RESULTS / f"guided-fidelity{suffix}-{slug(results['device'])}.json"
    path = arguments.output or default
    keep = not arguments.quick or arguments.output
    rows = json.loads(path.read_text())["rows"] if keep and path.exists() else []
    done = {key_of(row) for row in rows}
    tasks = quick_tasks() if arguments.quick else tasks_of(arguments)
    with progress_bar("bench_guided", number_of_rows(tasks, done)) as advance:
        for row in measure(arguments.model, tasks, done, arguments.workers):
            rows.append(row)
            if keep:
                write(path, results, rows, [])
            advance(f"{row['case']} {row['text']} {row['impl']}")
    guided_report.show(rows, PRESETS)
    if keep:
        write(path, results, rows, guided_report.summaries(rows))
        picture = path.with_suffix(".png")
        guided_report.draw(rows, picture)
        print(f"written to {path} and {picture}")


if __name__ == "__main__":
    main()
