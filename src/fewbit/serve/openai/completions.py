"""/v1/completions: prompts in, texts that go on with them out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from fewbit.engine.types import TokenLogprobs
from fewbit.serve.generation import Finish, Job, Piece, Result
from fewbit.serve.openai import shapes
from fewbit.serve.openai.inputs import cut, fitted, params_of
from fewbit.serve.openai.requests import CompletionRequest
from fewbit.serve.openai.shapes import TextChoice, TextLogprobs, TextScribe
from fewbit.serve.service import Service
from fewbit.text import Detokenizer


class Completion:
    """The coat of /v1/completions (see `answer.Coat`)."""

    def __init__(self, service: Service, body: CompletionRequest, name: str = "") -> None:
        self.body, self.service = body, service
        about_prompt = body.prompt_logprobs
        if body.echo and body.logprobs is not None:
            about_prompt = max(about_prompt or 0, body.logprobs)
        self.params = params_of(service, body, logprobs=body.logprobs, prompt_logprobs=about_prompt)
        self._envelope = shapes.Envelope("text_completion", service.name, f"cmpl-{name}")
        self._spelling = shapes.Spelling(service.tokenizer, bool(body.return_tokens_as_token_ids))
        self._special = body.skip_special_tokens is not False
        self._prompts: list[tuple[int, ...]] = []
        self._echoes: list[str] = []
        self._scribes: dict[int, TextScribe] = {}
        self._waiting: dict[int, list[TokenLogprobs]] = {}  # of choices of a stream whose echo is not out yet

    async def jobs(self) -> list[Job]:
        """One job a prompt."""
        body, service, jobs = self.body, self.service, []
        params = await fitted(service, body, self.params)
        for prompt in body.prompts:
            await asyncio.sleep(0)  # others may go on between many prompts
            if isinstance(prompt, str):
                ids = await service.encode(prompt, body.add_special_tokens is not False, body.truncate_prompt_tokens)
            else:
                ids = prompt[-(body.truncate_prompt_tokens or 0) :]
            jobs.append(service.job(ids, params, body.max_tokens is not None, continues=True, **cut(body)))
            self._prompts.append(tuple(ids))
            if body.echo and isinstance(prompt, str) and body.truncate_prompt_tokens is None:
                self._echoes.append(prompt)
            elif body.echo:
                self._echoes.append(await asyncio.to_thread(service.tokenizer.decode, ids, self._special))
        return jobs

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for i, result in enumerate(results):
            text, logprobs = self._echo(i) + result.text, None
            if self.body.logprobs is not None:
                logprobs = self._logprobs(i, result.tokens, result.prompt_logprobs if self.body.echo else None)
            choice = _choice(i, text, logprobs, result.finish)
            if self.body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = shapes.prompt_logprobs(
                    self._spelling,
                    self._prompt(i),
                    [_first(p, self.body.prompt_logprobs) for p in result.prompt_logprobs],
                )
            if self.body.return_token_ids:
                choice["prompt_token_ids"], choice["token_ids"] = list(self._prompt(i)), result.ids
            choices.append(choice)
        return self._envelope.wrap(choices, usage=shapes.usage((r.finish for r in results), len(self._prompts)))

    def opening(self, choices: int) -> Iterator[dict[str, Any]]:
        """The prompts, where they are repeated and nothing is to be said about them."""
        for i in range(choices):
            if self.body.echo and self.body.logprobs is not None and len(self._prompt(i)) > 1:
                self._waiting[i] = []
            elif self.body.echo:
                yield self._chunk(self._echoed(i, []))
            elif self.body.return_token_ids:
                yield self._chunk(self._with_ids(_choice(i, "", None, None), []))

    def chunks(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a piece of a choice adds."""
        if (known := self._waiting.get(index)) is not None:
            known += piece.prompt_logprobs
            if len(known) == len(self._prompt(index)) - 1:
                del self._waiting[index]
                yield self._chunk(self._echoed(index, known))
        token = [] if piece.token is None else [piece.token]
        if piece.text or piece.finish or (token and (piece.logprobs is not None or self.body.return_token_ids)):
            logprobs = None
            if self.body.logprobs is not None:
                logprobs = self._logprobs(index, [(t, piece.logprobs) for t in token if piece.logprobs is not None])
            choice = _choice(index, piece.text, logprobs, piece.finish)
            if self.body.return_token_ids:
                choice["token_ids"] = token
            yield self._chunk(choice)

    def closing(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        """The chunk of token counts."""
        return self._envelope.wrap([], usage=shapes.usage(finishes, len(self._prompts)))

    def _chunk(self, choice: TextChoice) -> dict[str, Any]:
        return self._envelope.wrap([choice])

    def _echoed(self, index: int, known: Sequence[TokenLogprobs]) -> TextChoice:
        """The choice that repeats the prompt."""
        logprobs = None if self.body.logprobs is None else self._logprobs(index, [], known)
        return self._with_ids(_choice(index, self._echo(index), logprobs, None), [])

    def _with_ids(self, choice: TextChoice, ids: list[int]) -> TextChoice:
        if self.body.return_token_ids:
            choice["prompt_token_ids"], choice["token_ids"] = list(self._prompt(choice["index"])), ids
        return choice

    def _prompt(self, index: int) -> tuple[int, ...]:
        return self._prompts[index // self.body.choices]

    def _is_text(self, index: int) -> bool:
        """Whether the prompt is repeated as it was given, and not as its tokens read."""
        prompt = self.body.prompts[index // self.body.choices]
        return isinstance(prompt, str) and self.body.truncate_prompt_tokens is None

    def _echo(self, index: int) -> str:
        return self._echoes[index // self.body.choices] if self.body.echo else ""

    def _logprobs(
        self,
        index: int,
        tokens: Sequence[tuple[int, TokenLogprobs]],
        about_prompt: Sequence[TokenLogprobs] | None = None,
    ) -> TextLogprobs:
        """The arrays for generated tokens; with `about_prompt` for the whole prompt before them."""
        tokenizer, prompt, echo = self.service.tokenizer, self._prompt(index), self._echo(index)
        if index not in self._scribes:
            after = Detokenizer(tokenizer, self._special, prompt)
            self._scribes[index] = TextScribe(self._spelling, after, len(echo))
        found = self._scribes[index].of(tokens)
        if about_prompt is None:
            return found
        # What was added to a text stands before it: the text of all tokens is the longer one by that much.
        scribe = TextScribe(self._spelling, Detokenizer(tokenizer, self._special and not self._is_text(index)))
        first = scribe.of([(prompt[0], None)])
        assert self.body.logprobs is not None
        rest = scribe.of(zip(prompt[1:], (_first(p, self.body.logprobs) for p in about_prompt), strict=True))
        added = max(0, scribe.offset - len(echo))
        offsets = [min(max(0, at - added), len(echo)) for at in first["text_offset"] + rest["text_offset"]]
        return {
            "tokens": first["tokens"] + rest["tokens"] + found["tokens"],
            "token_logprobs": first["token_logprobs"] + rest["token_logprobs"] + found["token_logprobs"],
            "top_logprobs": first["top_logprobs"] + rest["top_logprobs"] + found["top_logprobs"],
            "text_offset": offsets + found["text_offset"],
        }


def _first(logprobs: TokenLogprobs, count: int) -> TokenLogprobs:
    """The same with so many alternatives."""
    return logprobs if len(logprobs.top) <= count else TokenLogprobs(logprobs.chosen, logprobs.top[:count])


def _choice(index: int, text: str, logprobs: TextLogprobs | None, finish: Finish | None) -> TextChoice:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": None if finish is None else finish.reason,
        "stop_reason": None if finish is None else finish.stop_reason,
    }
