"""Tiny random models of every family of transformers with a causal language model.

What a size is called differs from family to family; here are all the names, and what has to fit
together in some of them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, PAD = 97, 0
LAYERS, HEADS, HEAD_DIM, WINDOW = 4, 4, 32, 40
MOST_PARAMETERS = 60_000_000

# Names of the sizes in configs, and what they become; a size that is smaller already stays.
SIZES = {
    128: (
        "hidden_size d_model n_embd dim emb_dim embedding_size dim_model_base intermediate_size "
        "ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size n_inner moe_intermediate_size "
        "shared_expert_intermediate_size shared_intermediate_size dense_intermediate_size dim_ff "
        "expert_ffn_hidden_size intermediate_size_mlp moe_shared_expert_intermediate_size dff "
        "feed_forward_size shared_experts_intermediate_size attention_hidden_size lru_width "
        "word_embed_proj_dim input_embedding_size output_embedding_size embedding_dim d_inner "
        "backbone_hidden_size"
    ),
    HEADS: (
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads "
        "decoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
        "num_decoder_layers num_encoder_layers num_blocks max_window_layers depth"
    ),
    2: (
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k "
        "n_group num_expert_group num_kv_shared_layers altup_num_inputs"
    ),
    HEAD_DIM: "head_dim swa_head_dim global_head_dim v_head_dim kv_channels attention_head_size "
    "dim_head d_head q_lora_rank kv_lora_rank",
    1: "topk_group n_shared_experts",
    16: "hidden_size_per_layer_input qk_rope_head_dim qk_nope_head_dim rotary_dim",
    WINDOW: "sliding_window sliding_window_size window_size local_attention attention_window_size",
    VOCAB: "vocab_size vocab_size_per_layer_input",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
EVEN_IF_NONE = (
    "head_dim",
    "num_key_value_heads",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
)
POSITIONS = "max_position_embeddings n_positions max_seq_len n_ctx model_max_length"
MOST_POSITIONS = 512
TOKENS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}

# What no name tells, by model_type: sizes that have to fit together, and layers that are attention.
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "greedy"},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * LAYERS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "bamba": {"attn_layer_indices": [1, 3]},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


class CannotBuild(Exception):
    """No tiny model of a family: why."""


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A config of this class with everything that has a known name made small."""
    default = kind()
    changes = small_sizes(default)
    for name, part in default.sub_configs.items():
        own = getattr(default, name, None)
        changes[name] = tiny_config(part if own is None else type(own))
    changes |= SPECIAL.get(kind.model_type, {})
    config = kind(**changes)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def small_sizes(default: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that shrink a config of default values."""
    values = default.to_dict()
    changes: dict[str, Any] = {}
    for name, size in SIZE_OF.items():
        name = default.attribute_map.get(name, name)
        value = values.get(name, 0)
        if isinstance(value, int) and value > size and not is_refused(name, value):
            changes[name] = size
    for name in EVEN_IF_NONE:
        if name in values and values[name] is None:
            changes[name] = SIZE_OF[name]
    if "kv_lora_rank" in values:  # of MLA: these follow from other sizes
        changes.pop("head_dim", None)
        if "num_key_value_heads" in values:
            changes["num_key_value_heads"] = HEADS
    for name in POSITIONS.split():
        if values.get(name):
            changes[name] = MOST_POSITIONS
    changes |= {name: value for name, value in TOKENS.items() if name in values}
    if "initializer_range" in values:
        changes["initializer_range"] = 0.1  # attention is uneven, and the best token clear
    types = default.attribute_map.get("layer_types", "layer_types")
    kinds = list(dict.fromkeys(values.get(types) or ()))
    if len(kinds) > 1:  # the first few layers alone may be all of one kind
        changes[types] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    return changes


def is_refused(name: str, size: int) -> bool:
    """Whether this is a head that art_torch refuses: made small, it would hide that."""
    return name in SIZES[HEAD_DIM].split() and "lora" not in name and size > 256


def build(family: str) -> PreTrainedModel:
    """A tiny random model with eager attention, in float32.

    Raises:
        CannotBuild: There is none, and why.
    """
    try:
        config = tiny_config(CONFIG_MAPPING[family])
        with torch.device("meta"):
            size = sum(p.numel() for p in make(config).parameters())
    except Exception as error:  # whatever a family's code raises is what the table tells
        raise CannotBuild(f"its config does not shrink: {one_line(error)}") from error
    if size > MOST_PARAMETERS:
        raise CannotBuild(f"the small config still has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return make(config).float().eval()


def make(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config, with random weights."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model


def one_line(error: Exception) -> str:
    """The message of an error, fit for a table."""
    text = re.sub(r"\s+", " ", str(error).replace("|", "/")).strip()
    if isinstance(error, (KeyError, AttributeError, IndexError)) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else text[:299] + "…"
