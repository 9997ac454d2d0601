"""GGUF's tokenizer metadata as the JSON files of a model directory: tokenizer.json, and what stands beside it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-bpe": _WORD + r"\p{N}{1,3}" + _REST,
    "llama3": _WORD + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORD + r"\p{N}" + _REST,
    "gpt-2": None,
    "default": None,
}
"""``tokenizer.ggml.pre`` to the pattern that cuts text into words first; None: GPT-2's, which byte-level BPE brings."""
CONTROL, USER_DEFINED, UNKNOWN = 3, 4, 2
Texts = Mapping[str, Callable[[], str]]


def tokenizer_why_not(metadata: Mapping[str, Any]) -> str | None:
    """None: it can be turned into a tokenizer.json; else the reason, for a user to read."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return "the file holds no tokenizer"
    for key in ("token_type", "scores"):
        if len(metadata.get(f"tokenizer.ggml.{key}") or tokens) != len(tokens):
            return f"its tokenizer is damaged: {len(tokens)} tokens, but not as many of {key}"
    for role in ("bos", "eos", "unknown", "padding"):
        token = metadata.get(f"tokenizer.ggml.{role}_token_id", 0)
        if not isinstance(token, int) or not 0 <= token < len(tokens):
            return f"its tokenizer is damaged: {role}_token_id {token!r} of {len(tokens)} tokens"
    if kind == "llama":
        return None if "tokenizer.ggml.scores" in metadata else "its tokenizer has no scores"
    if kind != "gpt2":
        return f"tokenizers of kind {kind!r} are not read; known: gpt2, llama"
    if pre not in SPLITS:
        return f"byte-level BPE that cuts words as {pre!r} is not read; known: {', '.join(SPLITS)}"
    return None if "tokenizer.ggml.merges" in metadata else "its tokenizer has no merges"


def texts_of(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Texts:
    """The files beside the weights, by name, and what makes each."""
    found: dict[str, Any] = {"config.json": lambda: config}
    ends = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    if ids := list(dict.fromkeys(i for i in ends if i is not None)):
        found["generation_config.json"] = lambda: {"eos_token_id": ids}
    if tokenizer_why_not(metadata) is None:
        found["tokenizer_config.json"] = lambda: _settings(metadata)
        found["tokenizer.json"] = lambda: _tokenizer(metadata)
    return {name: functools.partial(_text, make) for name, make in found.items()}


def _text(make: Callable[[], Any]) -> str:
    return json.dumps(make(), ensure_ascii=False)


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in named.items()}
    settings = {role: tokens[i] for role, i in ids.items() if i is not None and i < len(tokens)}
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return settings


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json as the tokenizers library writes it."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    added = (CONTROL, USER_DEFINED, UNKNOWN) if sentencepiece else (CONTROL, USER_DEFINED)
    layout = _sentencepiece(metadata, tokens) if sentencepiece else _byte_level(metadata, tokens)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [
        {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in added
    ]
    ends = _post_processor(metadata, tokens, sentencepiece)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, **layout, **ends}


def _post_processor(metadata: Mapping[str, Any], tokens: list[str], sentencepiece: bool) -> dict[str, Any]:
    """The special tokens around a text; a SentencePiece model opens with one unless it says otherwise."""
    around = []
    for role, usual in (("bos", sentencepiece), ("eos", False)):
        token = metadata.get(f"tokenizer.ggml.{role}_token_id")
        wanted = metadata.get(f"tokenizer.ggml.add_{role}_token", usual)
        around.append([(tokens[token], token)] if wanted and token is not None else [])
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    both = [*text, {"Sequence": {"id": "B", "type_id": 1}}]
    before, after = ([{"SpecialToken": {"id": t, "type_id": 0}} for t, _ in some] for some in around)
    if not before and not after:
        return {"post_processor": None}
    known = {t: {"id": t, "ids": [i], "tokens": [t]} for some in around for t, i in some}
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": before + text + after,
            "pair": before + both + after,
            "special_tokens": known,
        }
    }


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Byte-level BPE."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    pattern = SPLITS[pre]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    merges = [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]]
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": level if pattern is None else {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": {**level, "use_regex": True},
        "model": _bpe(tokens, merges) | {"ignore_merges": pre in ("llama-bpe", "llama3")},
    }


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """SentencePiece's BPE: any two pieces that make a third are a merge, the one of the highest score first."""
    ids, scores = {token: i for i, token in enumerate(tokens)}, metadata["tokenizer.ggml.scores"]
    merges = []
    for token in sorted(tokens, key=lambda token: (-scores[ids[token]], ids[token])):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        both = [(a, b) for a, b in halves if a in ids and b in ids]
        merges += [list(pair) for pair in sorted(both, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [{"type": "Prepend", "prepend": "▁"}] if space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prepend, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(tokens, merges)
        | {"byte_fallback": True, "fuse_unk": True, "unk_token": None if unknown is None else tokens[unknown]},
    }


def _bpe(tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }
