"""/tokenize, /detokenize and /tokenizer_info: the model's tokenizer for clients that count or score tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from fewbit.errors import RequestError
from fewbit.serve.openai.messages import Conversation, encoded
from fewbit.serve.schema import Strict
from fewbit.serve.service import Service


class TokenizeText(Strict):
    """POST /tokenize of a text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    nested: ClassVar[Mapping[str, type[BaseModel]]] = {}

    def check(self) -> None:
        """Nothing more."""


class TokenizeChat(Conversation):
    """POST /tokenize of a chat."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    tokens: Annotated[list[int], Field(fail_fast=True)]
    model: str | None = None

    nested: ClassVar[Mapping[str, type[BaseModel]]] = {}

    def check(self) -> None:
        """Nothing more."""


class Tokenized(TypedDict):
    """Tokens of a text or of a chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(TypedDict):
    """What a client needs that renders chats itself or compares with special tokens."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None


async def tokenize(service: Service, asked: TokenizeText | TokenizeChat, trusted: bool) -> Tokenized:
    """The answer of /tokenize.

    Raises:
        RequestError: The text is far longer than the model reads, or the template refuses the chat.
    """
    if isinstance(asked, TokenizeText):
        ids = await service.encode(asked.prompt, asked.add_special_tokens is not False)
    else:
        _, ids = await encoded(service, asked, trusted, bool(asked.add_special_tokens))
    words = None
    if asked.return_token_strs:
        words = [service.tokenizer.token_bytes(token).decode(errors="replace") for token in ids]
    return {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": words}


async def detokenize(service: Service, asked: DetokenizeRequest) -> Detokenized:
    """The answer of /detokenize; special tokens are spelled out.

    Raises:
        RequestError: An id outside the vocabulary.
    """
    vocab = service.client.info.vocab
    for i, token in enumerate(asked.tokens):
        if not 0 <= token < vocab:
            raise RequestError(f"tokens[{i}] is token id {token}, outside the vocabulary of {vocab}", "tokens")
    return {"prompt": await asyncio.to_thread(service.tokenizer.decode, asked.tokens, False)}


def info(service: Service) -> TokenizerInfo:
    """The answer of /tokenizer_info."""
    tokenizer = service.tokenizer
    template, roles = tokenizer.chat_template, tokenizer.special_tokens
    found: dict[str, Any] = {name: roles.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": service.max_model_len,
        "chat_template": template.source if template else None,
        **found,  # type: ignore[typeddict-item]
    }
