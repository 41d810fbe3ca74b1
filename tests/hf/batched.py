"""``generate_batch`` of small models, and notes of the passes that transformers makes of it."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import torch
from tiny_models import PAD, prompt
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import PagedAttentionCache

import art_torch
from art_torch.integrations import continuous_batching

NEW_TOKENS = 12
PAGE = 16


def batching(**options):
    # transformers 5.17 and 5.18 call it block_size.
    names = inspect.signature(ContinuousBatchingConfig).parameters
    page_size = options.pop("page_size", PAGE)
    options["page_size" if "page_size" in names else "block_size"] = page_size
    return ContinuousBatchingConfig(**{"num_blocks": 60, "max_batch_tokens": 64} | options)


def answers(model, prompts, new_tokens=NEW_TOKENS, **options):
    persistent = options.pop("persistent_manager", False)
    config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=PAD)
    outputs = model.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=batching(**options),
        persistent_manager=persistent,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs.values()]


def generated(model, prompts, new_tokens=NEW_TOKENS):
    """One by one, by ``generate``."""
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]


def prompts_of(*lengths):
    return [prompt(1, length, seed=length)[0].tolist() for length in lengths]


class Passes:
    """Notes of each forward pass what transformers prepared for it."""

    def __init__(self, model):
        self.lens, self.caches, self.tables = [], [], []
        self.hook = model.register_forward_pre_hook(self.note, with_kwargs=True, prepend=True)

    def note(self, model, args, kwargs):
        if isinstance(kwargs.get("cache"), PagedAttentionCache):
            self.lens.append(kwargs["cu_seq_lens_q"].diff().tolist())
            self.caches.append(kwargs["cache"])
            self.tables.append(kwargs["block_table"] is not None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()

    @property
    def mixed(self):
        return sum(1 in lens and max(lens) > 1 for lens in self.lens)


@contextmanager
def enabled(model, criterion, **settings):
    with (
        art_torch.patch(model, criterion, **settings) as handle,
        Passes(model) as passes,
        continuous_batching.enable(handle),
    ):
        yield handle, passes
