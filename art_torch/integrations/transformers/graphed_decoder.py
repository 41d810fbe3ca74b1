"""Decode steps without the time that Python and kernel launches take between two of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from art_torch.integrations.transformers.attention import LayerSettings, settings_of
from art_torch.integrations.transformers.cache import ARTCache
from art_torch.integrations.transformers.patching import attention_modules, base_model

__all__ = ["GraphedDecoder", "cache_argument"]

_WARM_UP_STEPS = 3  # as torch.cuda.graph asks for
_LARGER = "make a GraphedDecoder with a larger max_length"


def cache_argument(model: PreTrainedModel) -> str:
    """The name of a model's cache argument: transformers 5.24 has renamed it to ``cache``."""
    return "cache" if "cache" in _arguments_of(model) else "past_key_values"


def _arguments_of(model: PreTrainedModel) -> set[str]:
    """Names of what a model takes; a model of peft hands on what it does not name itself."""
    return set(inspect.signature(base_model(model).forward).parameters)


class _Prompt(NamedTuple):
    """A prompt on the device.

    Attributes:
        ids: int64 ``[batch, tokens]``.
        mask: int64 ``[batch, tokens]``, 0 for pads on the left.
        lengths: int64 ``[batch, 1]``, tokens of each row, pads left out.
        longest: The largest of them.
    """

    ids: Tensor
    mask: Tensor
    lengths: Tensor
    longest: int


