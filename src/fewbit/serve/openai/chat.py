"""/v1/chat/completions: messages in, an assistant's message out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel

from fewbit.engine.check import MAX_LOGPROBS
from fewbit.engine.types import TokenLogprobs
from fewbit.errors import FewbitError, RequestError
from fewbit.serve.generation import Finish, Job, Piece, Result
from fewbit.serve.openai import shapes, structured
from fewbit.serve.openai.calls import Speech, message_of
from fewbit.serve.openai.dialects import PLAIN, THINK, THOUGHT, dialect_of, grammar
from fewbit.serve.openai.inputs import cut, params_of, with_grammar
from fewbit.serve.openai.messages import Conversation, encoded
from fewbit.serve.openai.requests import Sampled, within
from fewbit.serve.openai.shapes import ChatLogprobs, Delta, Reason
from fewbit.serve.openai.tools import forced_schema
from fewbit.serve.service import Service, renamed
from fewbit.text import Detokenizer


class ChatRequest(Conversation, Sampled):
    """POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int | None, within(minimum=0)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, within(minimum=0, maximum=MAX_LOGPROBS)] = None
    parallel_tool_calls: bool | None = None

    nested: ClassVar[Mapping[str, type[BaseModel]]] = {**Sampled.nested, **Conversation.nested}
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Sampled.neutral,
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "verbosity": (),
        "prediction": (),
        "audio": (),
        "web_search_options": (),
        "documents": ([],),
        "echo": (False,),
    }

    def check(self) -> None:
        """See `Sampled.check`."""
        Sampled.check(self)
        Conversation.check(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs: true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens say different things", "max_completion_tokens")
        if self.max_completion_tokens == 0 and not self.asks_about_prompt:
            raise RequestError("max_completion_tokens must be at least 1, got 0", "max_completion_tokens")
        if self.forced and structured.wanted(self.response_format, self.structured_outputs):
            raise RequestError("tool_choice forces a call, so response_format has nothing to say", "tool_choice")

    @property
    def limit_tokens(self) -> int | None:
        """Most tokens to generate, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def forced(self) -> dict[str, Any] | None:
        """The JSON schema of an answer that must be a call."""
        return forced_schema(self.tools or [], self.tool_choice, self.parallel_tool_calls is not False)


class Chat:
    """The coat of /v1/chat/completions (see `answer.Coat`)."""

    def __init__(self, service: Service, body: ChatRequest, name: str = "", trusted: bool = False) -> None:
        self.body, self.service = body, service
        self._trusted = trusted
        self._names = {"logprobs": "top_logprobs", "prompt": "messages"}
        if body.max_completion_tokens is not None:
            self._names["max_tokens"] = "max_completion_tokens"
        limit = service.max_model_len if body.limit_tokens is None else body.limit_tokens
        try:
            self.params = params_of(
                service, body, max_tokens=limit, logprobs=(body.top_logprobs or 0) if body.logprobs else None
            )
        except FewbitError as e:
            raise renamed(e, self._names) from e
        self._spelling = shapes.Spelling(service.tokenizer, bool(body.return_tokens_as_token_ids))
        self._whole = shapes.Envelope("chat.completion", service.name, f"chatcmpl-{name}")
        self._chunk = shapes.Envelope("chat.completion.chunk", service.name, f"chatcmpl-{name}")
        self._prompt: tuple[int, ...] = ()
        self._thinks: bool | str = False
        self._speeches: dict[int, Speech] = {}
        self._reasoning_tokens = 0

    async def jobs(self) -> list[Job]:
        """The one job."""
        body, service = self.body, self.service
        try:
            text, ids = await encoded(
                service, body, self._trusted, bool(body.add_special_tokens), body.truncate_prompt_tokens
            )
            continues = bool(body.continue_final_message)
            visible: frozenset[int] = frozenset()
            if body.offered or THOUGHT in self._template:
                visible = dialect_of(self._template).visible(service.tokenizer)
            # what can be refused without compiling a grammar is refused before
            job = service.job(
                ids, self.params, body.limit_tokens is not None, continues=continues, visible=visible, **cut(body)
            )
        except FewbitError as e:
            raise renamed(e, self._names) from e
        asked = structured.wanted(body.response_format, body.structured_outputs)
        if (forced := body.forced) is not None:
            asked = structured.of_schema(forced, "tools"), "tools"
        if asked is None and THOUGHT in self._template and not continues:
            self._thinks = "inside" if text.rstrip().endswith(THINK) else True
        if asked is None and any(tool.function.strict for tool in body.offered):
            write = partial(grammar, dialect_of(self._template), body.offered, service.tokenizer)
            asked = structured.of_lark(write), "tools"
        self._prompt = job.prompt
        return [dataclasses.replace(job, params=await with_grammar(service, asked, job.params))]

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """The answer in one piece."""
        choices, more = [], {}
        for i, result in enumerate(results):
            speech = self._speech()
            message = message_of([*speech.push(result.text), *speech.finish()])
            choice: shapes.ChatChoice = {
                "index": i,
                "message": message,
                "logprobs": self._logprobs(result.tokens),
                "finish_reason": _reason(result.finish, speech),
                "stop_reason": result.finish.stop_reason,
            }
            if self.body.return_token_ids:
                choice["token_ids"] = result.ids
            choices.append(choice)
            self._reasoning_tokens += self._thoughts(result)
        if self.body.prompt_logprobs is not None:
            found = shapes.prompt_logprobs(self._spelling, self._prompt, results[0].prompt_logprobs)
            more["prompt_logprobs"] = found
        return self._whole.wrap(choices, usage=self._usage([r.finish for r in results]), **more, **self._ids())

    def opening(self, choices: int) -> Iterator[dict[str, Any]]:
        """The roles."""
        for i in range(choices):
            self._speeches[i] = self._speech()
            yield self._chunk.wrap([_delta(i, {"role": "assistant", "content": ""})], **(self._ids() if i == 0 else {}))

    def chunks(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a piece of a choice adds."""
        speech, finish = self._speeches[index], piece.finish
        self._reasoning_tokens += speech.thinking and piece.token is not None
        deltas = speech.push(piece.text)
        if finish is not None:
            deltas += speech.finish()
        ids = [piece.token] if piece.token is not None else []
        logprobs = self._logprobs([(t, piece.logprobs) for t in ids if piece.logprobs is not None])
        if not deltas and (finish is not None or (ids and (self.body.logprobs or self.body.return_token_ids))):
            deltas = [{}]
        for i, delta in enumerate(deltas):
            choice = _delta(index, delta)
            if i == 0:
                choice["logprobs"] = logprobs
                if self.body.return_token_ids:
                    choice["token_ids"] = ids
            if finish is not None and i == len(deltas) - 1:
                choice["finish_reason"], choice["stop_reason"] = _reason(finish, speech), finish.stop_reason
            yield self._chunk.wrap([choice])

    def closing(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        """The chunk of token counts."""
        return self._chunk.wrap([], usage=self._usage(finishes))

    @property
    def _template(self) -> str:
        template = self.service.tokenizer.chat_template
        return self.body.chat_template or (template.source if template else "")

    def _speech(self) -> Speech:
        """What reads one answer."""
        body = self.body
        tools = frozenset(tool.function.name for tool in body.offered)
        if isinstance(body.tool_choice, dict):
            return Speech(dialect_of(self._template), tools, only=body.tool_choice["name"])
        dialect = None
        if tools and body.response_format in (None, structured.ResponseFormat(type="text")):  # else all is its JSON
            dialect = PLAIN if body.tool_choice == "required" else dialect_of(self._template)
        return Speech(dialect, tools, self._thinks, most=1 if body.parallel_tool_calls is False else None)

    def _thoughts(self, result: Result) -> int:
        """Tokens of an answer that are thoughts: all up to where these end."""
        if not self._thinks:
            return 0
        speech, stream, count = self._speech(), Detokenizer(self.service.tokenizer, skip_special_tokens=False), 0
        for token in result.ids:
            count += speech.thinking
            speech.push(stream.push(token))
        return count

    def _usage(self, finishes: Sequence[Finish]) -> shapes.Usage:
        return shapes.usage(finishes, 1, self._reasoning_tokens)

    def _ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self._prompt)} if self.body.return_token_ids else {}

    def _logprobs(self, tokens: Sequence[tuple[int, TokenLogprobs]]) -> ChatLogprobs | None:
        return shapes.chat_logprobs(self._spelling, tokens) if self.body.logprobs else None


def _delta(index: int, delta: Delta) -> shapes.ChatDelta:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}


def _reason(finish: Finish, speech: Speech) -> Reason:
    return "tool_calls" if speech.calls and finish.reason == "stop" else finish.reason
