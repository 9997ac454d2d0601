"""Asking a server that speaks OpenAI's API: prompts of token ids, scored through `echo` or continued."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from fewbit.measure.load.http import Client, ExchangeError
from fewbit.measure.tasks.answer import AnswerError, Likelihood
from fewbit.measure.tasks.prompts import Continuation

TRIES = 6
TIMEOUT_S = 600.0
BUSY = (429, 503)
"""Answers of a server that wants to be asked again later."""


class HttpAnswerer:
    """Asks `/v1/completions`. A server that is busy or breaks a connection is asked again, some times.

    How many requests are under way at a time is for those who ask to say.
    """

    def __init__(self, client: Client, model: str) -> None:
        self._client, self._model = client, model

    async def likelihood(self, asked: Continuation) -> Likelihood:
        """See `Answerer`.

        Raises:
            AnswerError: The server has no log probabilities of prompts; nothing is made up for them.
        """
        ids = [*asked.context, *asked.continuation]
        # one token more than is looked at: not every server takes max_tokens 0
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        found = (await self._ask(body)).get("logprobs") or {}
        chosen, top = found.get("token_logprobs") or [], found.get("top_logprobs") or []
        if len(chosen) not in (len(ids), len(ids) + 1) or len(top) != len(chosen):
            raise AnswerError(
                f"{self._client.url.text}: {len(chosen)} log probabilities came for a prompt of {len(ids)} tokens with "
                "echo; a server without those of the prompt cannot be scored by log-likelihood (try --scorer generate)"
            )
        first, last = len(asked.context), len(ids)
        values = chosen[first:last]
        if not all(isinstance(value, (int, float)) for value in values):
            raise AnswerError(f"{self._client.url.text}: a token of a prompt came without its log probability")
        greedy = all(mine >= max(of.values()) for mine, of in zip(values, top[first:last], strict=True))
        return Likelihood(tuple(values), greedy, asked.characters)

    async def text(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        """See `Answerer`."""
        body: dict[str, Any] = {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
        if stop:
            body["stop"] = list(stop)
        text = (await self._ask(body)).get("text")
        if not isinstance(text, str):
            raise AnswerError(f"{self._client.url.text}: an answer without a text")
        return text

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of an answer."""
        sent = self._client.request("POST", "/v1/completions", json.dumps({"model": self._model, **body}).encode())
        for number in range(TRIES):
            status, got, after = await _exchange(self._client, sent)
            if status == 200:
                return _choice(self._client, got)
            if status and status not in BUSY:
                break
            if number < TRIES - 1:
                await asyncio.sleep(min(after or 0.5 * 2**number, 30))
        words = _message(got) if status else got.decode()
        raise AnswerError(f"{self._client.url.text}: {f'HTTP {status}: ' if status else ''}{words}")


async def served(client: Client, name: str | None) -> tuple[str, int | None]:
    """The name of a model that a server has, and how many tokens it takes, where the server says that.

    Raises:
        AnswerError: It cannot be reached, has no list of models, or not this one.
    """
    status, got, _ = await _exchange(client, client.request("GET", "/v1/models"))
    where = f"{client.url.text}: GET /v1/models"
    if not status:
        raise AnswerError(f"{where}: {got.decode()}; is a server running there?")
    try:
        cards = {card["id"]: card.get("max_model_len") for card in json.loads(got)["data"]} if status == 200 else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise AnswerError(f"{where} is no list of models; is this an OpenAI-compatible server?") from None
    if status != 200:
        raise AnswerError(f"{where}: HTTP {status}: {_message(got)}")
    if not cards:
        raise AnswerError(f"{where}: the server has no model")
    if name is not None and name not in cards:
        raise AnswerError(f"{client.url.text} has no model '{name}'; known: {', '.join(sorted(cards))}")
    chosen = name or next(iter(cards))
    length = cards[chosen]
    return chosen, length if type(length) is int and length > 1 else None


async def _exchange(client: Client, request: bytes) -> tuple[int, bytes, float | None]:
    """Status, body and seconds to wait before another try; status 0 and a reason where there was no answer."""
    body = bytearray()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            found = await client.exchange(request, lambda stamp, part: body.extend(part))
    except ExchangeError as error:
        return 0, str(error).encode(), None
    except TimeoutError:
        return 0, f"no complete answer within {TIMEOUT_S:g} s".encode(), None
    after = found.headers.get("retry-after", "")
    return found.status, bytes(body), float(after) if after.isascii() and after.isdigit() else None


def _choice(client: Client, got: bytes) -> dict[str, Any]:
    try:
        choice = json.loads(got)["choices"][0]
        if isinstance(choice, dict):
            return choice
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    raise AnswerError(f"{client.url.text}: no completion but {got[:80]!r}")


def _message(got: bytes) -> str:
    """What an error's body says."""
    try:
        found = json.loads(got)
        error = found.get("error", found)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
    except (ValueError, AttributeError):
        return got[:200].decode("utf8", "replace") or "no reason given"
