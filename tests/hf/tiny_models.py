"""Small random models, one of each kind of attention."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gemma3n import Gemma3nTextConfig
from transformers.models.gemma4 import Gemma4TextConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

VOCAB = 97
PAD = 0
LAYERS = 4

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    # Weights this large make attention uneven and the best token clear.
    "initializer_range": 0.3,
}
_WINDOW = 40
# A sliding layer behind another one of its kind, and between full ones.
_MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

TINY = {
    "llama": lambda: LlamaConfig(**_COMMON, head_dim=32),
    "mistral": lambda: MistralConfig(**_COMMON, head_dim=32, sliding_window=_WINDOW),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=32),
    "gemma2": lambda: Gemma2Config(
        **_COMMON,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=_WINDOW,
        layer_types=_MIXED,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_COMMON,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=_WINDOW,
        layer_types=_MIXED,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON,
        head_dim=32,
        sliding_window=_WINDOW,
        layer_types=_MIXED,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "phi3": lambda: Phi3Config(**_COMMON | {"num_attention_heads": 2, "num_key_value_heads": 1}),
}
# The last two layers read the keys of earlier ones.
_SHARING = _COMMON | {
    "head_dim": 32,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "sliding_window": _WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
}
SHARING = {
    "gemma3n": lambda: Gemma3nTextConfig(
        **_SHARING, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 6
    ),
    "gemma4": lambda: Gemma4TextConfig(**_SHARING, global_head_dim=64),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = (TINY | SHARING)[name]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    if name == "gpt_oss":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, std=1.0)
    return model


def prompt(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, tokens), generator=generator)
