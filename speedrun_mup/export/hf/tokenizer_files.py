"""Our tokenizers as a tokenizer.json of Hugging Face's library, which puts BOS before a text as training does."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.shards import TOKENIZER_FILE
from speedrun_mup.data.tokenizers import BpeTokenizer, ByteTokenizer, HfTokenizer, Tokenizer, letters_of

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The content of each file, by name. ConfigError for a kind of tokenizer that has no such form."""
    if isinstance(tokenizer, HfTokenizer):
        content = _own_json(tokenizer)
        bos = _content_of(content, tokenizer.bos_token)
    elif isinstance(tokenizer, ByteTokenizer):
        bos = "<|bos|>"
        content = _byte_level([bytes([byte]) for byte in range(256)], [], None, bos)
    elif isinstance(tokenizer, BpeTokenizer):
        bos = "<|endoftext|>" if tokenizer.name == "gpt2" else "<|bos|>"
        content = _byte_level(tokenizer.tokens, merges_of(tokenizer.tokens), tokenizer.pattern, bos)
    else:
        raise ConfigError(f"tokens of kind {tokenizer.name} have no form that transformers reads")
    content |= {"truncation": None, "padding": None, "post_processor": _bos_before(bos, tokenizer.bos_token)}
    return {TOKENIZER_FILE: content, "tokenizer_config.json": _settings(bos)}


def _settings(bos: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": bos,
        "pad_token": bos,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text that spells a special token is text, here as in training
    }


def _byte_level(
    tokens: Sequence[bytes], merges: Sequence[tuple[bytes, bytes]], pattern: str | None, bos: str
) -> dict[str, Any]:
    """Byte pairs, each byte written as a letter. pattern: splits text into words; None: it is one."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    added = {"id": len(tokens), "content": bos, "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [added],
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL
        if pattern is None
        else {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]},
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is that token, as tiktoken has it
            "vocab": {letters_of(token): id for id, token in enumerate(tokens)},
            "merges": [[letters_of(left), letters_of(right)] for left, right in merges],
        },
    }


def merges_of(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes was merged from, in the order of their ids.

    It is what earlier merges make of its bytes. ConfigError if that is not two tokens.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[at] >= rank:
                raise ConfigError(
                    f"token {rank} of this tokenizer is not merged from two earlier ones; it has no other form"
                )
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _own_json(tokenizer: HfTokenizer) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return json.loads((Path(folder) / TOKENIZER_FILE).read_text())


def _content_of(content: dict[str, Any], id: int) -> str:
    """How a tokenizer.json spells the token `id`."""
    vocab = content["model"]["vocab"]
    spelled = {number: token for token, number in vocab.items()} if isinstance(vocab, dict) else {}
    if isinstance(vocab, list):  # Unigram
        spelled = {number: token for number, (token, _) in enumerate(vocab)}
    return (spelled | {added["id"]: added["content"] for added in content.get("added_tokens") or ()})[id]


def _bos_before(bos: str, id: int) -> dict[str, Any]:
    """The post-processor that puts BOS before a text, and between two that make a pair."""
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }
