"""Asking a server from Python with nothing but the standard library: `Client`."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NoReturn
from urllib.parse import urlsplit

from fewbit.errors import FewbitError, RequestError

Messages = Sequence[dict[str, Any]]


class OverloadedServerError(FewbitError):
    """The server takes no more for the moment: try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Client:
    """A server of the OpenAI protocol, fewbit's or another. One object may be used from several threads.

    The fields of a request are keyword arguments of the same names (docs/serving.md lists them). Whatever the server
    refuses is a `RequestError` in the server's own words.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Remember where the server is; nothing is sent yet.

        Args:
            url: With or without ``http://`` and ``/v1``.
            api_key: Sent with every request.
            model: Which one to ask where a request does not say; None: the server's only or default one.
            timeout_s: How long the server may say nothing.

        Raises:
            RequestError: `url` is none.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise RequestError(f"url must be like http://127.0.0.1:8000, got '{url}'", "url")
        self._tls, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._root = urlsplit(self.url).path
        self._headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._model, self._timeout_s = model, timeout_s

    def query(self, prompts: str | Sequence[str], **fields: Any) -> list[str]:
        """What the model makes of each prompt, in their order (`n` answers to each, if that is given).

        Args:
            prompts: One text or several; they are computed together.
            **fields: Of ``/v1/completions``: ``max_tokens``, ``top_k``, ``temperature``, ``stop``, ...

        Raises:
            RequestError: The server refused it.
            OverloadedServerError: The server takes no more now.
            FewbitError: There is no server, or it failed.
        """
        prompt = prompts if isinstance(prompts, str) else list(prompts)
        answer = self._post("/v1/completions", {"prompt": prompt, **fields})
        return [choice["text"] for choice in sorted(answer["choices"], key=lambda c: c["index"])]

    def chat(self, messages: str | Messages, **fields: Any) -> str:
        """The assistant's next words.

        Args:
            messages: The chat so far, or one message of the user's.
            **fields: Of ``/v1/chat/completions``.

        Raises:
            RequestError: The server refused it.
            OverloadedServerError: The server takes no more now.
            FewbitError: There is no server, or it failed.
        """
        if fields.get("n", 1) != 1:
            raise RequestError(f"chat gives one answer, so n must be 1, got {fields['n']!r}", "n")
        answer = self._post("/v1/chat/completions", {"messages": _messages(messages), **fields})
        return answer["choices"][0]["message"]["content"] or ""

    def stream(self, prompt: str | Messages, **fields: Any) -> Iterator[str]:
        """The pieces of one text as they are made. Leaving the loop ends the request on the server.

        Args:
            prompt: A text to continue, or a chat to answer.
            **fields: Of ``/v1/completions`` or ``/v1/chat/completions``.

        Raises:
            RequestError: The server refused it.
            OverloadedServerError: The server takes no more now.
            FewbitError: There is no server, or it failed, perhaps on the way.
        """
        if fields.get("n", 1) != 1:
            raise RequestError(f"a stream is of one text, so n must be 1, got {fields['n']!r}", "n")
        if isinstance(prompt, str):
            path, body = "/v1/completions", {"prompt": prompt, **fields}
        else:
            path, body = "/v1/chat/completions", {"messages": list(prompt), **fields}
        with closing(self._connection()) as connection:
            response = self._send(connection, "POST", path, self._named(body) | {"stream": True})
            for event in self._events(response):
                if event.get("error"):
                    _refuse(500, event, None)
                for choice in event["choices"]:
                    text = choice["text"] if "text" in choice else choice["delta"].get("content")
                    if text:
                        yield text

    def models(self) -> list[str]:
        """Names of the models that the server has.

        Raises:
            FewbitError: There is no server, it failed, or it wants another key.
        """
        return [card["id"] for card in self._json("GET", "/v1/models")["data"]]

    def health(self) -> bool:
        """Whether the server and its engine answer."""
        try:
            with closing(self._connection()) as connection:
                self._send(connection, "GET", "/health")
        except FewbitError:
            return False
        return True

    # ---- the wire ----

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        return body if self._model is None else {"model": self._model, **body}

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        if body.get("stream"):
            raise RequestError("for a stream there is Client.stream", "stream")
        return self._json("POST", path, self._named(body))

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        with closing(self._connection()) as connection:
            response = self._send(connection, method, path, body)
            try:
                return json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise FewbitError(f"the answer of {self.url}{path} broke off or is no JSON: {error}") from error

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout_s)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None = None
    ) -> http.client.HTTPResponse:
        """An answer that began well."""
        try:
            content = None if body is None else json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RequestError(f"a field cannot be sent as JSON: {error}") from error
        try:
            connection.request(method, self._root + path, content, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                _refuse(response.status, _parsed(response.read()), response.getheader("Retry-After"))
        except (OSError, http.client.HTTPException) as error:
            raise FewbitError(
                f"no answer from {self.url} ({error or type(error).__name__}); is a server there (fewbit serve)?"
            ) from error
        return response

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """The objects of an event stream. Lines that are no data are signs of life."""
        try:
            while line := response.readline():
                if line.startswith(b"data:"):
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield json.loads(data)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FewbitError(f"the stream of {self.url} broke off: {error}") from error
        raise FewbitError(f"the stream of {self.url} broke off before its end")


def _messages(messages: str | Messages) -> list[dict[str, Any]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")[:200]


def _refuse(status: int, said: Any, retry_after: str | None) -> NoReturn:
    """Raise what an error answer means. Its shape is OpenAI's, KServe's, or anybody's."""
    error = said.get("error", said) if isinstance(said, dict) else said
    message = str(error.get("message", error) if isinstance(error, dict) else error) or http.client.responses[status]
    if status in (429, 503):
        delay = retry_after or ""
        raise OverloadedServerError(message, float(delay) if delay.isdigit() else 1.0)
    if status in (401, 403):
        raise FewbitError(f"the server wants another API key: {message}")
    if 400 <= status < 500:
        raise RequestError(message, error.get("param") if isinstance(error, dict) else None)
    raise FewbitError(f"the server failed ({status}): {message}")
