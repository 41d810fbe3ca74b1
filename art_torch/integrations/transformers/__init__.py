"""HuggingFace transformers: a paged cache, and patching of models."""

from __future__ import annotations

from art_torch.integrations.transformers.cache import ARTCache
from art_torch.integrations.transformers.patching import PatchHandle, patch_model

__all__ = ["ARTCache", "PatchHandle", "patch_model"]
