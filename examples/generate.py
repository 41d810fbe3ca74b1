"""A real model continues a document and answers a question about it, exactly and with ART.

Three lanes decode in turn on the same weights: transformers' own exact attention, the ART operator
with its rule switched off, and ART. The first and the last stream side by side. Then ART is led
along the exact text token by token to measure how far its distributions are off.

    python examples/generate.py                     # SmolLM2-135M-Instruct, guided by two-bit codes
    python examples/generate.py --preset balanced   # reads less
    python examples/generate.py --walk sink_recent  # in a fixed order it has to read more ...
    python examples/generate.py --walk sink_recent --patience 2  # ... or it forgets the fact
    python examples/generate.py --model path/or/hub-id --document my.txt --question "Who ...?"
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import models
import torch
from decoding import Lane, Run, first_difference, kl_divergence, race, replay, share_weights
from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

import art_torch
from art_torch import PRESETS, ARTCache, Stability

DATA = Path(__file__).parent / "data"
QUESTION = "When did the Bergen Linux User's Group demonstrate carrier pigeon IP?"
# A turn between document and question, because many chat templates want the roles to alternate.
ACKNOWLEDGEMENT = "Thank you for the text. What would you like to know about it?"


def device_of(name: str) -> torch.device:
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:1, got {name}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"there is no {name}, torch {torch.__version__} finds {torch.cuda.device_count()} GPUs"
        )
    return device


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder or hub id; SmolLM2-135M-Instruct if left out")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device_of, default=default, help="cpu, cuda or cuda:1")
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    add("--document", type=Path, default=DATA / "hacker_folklore.txt", help="text file")
    add("--question", default=QUESTION)
    add("--max-new-tokens", type=int, default=48, help="per task")
    walks = ["guided", "sink_recent", "recent_first", "oldest_first"]
    add("--walk", default="guided", choices=walks, help="order of reading")
    add("--preset", choices=[*PRESETS], help="rule of a guided walk; quality if left out")
    for name, kind, help in (
        ("--d-scale", float, "largest relative change of length"),
        ("--d-direction", float, "largest 1 - cosine"),
        ("--patience", int, "stable blocks in a row"),
    ):
        add(name, type=kind, default=argparse.SUPPRESS, help=f"{help}, instead of the preset's")
    add("--out", type=Path, default=Path("art_demo"), help="folder for heat maps and report")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 2:
        parser.error(f"--max-new-tokens must be at least 2, got {arguments.max_new_tokens}")
    if arguments.preset and arguments.walk != "guided":
        parser.error(f"--preset is for --walk guided, got --walk {arguments.walk}")
    if not arguments.document.is_file():
        parser.error(f"--document: there is no file {arguments.document}")
    return arguments


def rule_of(arguments: argparse.Namespace) -> Stability:
    """The preset's rule, or one that suits the walks of a fixed order, with what was asked for."""
    is_guided = arguments.walk == "guided"
    rule = PRESETS[arguments.preset or "quality"] if is_guided else Stability(patience=8)
    names = ("d_scale", "d_direction", "patience")
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return replace(rule, **given)


@dataclass
class Task:
    """Something to write after the document."""

    title: str
    key: str
    prompt: torch.Tensor  # int64 [1, T]: what follows the prefilled part


@dataclass
class Setting:
    """What all tasks share."""

    tokenizer: object
    lanes: list[Lane]  # exact sdpa, exact by the operator, ART; caches hold the document
    handle: object  # of the ART lane
    stop: set[int]
    max_new_tokens: int
    out: Path


def build_prompts(
    tokenizer, document: str, question: str, device: torch.device
) -> tuple[torch.Tensor, list[Task]]:
    """Splits the conversation into the part to prefill, int64 ``[1, T]``, and the two tasks."""
    if tokenizer.chat_template:
        roles = ("user", document), ("assistant", ACKNOWLEDGEMENT), ("user", question)
        turns = [{"role": role, "content": content} for role, content in roles]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        end = text.index(document) + len(document)
        before, after, special = text[:end], text[end:], False
    else:
        before, after, special = document, f"\n\nQuestion: {question}\nAnswer:", True

    def encode(part: str, add_special_tokens: bool) -> torch.Tensor:
        ids = tokenizer(part, add_special_tokens=add_special_tokens, return_tensors="pt")
        return ids["input_ids"].to(device)

    ids, rest = encode(before, special), encode(after, False)
    last = ids[:, -1:]
    tasks = [
        Task("The document, continued", "continuation", last),
        Task(question, "answer", torch.cat([last, rest], dim=1)),
    ]
    return ids[:, :-1], tasks


