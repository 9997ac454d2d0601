"""`fewbit run`: one answer, or a conversation, on an engine in this process."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.common import (
    BackendOption,
    DeviceOption,
    ExactOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    SeedOption,
    VerboseOption,
    backend_of,
    device_of,
    note,
    print_json,
    settings,
)
from fewbit.errors import RequestError

if TYPE_CHECKING:
    from fewbit.engine.engine import Engine
    from fewbit.engine.types import Ending
    from fewbit.text.tokenizer import Tokenizer

LengthOption = Annotated[int | None, typer.Option("--max-model-len", min=2, help="Longest sequence, prompt included.")]


def run(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to answer; none: a chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", help="Choose among the likeliest tokens of this mass.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    max_model_len: LengthOption = None,
    backend: BackendOption = "auto",
    exact: ExactOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer a prompt, or chat. The text goes to stdout as it is made."""
    from fewbit.checkpoint import locate, text_folder
    from fewbit.engine.config import EngineOptions
    from fewbit.engine.engine import open_engine
    from fewbit.engine.types import SamplingParams
    from fewbit.text.tokenizer import Tokenizer

    if json and prompt is None:
        raise RequestError("--json needs --prompt: a chat has no single result")
    if any(not text for text in stop or []):
        raise RequestError("--stop needs a text that is not empty")
    path = locate(model)
    options = EngineOptions(
        str(device_of(device)), backend_of(backend, exact), max_batch=1, max_model_len=max_model_len
    )
    engine = open_engine(path, options, progress=note if settings.verbose else None)
    tokenizer = Tokenizer.load(text_folder(path))
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=settings.seed)
    talk = _Talk(engine, tokenizer, params, tuple(stop or ()), raw or tokenizer.chat_template is None)
    if prompt is None:
        return talk.chat()
    text = talk.say(prompt, show=not json)
    if json:
        print_json("run", {"text": text, **talk.figures()})
    else:
        print()
        note(talk.summary())
    return None


class _Talk:
    """One conversation with an engine in this process."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, params: Any, stop: tuple[str, ...], raw: bool) -> None:
        self.engine, self.tokenizer, self.params, self.stop, self.raw = engine, tokenizer, params, stop, raw
        self.history: list[dict[str, str]] = []
        self.turns = 0
        self.ending: Ending | None = None
        self.first_s = self.total_s = 0.0

    def chat(self) -> None:
        """Answer lines from stdin until there are no more."""
        interactive = sys.stdin.isatty()
        if interactive:
            note("One line is one message; Ctrl-D ends the chat." if not self.raw else "Each line is continued.")
        while True:
            if interactive:
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            if line.strip():
                self.say(line.rstrip("\n"), show=True)
                print()

    def say(self, text: str, show: bool) -> str:
        """The answer to one message, printed as it comes if `show`."""
        if self.raw:
            ids = self.tokenizer.encode(text)
        else:
            self.history.append({"role": "user", "content": text})
            assert self.tokenizer.chat_template is not None
            rendered = self.tokenizer.chat_template.render(self.history, add_generation_prompt=True)
            ids = self.tokenizer.encode(rendered, add_special_tokens=False)
        answer = ""
        for piece in self._pieces(tuple(ids)):
            answer += piece
            if show:
                print(piece, end="", flush=True)
        self.history.append({"role": "assistant", "content": answer})
        return answer

    def _pieces(self, prompt: tuple[int, ...]) -> Iterator[str]:
        from fewbit.engine.types import GenerateRequest
        from fewbit.text.stream import TextStream

        stream = TextStream(self.tokenizer, self.stop, after=prompt if self.raw else ())
        self.turns += 1
        start = time.perf_counter()
        request = GenerateRequest(id=f"turn-{self.turns}", prompt=prompt, params=self.params)
        self.engine.submit(request)
        self.ending, self.first_s = None, 0.0
        try:
            while self.ending is None:
                for event in self.engine.step():
                    self.first_s = self.first_s or time.perf_counter() - start
                    if event.token is not None and stream.stopped is None:
                        yield stream.push(event.token)
                    self.ending = event.ending or self.ending
                if stream.stopped is not None and self.ending is None:
                    (last,) = self.engine.abort(request.id)
                    self.ending = last.ending
        finally:
            self.engine.abort(request.id)
        self.total_s = time.perf_counter() - start
        yield stream.finish()
        if self.ending is not None and self.ending.reason == "error":
            raise RequestError(self.ending.detail)

    def figures(self) -> dict[str, Any]:
        """Counts and times of the last answer."""
        assert self.ending is not None
        reason = "stop" if self.ending.reason == "abort" else self.ending.reason
        return {
            "finish_reason": reason,
            "prompt_tokens": self.ending.prompt_tokens,
            "output_tokens": self.ending.output_tokens,
            "first_token_s": self.first_s,
            "total_s": self.total_s,
        }

    def summary(self) -> str:
        """The same in words."""
        f = self.figures()
        rate = (f["output_tokens"] - 1) / max(f["total_s"] - f["first_token_s"], 1e-9)
        return (
            f"{f['prompt_tokens']} prompt tokens, {f['output_tokens']} generated ({f['finish_reason']}); "
            f"first after {f['first_token_s'] * 1e3:.0f} ms, then {rate:.1f} tokens/s"
        )
