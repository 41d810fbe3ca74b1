"""Several questions about one document at once, by ``generate_batch``, exactly and with ART.

The questions share the document: transformers computes its keys and values once, and each answer
reads them there.

    python examples/continuous_batching.py                      # SmolLM2-135M-Instruct
    python examples/continuous_batching.py --patience 2         # reads less, forgets more
    python examples/continuous_batching.py --question "Who ...?" --question "When ...?"
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import models
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

import art_torch
from art_torch.integrations import continuous_batching

DOCUMENT = Path(__file__).parent / "data" / "hacker_folklore.txt"
QUESTIONS = (
    "When did the Bergen Linux User's Group demonstrate carrier pigeon IP?",
    "What does Phil Agre say about the word hack?",
    "What is this text about?",
)
PAGE = 256  # tokens a page of transformers' cache, as many as its default


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder or hub id; SmolLM2-135M-Instruct if left out")
    add("--document", type=Path, default=DOCUMENT, help="text file")
    add("--question", action="append", help="may be given several times")
    add("--max-new-tokens", type=int, default=32)
    add("--patience", type=int, default=8, help="stable blocks in a row that end the walk")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    name = arguments.model or models.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    questions = arguments.question or QUESTIONS
    document = arguments.document.read_text(encoding="utf-8")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{document}\n\n{question}"}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for question in questions
    ]
    longest = max(map(len, prompts)) + arguments.max_new_tokens
    sizes = ContinuousBatchingConfig(
        num_blocks=len(prompts) * (longest // PAGE + 1), max_batch_tokens=512
    )
    greedy = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )

    def answers() -> list[str]:
        start = time.perf_counter()
        outputs = model.generate_batch(
            prompts, generation_config=greedy, continuous_batching_config=sizes
        )
        seconds = time.perf_counter() - start
        if errors := [output.error for output in outputs.values() if output.error]:
            raise RuntimeError(errors[0])
        tokens = [output.generated_tokens for output in outputs.values()]
        print(f"{sum(map(len, tokens))} tokens in {seconds:.1f} s")
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)

    print(f"{len(prompts)} prompts of about {len(prompts[0]):,} tokens")
    print("exact: ", end="", flush=True)
    exact = answers()
    rule = art_torch.Stability(patience=arguments.patience)
    with art_torch.patch(model, rule) as handle, continuous_batching.enable(handle):
        print("ART:   ", end="", flush=True)
        stopped = answers()
    print(f"ART read {handle.stats.read_fraction():.1%} of the keys and values")
    for question, one, other in zip(questions, exact, stopped, strict=True):
        print(f"\n{question}\n  exact: {one.strip()}\n  ART:   {other.strip()}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
