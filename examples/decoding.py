"""Greedy decoding by hand, with what `generate` hides: every step's logits and time."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from art_torch.integrations.transformers import cache_argument

__all__ = ["Lane", "Run", "first_difference", "kl_divergence", "race", "replay", "share_weights"]

_PREFILL_CHUNK = 512


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a second model on the same weights, which can be patched by itself."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@dataclass
class Lane:
    """A model with its own KV cache.

    Attributes:
        name: Shown to the reader.
        model: Model, patched or not.
        cache: The cache that its tokens go to.
    """

    name: str
    model: PreTrainedModel
    cache: Cache

    def feed(self, ids: Tensor) -> Tensor:
        """Runs new tokens, int64 ``[1, T]``; returns the logits ``[vocab]`` of the last one."""
        with torch.inference_mode():
            output = self.model(ids, logits_to_keep=1, **{cache_argument(self.model): self.cache})
        return output.logits[0, -1].float()

    def prefill(self, ids: Tensor, on_progress: Callable[[int], None]) -> None:
        """Runs a long prompt, int64 ``[1, T]``, in pieces; reports the tokens of each."""
        for chunk in ids.split(_PREFILL_CHUNK, dim=1):
            self.feed(chunk)
            on_progress(chunk.shape[1])

    def fork(self) -> Lane:
        """Returns a lane that goes on from here with a cache of its own."""
        return Lane(self.name, self.model, copy.deepcopy(self.cache))


@dataclass
class Run:
    """What one lane produced.

    Attributes:
        tokens: Token ids, as generated or as given.
        logits: float32 ``[vocab]`` per token: what the token was, or would have been, chosen from.
        seconds: Wall time per decode step. The first token has none: it follows from the prompt.
    """

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def milliseconds(self) -> float:
        """Median time per decode step; NaN when there was none."""
        return 1e3 * statistics.median(self.seconds) if self.seconds else float("nan")


def race(
    lanes: Sequence[Lane],
    prompt: Tensor,
    max_new_tokens: int,
    stop: set[int],
    on_token: Callable[[int, Run], None],
) -> list[Run]:
    """Lets all lanes generate greedily, one step each in turn, so that they meet the same weather.

    Args:
        lanes: Lanes whose caches hold the same text.
        prompt: int64 ``[1, T]``, the rest of the prompt.
        max_new_tokens: Tokens per lane.
        stop: Token ids that end a lane.
        on_token: Called with the index of the lane and its run after each token.

    Returns:
        One run per lane.
    """
    runs = [Run() for _ in lanes]
    pending = [lane.feed(prompt) for lane in lanes]
    for step in range(max_new_tokens):
        for index, (lane, run) in enumerate(zip(lanes, runs, strict=True)):
            if run.tokens and run.tokens[-1] in stop:
                continue
            if step:
                pending[index] = _timed_feed(lane, run)
            run.logits.append(pending[index])
            run.tokens.append(int(pending[index].argmax()))
            on_token(index, run)
    return runs


def replay(lane: Lane, prompt: Tensor, tokens: Sequence[int], on_token: Callable[[], None]) -> Run:
    """Feeds a lane given tokens and records what it would have chosen each of them from."""
    run = Run()
    logits = lane.feed(prompt)
    for token in tokens:
        if run.tokens:
            logits = _timed_feed(lane, run)
        run.logits.append(logits)
        run.tokens.append(token)
        on_token()
    return run


def _timed_feed(lane: Lane, run: Run) -> Tensor:
    start = time.perf_counter()
    logits = lane.feed(torch.tensor([[run.tokens[-1]]], device=lane.model.device))
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)  # the call only starts the work
    run.seconds.append(time.perf_counter() - start)
    return logits


def first_difference(exact: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None where both are the same."""
    for index, (left, right) in enumerate(zip(exact, other, strict=False)):
        if left != right:
            return index
    return None if len(exact) == len(other) else min(len(exact), len(other))


def kl_divergence(exact: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """KL divergence of the next-token distribution from the exact one, nats per token, ``[T]``."""
    p = torch.stack(list(exact)).double().log_softmax(-1)
    q = torch.stack(list(other)).double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
