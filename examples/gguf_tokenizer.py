"""Builds a HuggingFace tokenizer from the vocabulary inside a GGUF file.

transformers can do this too, but what it builds depends on its release (5.17 cuts Gemma's text
into other tokens than 5.23 does, and misses the end-of-turn token of SmolLM2). The models of the
examples are converted once and then used by any release, so their tokenizers are built here.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

__all__ = ["tokenizer_from_gguf"]

# llama.cpp's token types: matched whole in the text; control tokens are also hidden when decoding.
_CONTROL, _USER_DEFINED = 3, 4


def tokenizer_from_gguf(gguf: Path) -> PreTrainedTokenizerFast:
    """Builds the tokenizer that a GGUF file describes.

    Args:
        gguf: File of a byte-level BPE model (SmolLM2) or of a Gemma SentencePiece model.

    Returns:
        The tokenizer, with its special tokens and, if the file has one, its chat template.

    Raises:
        ValueError: The file holds another kind of tokenizer.
    """
    from gguf import GGUFReader

    fields = GGUFReader(str(gguf)).fields

    def value(key: str):
        return fields[key].contents() if key in fields else None

    kind, tokens = value("tokenizer.ggml.model"), value("tokenizer.ggml.tokens")
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, value("tokenizer.ggml.merges"))
    elif kind == "llama" and str(value("general.architecture")).startswith("gemma"):
        tokenizer = _gemma(tokens)
    else:
        raise ValueError(f"expected a gpt2 or Gemma tokenizer in {gguf.name}, got {kind!r}")

    types = value("tokenizer.ggml.token_type")
    tokenizer.add_tokens(
        [
            AddedToken(tokenizer.id_to_token(index), normalized=False, special=kind == _CONTROL)
            for index, kind in enumerate(types)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = value(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            special[f"{role}_token"] = tokenizer.id_to_token(index)
    if value("tokenizer.ggml.add_bos_token"):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=value("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **special,
    )


def _byte_level(tokens: list[str], merges: list[str]) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gemma(tokens: list[str]) -> Tokenizer:
    # The file spells runs of spaces as spaces, all other tokens with the SentencePiece underline.
    vocab = {
        "▁" * len(token) if token and not token.strip(" ") else token: index
        for index, token in enumerate(tokens)
    }
    # The file lists no merges. Every way to cut a token into two tokens is one, and the order of
    # the vocabulary is their priority; of one token's cuts the longest left part comes first.
    merges = [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
