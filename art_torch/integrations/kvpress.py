"""kvpress: compression of the prompt's KV cache, together with ART.

Nothing has to be called for a patched model::

    press = SnapKVPress(compression_ratio=0.8)
    cache = art_torch.ARTCache(model.config)
    with art_torch.patch(model, criterion), press(model):
        model.generate(**inputs, past_key_values=cache)

``docs/kvpress.md`` says what then happens. :func:`compatible` is for the same presses without ART.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from art_torch.integrations.transformers.patching import attention_modules, base_model
from art_torch.integrations.transformers.presses import require_kvpress, serve_presses

__all__ = ["compatible"]


@contextmanager
def compatible(model: PreTrainedModel) -> Iterator[None]:
    """Lets presses of kvpress work on a model that is not patched, with today's transformers.

    kvpress 0.5.5 asks attention modules for arguments that transformers has renamed or given up
    since 5.3; inside this context manager they are there. A model patched with
    :func:`art_torch.patch` does not need it::

        with compatible(model), press(model):
            model.generate(**inputs, past_key_values=DynamicCache(config=model.config))

    Args:
        model: A causal language model of transformers, or one of peft around it. Presses
            themselves go by the layers, and take ``model.get_base_model()`` of peft.

    Raises:
        TypeError: ``model`` is no model of transformers.
        ModuleNotFoundError: kvpress is not installed.
        RuntimeError: It is too old.
    """
    model = base_model(model)
    require_kvpress()
    hooks = [
        module.register_forward_hook(serve_presses, prepend=True, with_kwargs=True)
        for module in attention_modules(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
