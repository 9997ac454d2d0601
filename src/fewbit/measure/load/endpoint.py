"""A server under load: what it is asked, in OpenAI's words, and its answers as records."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fewbit.errors import RequestError
from fewbit.measure.load.answer import AnswerReader, Record
from fewbit.measure.load.datasets import Sample
from fewbit.measure.load.http import Client, ExchangeError, Url

Route = Literal["completions", "chat"]
PATHS: dict[Route, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Asking:
    """How samples become requests.

    Attributes:
        model: name that the server knows the model by.
        route: completions or chat.
        temperature: of sampling; None: the server's own.
        ignore_eos: whether answers go on to their full length.
        extra: more fields of the request's body; they win.
        timeout_s: seconds until an answer is given up.
    """

    model: str
    route: Route = "completions"
    temperature: float | None = 0.0
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0

    def body(self, sample: Sample) -> bytes:
        """A request's body.

        Raises:
            RequestError: this route cannot take such a prompt.
        """
        made: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.route == "chat":
            if isinstance(sample.prompt, tuple):
                raise RequestError("prompts of token ids go to completions only; use --endpoint completions or text")
            messages = (
                sample.prompt if isinstance(sample.prompt, list) else [{"role": "user", "content": sample.prompt}]
            )
            made |= {"messages": messages, "max_completion_tokens": sample.output_tokens}
        else:
            if isinstance(sample.prompt, list):
                raise RequestError("the data set holds chat messages; use --endpoint chat")
            made |= {"prompt": sample.prompt, "max_tokens": sample.output_tokens}
        if self.temperature is not None:
            made["temperature"] = self.temperature
        if self.ignore_eos:
            made["ignore_eos"] = True
        return json.dumps(made | dict(self.extra)).encode()

    def counted(self, sample: Sample) -> Sample:
        """The sample, without a count of tokens that the server's chat template makes untrue."""
        return replace(sample, prompt_tokens=None) if self.route == "chat" else sample


class Endpoint:
    """One server and how it is asked. Requests are made beforehand; sending one is writing bytes."""

    def __init__(self, client: Client, asking: Asking) -> None:
        self.client, self.asking = client, asking

    def prepare(self, sample: Sample) -> bytes:
        """The request for a sample."""
        return self.client.request("POST", PATHS[self.asking.route], self.asking.body(sample))

    async def send(self, request: bytes) -> Record:
        """Send a request and record the answer; whatever goes wrong stands in the record."""
        loop = asyncio.get_running_loop()
        record = Record(sent=loop.time())
        answer = AnswerReader(record)
        try:
            async with asyncio.timeout(self.asking.timeout_s):
                response = await self.client.exchange(request, answer.push)
            answer.finish(response.status, loop.time())
        except ExchangeError as error:
            record.error = record.error or str(error)
        except TimeoutError:
            record.error = f"no complete answer within {self.asking.timeout_s:g} s"
        record.ended = loop.time()
        return record


async def served_models(client: Client, timeout_s: float = 10.0) -> list[str]:
    """Names of the models that a server has.

    Raises:
        RequestError: it cannot be reached, or has no list of models.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            found = await client.exchange(client.request("GET", "/v1/models"), lambda stamp, part: body.extend(part))
        if found.status != 200:
            raise ExchangeError(f"HTTP {found.status}")
        names = [entry["id"] for entry in json.loads(body)["data"]]
    except TimeoutError:
        raise RequestError(f"{client.url.text}: GET /v1/models got no answer within {timeout_s:g} s") from None
    except ExchangeError as error:
        raise RequestError(f"{client.url.text}: GET /v1/models: {error}; is a server running there?") from None
    except (ValueError, KeyError, TypeError):
        raise RequestError(
            f"{client.url.text}: GET /v1/models is no list of models; is this an OpenAI-compatible server?"
        ) from None
    if not names:
        raise RequestError(f"{client.url.text}: the server has no model")
    return names


def client_of(url: str, api_key: str | None) -> Client:
    """Connections to a server.

    Raises:
        RequestError: the URL is none, or the key cannot stand in a header.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise RequestError("the API key holds characters that cannot stand in a header")
    return Client(Url.parse(url), {"Authorization": f"Bearer {api_key}"} if api_key else None)
