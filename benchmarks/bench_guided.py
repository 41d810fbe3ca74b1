"""What the guided walk loses on real text, and whether facts are still found.

    python benchmarks/bench_guided.py            # an hour; writes results/guided-fidelity-*.json
    python benchmarks/bench_guided.py --quick    # one short window, few settings; only prints
    python benchmarks/bench_guided.py --walks guided    # the package's presets and rules only
    python benchmarks/bench_guided.py --parts tuning    # a grid of rules to choose presets from
    python benchmarks/bench_guided.py --parts tried --contexts 4096   # writes results/tried-*.json
    python benchmarks/bench_guided.py --model gemma3 --contexts 8192 16384

Every row is written as soon as it is measured, and rows that the file already has are not measured
again; each says of which commit it is. "guided" is the package's walk, as users get it, by the same
operators. Orders that the package does not have are made in PyTorch (walk_makers.py); reading and
stopping are the operator's there too. Texts and their licences: data/README.md.

    read     share of the visible KV tokens that decode steps read, mean over layers and KV heads
             (of Gemma: of the layers without a window). Key codes are not counted.
    KL       of the text's last 64 tokens of a window every one is a decode step; the mean of
             KL(exact || setting) over their predictions. The interval resamples windows.
    top-1    how often the likeliest next token is the exact model's.
    found    facts lie at nine depths of a document. A fact counts if the exact model completes its
             sentence with it, token by token, greedily; then it is found or not by a setting. Of
             the beginning of the sentence all but the last token is prefilled. Margins say by how
             many nats the fact is likelier than anything else, at its worst token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import guided_report
import guided_texts
from common import RESULTS, describe_machine, progress_bar, slug
from guided_measure import EXACT, FORCED, Row, Task, load_tokenizer, measure
from guided_rules import PACKAGE, TRIED, WALKS, Setting, matching

from art_torch import PRESETS, ResidualMass, Stability

PARTS = ("tuning", "tried", "held_out", "needles")
TUNING_WINDOWS = 2  # per text, at most; of what was tried too
# Rules of the package that the presets do not use.
LEVERS = (
    Setting("guided", ResidualMass(0.2)),
    Setting("guided", ResidualMass(0.25)),
    Setting("guided", PRESETS["quality"] & ResidualMass(0.1)),
)
PAPER = (
    Setting("oldest_first", Stability.paper()),
    Setting("oldest_first", PRESETS["balanced"]),
)
GRID = (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.045, 0.06, 0.09, 0.13)
MODELS = {"smollm2": "SmolLM2-135M-Instruct, float32", "gemma3": "Gemma 3 270M, float32"}


def key_of(row: Row) -> tuple[Any, ...]:
    return row["case"], row["text"], row["window"], row["impl"]


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
    if "tried" in arguments.parts:
        tasks += windows(guided_texts.TUNING, TUNING_WINDOWS, tried_settings())
    guided = [Setting("guided", rule) for rule in PRESETS.values()]
    if "held_out" in arguments.parts:
        curves = [Setting(walk, rule) for walk in arguments.walks for rule in PRESETS.values()]
        settings = tuple(dict.fromkeys([*guided, *LEVERS, *PAPER, *curves]))
        tasks += windows(tuple(arguments.texts), arguments.windows, settings)
    if "needles" in arguments.parts:
        others = [Setting(walk, PRESETS["balanced"]) for walk in arguments.walks]
        settings = tuple(dict.fromkeys([*guided, *LEVERS, *PAPER, *others]))
        for index in range(arguments.haystacks):
            text = guided_texts.haystack_text(index)
            for context in sorted({2048, *contexts}):
                tasks.append(Task(text, index, (context,), settings, needles=True))
    return tasks


def tuning_settings() -> tuple[Setting, ...]:
    """Rules to choose the presets from, alone and with the estimated mass."""
    stable = [matching(d_scale, patience) for patience in (1, 2, 3) for d_scale in GRID]
    masses = [ResidualMass(eps) for eps in (0.05, 0.1, 0.2, 0.3, 0.4)]
    joined = [
        rule
        for d_scale in (0.02, 0.045, 0.09)
        for mass in masses[1:]
        for rule in (matching(d_scale, 1) & mass, matching(d_scale, 1) | mass)
    ]
    return tuple(Setting("guided", rule) for rule in (*stable, *masses, *joined))


def tried_settings() -> tuple[Setting, ...]:
    """Other codes, scores and pinned units, and other rules for the package's walk."""
    walks = (PACKAGE, "codes2", "codes4", "oracle", *TRIED)
    rules = PRESETS["quality"], PRESETS["balanced"]
    settings = [Setting(walk, rule) for walk in walks for rule in rules]
    masses = [ResidualMass(eps) for eps in (0.05, 0.1, 0.2)]
    joined = [rule for mass in masses[1:] for rule in (rules[1] & mass, rules[1] | mass)]
    return (*settings, *(Setting(PACKAGE, rule) for rule in (*masses, *joined)))


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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[2:])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--windows", type=int, default=6, help="per held-out text, at most")
    parser.add_argument("--walks", nargs="+", choices=WALKS, default=[*WALKS])
    texts = guided_texts.HELD_OUT
    parser.add_argument("--texts", nargs="+", choices=texts, default=texts, help="to report")
    parser.add_argument("--haystacks", type=int, default=8, help="documents with nine facts each")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    results = head(arguments.model)
    suffix = "" if arguments.model == "smollm2" else f"-{arguments.model}"
    name = "tried" if arguments.parts == ["tried"] else "guided-fidelity"
    default = RESULTS / f"{name}{suffix}-{slug(results['device'])}.json"
    path = arguments.output or default
    keep = not arguments.quick or arguments.output
    rows = json.loads(path.read_text())["rows"] if keep and path.exists() else []
    done = {key_of(row) for row in rows}
    tasks = quick_tasks() if arguments.quick else tasks_of(arguments)
    with progress_bar("bench_guided", number_of_rows(tasks, done)) as advance:
        for row in measure(arguments.model, tasks, done, arguments.workers):
            rows.append({**row, "commit": results["commit"]})
            if keep:
                write(path, results, rows, [])
            advance(f"{row['case']} {row['text']} {row['impl']}")
    guided_report.show(rows, PRESETS)
    if keep:
        write(path, results, rows, guided_report.summaries(rows))
        picture = path.with_suffix(".png")
        guided_report.draw(rows, PRESETS, picture)
        print(f"written to {path} and {picture}")


if __name__ == "__main__":
    main()