def prefill(lanes: list[Lane], ids: torch.Tensor, console: Console) -> None:
    """Reads the document into the cache of every lane."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for lane in lanes:
            bar = progress.add_task(f"Prefill, {lane.name}", total=ids.shape[1])
            lane.prefill(ids, lambda tokens, bar=bar: progress.advance(bar, tokens))


def stream(setting: Setting, task: Task, console: Console) -> list[Run]:
    """Generates with all lanes; shows the first and the last side by side as they write."""
    shown = {0: Text(), len(setting.lanes) - 1: Text()}

    def view() -> Table:
        grid = Table.grid(expand=True)
        for _ in shown:
            grid.add_column(ratio=1)
        grid.add_row(*(Panel(text, title=setting.lanes[i].name) for i, text in shown.items()))
        return grid

    with Live(view(), console=console, auto_refresh=False) as live:

        def on_token(index: int, run: Run) -> None:
            if index in shown:
                text = setting.tokenizer.decode(run.tokens, skip_special_tokens=True)
                shown[index].plain = text.lstrip("\n")
                live.update(view(), refresh=True)

        forks = [lane.fork() for lane in setting.lanes]
        return race(forks, task.prompt, setting.max_new_tokens, setting.stop, on_token)


def run_task(setting: Setting, task: Task, console: Console) -> dict:
    """Runs one task on all lanes, prints what came of it, and returns the numbers."""
    console.rule(Text(task.title, style="bold"))
    setting.handle.stats.reset()
    runs = stream(setting, task, console)
    read = setting.handle.stats.read_fraction()
    picture = setting.out / f"read_{task.key}.png"
    setting.handle.stats.plot(picture)

    exact = runs[0]
    rows = []
    bar = Progress(TextColumn("Along the exact text"), BarColumn(), console=console, transient=True)
    with bar:
        counter = bar.add_task("", total=len(exact.tokens) * (len(runs) - 1))
        for index, (lane, run) in enumerate(zip(setting.lanes, runs, strict=True)):
            row = {
                "lane": lane.name,
                "text": setting.tokenizer.decode(run.tokens, skip_special_tokens=True),
                "tokens": len(run.tokens),
                "read_fraction": read if index == len(runs) - 1 else 1.0,
                "ms_per_token": run.milliseconds(),
            }
            if index:
                row["first_difference"] = first_difference(exact.tokens, run.tokens)
                forced = replay(
                    lane.fork(), task.prompt, exact.tokens, lambda: bar.advance(counter)
                )
                kl = kl_divergence(exact.logits, forced.logits)
                row["kl_mean"], row["kl_max"] = float(kl.mean()), float(kl.max())
            rows.append(row)
    console.print(result_table(rows, setting.tokenizer, runs), "")
    console.print(f"Heat map, layers x KV heads: [cyan]{picture}[/]\n")
    return {"task": task.key, "title": task.title, "lanes": rows}


def result_table(rows: list[dict], tokenizer, runs: list[Run]) -> Table:
    def difference(row: dict, run: Run) -> str:
        index = row.get("first_difference")
        if index is None:
            return "none" if "first_difference" in row else ""
        pair = (tokenizer.decode(other.tokens[index : index + 1]) for other in (runs[0], run))
        return f"{index + 1}: " + " / ".join(map(repr, pair))

    def number(row: dict, key: str, form: str) -> str:
        value = row.get(key)
        return "" if value is None or math.isnan(value) else form.format(value)

    note = "KL: along the exact text, mean and largest, nats per token"
    table = Table(caption=note, caption_justify="left", box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("KV read", "ms/token", "first difference", "KL", "max"):
        table.add_column(title, justify="right", no_wrap=True)
    for row, run in zip(rows, runs, strict=True):
        table.add_row(
            row["lane"],
            number(row, "read_fraction", "{:.1%}"),
            number(row, "ms_per_token", "{:.1f}"),
            difference(row, run),
            number(row, "kl_mean", "{:.2g}"),
            number(row, "kl_max", "{:.2g}"),
        )
    return table


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads"


def main() -> None:
    arguments = parse_arguments()
    logging.disable_progress_bar()
    console = Console()
    folder = arguments.model or models.smollm2()
    name = arguments.model or "SmolLM2-135M-Instruct"
    with console.status(f"Loading {name}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
        )
        model = model.to(arguments.device).eval()
    document = arguments.document.read_text(encoding="utf-8").strip()
    ids, tasks = build_prompts(tokenizer, document, arguments.question, arguments.device)
    room = model.config.get_text_config().max_position_embeddings
    needed = max(ids.shape[1] + task.prompt.shape[1] for task in tasks) + arguments.max_new_tokens
    if not document or needed > room:
        raise SystemExit(f"the document needs 1 to {room} tokens of context, got {needed}")

    criterion = rule_of(arguments)
    console.print(
        f"[bold]{name}[/], {arguments.dtype}, {describe(arguments.device)}, "
        f"a document of {ids.shape[1] + 1:,} tokens\n"
        f"{criterion}, walk {arguments.walk}\n"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    operator, rule = share_weights(model), share_weights(model)
    with (
        art_torch.patch(operator, None),
        # This shows what a walk reads and loses, also where it saves no time.
        art_torch.patch(rule, criterion, arguments.walk, exact_where_faster=False) as handle,
    ):
        sdpa = Lane("exact, sdpa", model, DynamicCache(config=model.config))
        exact = Lane("exact, ART operator", operator, ARTCache(model.config))
        prefill([sdpa, exact], ids, console)
        # Prefill is exact in any case, so both ART lanes start from the same cache.
        lanes = [sdpa, exact, Lane("ART", rule, exact.fork().cache)]
        stop = set(torch.tensor(model.generation_config.eos_token_id).flatten().tolist())
        setting = Setting(tokenizer, lanes, handle, stop, arguments.max_new_tokens, arguments.out)
        report = [run_task(setting, task, console) for task in tasks]
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
