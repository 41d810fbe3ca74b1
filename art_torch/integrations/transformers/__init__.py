"""HuggingFace transformers: a paged cache, and patching of models."""

from __future__ import annotations

from art_torch.integrations.transformers.cache import ARTCache
from art_torch.integrations.transformers.graphed_decoder import GraphedDecoder, cache_argument
from art_torch.integrations.transformers.patching import PatchHandle, patch_model

__all__ = ["ARTCache", "GraphedDecoder", "PatchHandle", "cache_argument", "patch_model"]
