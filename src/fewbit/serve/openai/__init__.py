"""OpenAI's protocol, with vLLM's additions that clients rely on. The same routes stand under /openai, as in KServe."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from fewbit.serve.body import read_object, shown
from fewbit.serve.models import Models
from fewbit.serve.openai import shapes
from fewbit.serve.openai.answer import answer, jobs_of, request_id
from fewbit.serve.openai.chat import Chat, ChatRequest
from fewbit.serve.openai.completions import Completion
from fewbit.serve.openai.requests import CompletionRequest, Sampled, without_neutral
from fewbit.serve.openai.tokens import (
    Detokenized,
    DetokenizeRequest,
    TokenizeChat,
    Tokenized,
    TokenizerInfo,
    TokenizeText,
    detokenize,
    info,
    tokenize,
)
from fewbit.serve.openapi import Error, operation
from fewbit.serve.problems import UnknownModelError, json_response, validated

__all__ = ["Chat", "ChatRequest", "Completion", "CompletionRequest", "jobs_of", "parsed", "routes"]


class Card(TypedDict):
    """A model as the list shows it; one that is not loaded has no length yet."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["fewbit"]
    root: str
    parent: None
    max_model_len: int | None
    permission: list[Any]


class Cards(TypedDict):
    """The models of the server."""

    object: Literal["list"]
    data: list[Card]


def routes(models: Models) -> APIRouter:
    """The router of one server."""
    router = APIRouter()

    def get(path: str, handler: Callable[..., Any], described: dict[str, Any]) -> None:
        router.add_api_route(path, handler, methods=["GET"], openapi_extra=described)

    def post(path: str, handler: Callable[..., Any], described: dict[str, Any]) -> None:
        router.add_api_route(path, handler, methods=["POST"], openapi_extra=described)

    began = int(time.time())

    def cards() -> list[Card]:
        lengths = {service.name: service.max_model_len for service in models.ready}
        return [_card(name, began, lengths.get(name)) for name in models.names]

    async def listed(request: Request) -> Response:
        """The models."""
        found: Cards = {"object": "list", "data": cards()}
        return json_response(found)

    async def card(request: Request, model: str) -> Response:
        """One model."""
        for found in cards():
            if found["id"] == model:
                return json_response(found)
        raise UnknownModelError(f"the model '{shown(model)}' is not served here", "model")

    async def completions(request: Request) -> Response:
        """Texts that go on with prompts."""
        body = parsed(CompletionRequest, await read_object(request))
        name = request_id(body)
        return await answer(request, Completion(await models.service(request, body.model), body, name))

    async def chat(request: Request) -> Response:
        """An assistant's next message."""
        body = parsed(ChatRequest, await read_object(request))
        name = request_id(body)
        service = await models.service(request, body.model)
        return await answer(request, Chat(service, body, name, models.trust_request_chat_template))

    async def tokens(request: Request) -> Response:
        """Token ids of a text or a chat."""
        fields = await read_object(request)
        body = parsed(TokenizeChat if "messages" in fields else TokenizeText, fields)
        service = await models.service(request, body.model)
        return json_response(await tokenize(service, body, models.trust_request_chat_template))

    async def text(request: Request) -> Response:
        """The text of token ids."""
        body = parsed(DetokenizeRequest, await read_object(request))
        return json_response(await detokenize(await models.service(request, body.model), body))

    async def tokenizer_info(request: Request) -> Response:
        """Special tokens and the chat template."""
        return json_response(info(await models.service(request)))

    text_completion = operation(body=CompletionRequest, answer=shapes.Completion, stream=shapes.Completion | Error)
    chat_completion = operation(body=ChatRequest, answer=shapes.ChatCompletion, stream=shapes.ChatChunk | Error)
    for prefix in ("/v1", "/openai/v1"):
        get(f"{prefix}/models", listed, operation(answer=Cards))
        get(f"{prefix}/models/{{model:path}}", card, operation(answer=Card))
        post(f"{prefix}/completions", completions, text_completion)
        post(f"{prefix}/chat/completions", chat, chat_completion)
    post("/tokenize", tokens, operation(body=TokenizeText | TokenizeChat, answer=Tokenized))
    post("/detokenize", text, operation(body=DetokenizeRequest, answer=Detokenized))
    get("/tokenizer_info", tokenizer_info, operation(answer=TokenizerInfo))
    return router


def _card(name: str, began: int, max_model_len: int | None) -> Card:
    return {
        "id": name,
        "object": "model",
        "created": began,
        "owned_by": "fewbit",
        "root": name,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [],
    }


def parsed(model: type[Any], fields: dict[str, Any]) -> Any:
    """A body of OpenAI's, checked as far as no model is needed for it."""
    if issubclass(model, Sampled):
        fields = without_neutral(model, fields)
    body = validated(model, fields, model.nested)
    body.check()
    return body