class GraphedDecoder:
    """Generates with a patched model whose decode step is one CUDA graph.

    A step of ``generate()`` launches some dozens of kernels per layer, which takes longer than the
    kernels of a small batch. Here the prompt runs as usual, then the cache is preallocated, three
    steps warm up, and all others replay one recorded step: where reading stops is decided on the
    GPU. On a CPU the same steps are called one by one. ::

        with art_torch.patch(model, "balanced", walk="guided") as handle:
            decoder = art_torch.GraphedDecoder(model, max_length=8192)
            ids = decoder.generate(input_ids, max_new_tokens=200)

    Args:
        model: A causal language model, or one of peft around it, patched by
            :func:`art_torch.patch`, in eval mode, all of it on one device. On a GPU without
            ``on_call`` and ``measure_mass``: a recorded step calls no Python.
        max_length: Tokens that a row may reach, new ones included and pads left out. The cache has
            room for them, and on a GPU work is planned for them.
        cache: An empty ``ARTCache`` of the model; None makes one.

    Attributes:
        cache: The cache, whose lengths are tensors while decoding; see
            :meth:`art_torch.ARTCache.preallocate`.

    Raises:
        TypeError: ``model`` is no model of transformers, or ``cache`` is not an ``ARTCache``.
        ValueError: ``max_length`` is below 1, the model is in training mode, on several devices or
            has prompts of peft in front of its input, or the cache is in use.
    """

    def __init__(
        self, model: PreTrainedModel, max_length: int, cache: ARTCache | None = None
    ) -> None:
        base_model(model)
        if cache is not None and not isinstance(cache, ARTCache):
            raise TypeError(f"cache must be an art_torch.ARTCache, got {type(cache).__name__}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if model.training:
            raise ValueError("the model is in training mode, which is exact: call model.eval()")
        adapters = getattr(model, "peft_config", None) or {}
        if any(adapter.is_prompt_learning for adapter in adapters.values()):
            raise ValueError(
                "the model has virtual tokens of peft (prompt learning), which are not counted "
                "here: use generate()"
            )
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"the model must be on one device, it is on {names}")
        self.model, self.max_length = model, max_length
        self.cache = ARTCache(model.config) if cache is None else cache
        if self.cache.get_seq_length() != 0:
            raise ValueError(
                f"the cache must be empty, it has {self.cache.get_seq_length()} tokens: "
                "call cache.reset()"
            )
        self._inputs: dict[str, Any] = {cache_argument(model): self.cache}  # of every pass
        if "logits_to_keep" in _arguments_of(model):
            self._inputs["logits_to_keep"] = 1
        self._device: torch.device = devices.pop()
        self._token, self._position = torch.empty(0), torch.empty(0)  # int64 [batch, 1]
        self._logits = torch.empty(0)  # of the recorded step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = self._longest = 0  # since the prompt, and tokens of the longest row
        self._prompts = 0
        self._attention = next(iter(attention_modules(base_model(model))), None)
        self._patch: LayerSettings | None = None  # of it, that the prompt ran with

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Runs a prompt through the model; what the cache held is forgotten.

        Args:
            input_ids: int64 ``[batch, tokens]``.
            attention_mask: ``[batch, tokens]``, 0 for pads on the left; None without pads.

        Returns:
            Logits ``[batch, vocab]`` of the token after the prompt.

        Raises:
            RuntimeError: The model is not patched, or, on a GPU, with ``on_call`` or
                ``measure_mass``.
            NotImplementedError: A press of kvpress is active: a compressed cache cannot be
                preallocated.
            ValueError: A shape is wrong, a pad is not on the left, or the longest row is longer
                than ``max_length``.
            CacheMemoryError: ``max_length`` tokens do not fit.
        """
        return self._prefill(self._checked(input_ids, attention_mask))

    def _checked(
        self, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int = 0
    ) -> _Prompt:
        """The prompt on the device, if it and what follows it can be run."""
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be [batch, tokens], got {list(input_ids.shape)}")
        input_ids = input_ids.to(self._device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be {list(input_ids.shape)} as input_ids, got "
                f"{list(mask.shape)}"
            )
        mask = mask.to(self._device, torch.int64)
        if not bool((mask.diff(dim=1) >= 0).all() & (mask[:, -1] == 1).all()):
            raise ValueError("attention_mask must have its pads on the left")
        lengths = mask.sum(1, keepdim=True)
        longest = int(lengths.max())
        if longest > self.max_length:
            raise ValueError(
                f"the prompt has {longest} tokens, more than max_length {self.max_length}: "
                f"{_LARGER}"
            )
        # The last token is not fed any more.
        if longest + new_tokens - 1 > self.max_length:
            raise ValueError(
                f"{longest} tokens of the prompt and {new_tokens} new ones do not fit into "
                f"max_length {self.max_length}: {_LARGER}"
            )
        if self._records:
            self._check_recordable()
        return _Prompt(input_ids, mask, lengths, longest)

    def _prefill(self, prompt: _Prompt) -> Tensor:
        input_ids, mask, lengths, longest = prompt
        self._longest, self._steps, self._graph = longest, 0, None
        self._prompts += 1
        self._patch = self._patch_now()
        self.cache.reset()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._forward(input_ids, position_ids=positions, attention_mask=mask)
        self.cache.preallocate(self.max_length)
        with torch.inference_mode(False):  # steps write to them, in any mode
            self._token, self._position = torch.empty_like(lengths), lengths.clone()
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token to each row.

        Args:
            tokens: int64 ``[batch]``.

        Returns:
            Logits ``[batch, vocab]`` of the token that follows. The next step overwrites them.

        Raises:
            RuntimeError: No prompt has run, or the cache was used otherwise since, or the model's
                patch is another one.
            ValueError: The shape is wrong, or a row has reached ``max_length``.
        """
        if self._longest == 0:
            raise RuntimeError("call prefill(input_ids) first")
        if self._patch_now() is not self._patch:
            raise RuntimeError(
                "the model was unpatched, or patched anew, since the prompt: call prefill again"
            )
        if not all(table.static_len for table in self.cache.tables.values()):
            raise RuntimeError("the cache was used otherwise since the prompt: call prefill again")
        if tokens.shape != self._token.shape[:1]:
            raise ValueError(f"tokens must be [{len(self._token)}], got {list(tokens.shape)}")
        if self._longest + self._steps >= self.max_length:
            raise ValueError(f"a row has reached max_length {self.max_length}: {_LARGER}")
        self._token.copy_(tokens[:, None])
        logits = self._run()
        self._position.add_(1)
        self._steps += 1
        return logits

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yields the new tokens as they are chosen.

        Args:
            input_ids: int64 ``[batch, tokens]``.
            max_new_tokens: At most so many; fewer if all rows have ended.
            attention_mask: As for :meth:`prefill`.
            choose: From logits ``[batch, vocab]`` to tokens int64 ``[batch]``; the likeliest if
                None.

        Yields:
            int64 ``[batch]``. A row that has ended repeats the model's pad token, or else its last.

        Raises:
            RuntimeError: As :meth:`prefill`, or another prompt has run since.
            ValueError: As :meth:`prefill`, or the new tokens do not fit into ``max_length``.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        choose = choose or (lambda logits: logits.argmax(-1))
        with torch.no_grad():
            logits = self._prefill(self._checked(input_ids, attention_mask, max_new_tokens))
        prompt = self._prompts
        ends = self._end_tokens()
        pad = self.model.generation_config.pad_token_id
        ended = torch.zeros(len(logits), dtype=torch.bool, device=self._device)
        tokens = torch.zeros(len(logits), dtype=torch.int64, device=self._device)
        for i in range(max_new_tokens):
            tokens = torch.where(ended, tokens if pad is None else pad, choose(logits))
            yield tokens
            ended |= torch.isin(tokens, ends)
            if i + 1 == max_new_tokens or (len(ends) > 0 and bool(ended.all())):
                return
            if self._prompts != prompt:
                raise RuntimeError("another prompt has run since this stream began")
            logits = self.step(tokens)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The prompt and the new tokens, int64 ``[batch, tokens + new]``; see :meth:`stream`."""
        new = [*self.stream(input_ids, max_new_tokens, attention_mask, choose)]
        return torch.cat([input_ids.to(self._device), torch.stack(new, 1)], 1)

    @property
    def _records(self) -> bool:
        return self._device.type == "cuda"

    def _check_recordable(self) -> None:
        """Refuses what Python would have to do at every step."""
        for settings in filter(None, map(settings_of, self.model.modules())):
            if settings.on_call is not None or settings.measure_mass:
                raise RuntimeError(
                    "on_call and measure_mass=True cannot be recorded in a CUDA graph: use "
                    "generate() for analysis"
                )

    def _end_tokens(self) -> Tensor:
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else ends
        return torch.tensor(ends, dtype=torch.int64, device=self._device).flatten()

    def _patch_now(self) -> LayerSettings | None:
        """Settings of one layer, which every patch makes anew."""
        return None if self._attention is None else settings_of(self._attention)

    def _forward(self, ids: Tensor, **inputs: Any) -> Tensor:
        logits: Tensor = self.model(ids, **self._inputs, **inputs).logits
        return logits[:, -1]

    def _decode(self) -> Tensor:
        return self._forward(self._token, position_ids=self._position)

    def _run(self) -> Tensor:
        if not self._records:
            return self._decode()
        with torch.cuda.device(self._device):
            return self._run_on_gpu()

    def _run_on_gpu(self) -> Tensor:
        if self._graph is not None:
            self._graph.replay()
            return self._logits
        if self._steps >= _WARM_UP_STEPS:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, and runs nothing
                self._logits = self._decode()
            self._graph.replay()
            return self._logits
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            logits = self._decode()
        current.wait_stream(side)
        return logits
