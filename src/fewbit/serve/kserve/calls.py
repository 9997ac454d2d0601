"""One inference: its inputs are read before a model is asked for, and it is answered whole or piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from fewbit.errors import RequestError, nearest_name
from fewbit.serve.body import aside, shown
from fewbit.serve.exchange import current
from fewbit.serve.generation import pieces
from fewbit.serve.kserve import tokens
from fewbit.serve.kserve.answers import Text, outputs
from fewbit.serve.kserve.asks import Ask, asks, jobs, read
from fewbit.serve.kserve.messages import InferRequest
from fewbit.serve.kserve.signatures import Signature
from fewbit.serve.kserve.statistics import Timer
from fewbit.serve.kserve.tensors import Tensor, check_elements
from fewbit.serve.service import Service


class Call:
    """A request to a model of a signature.

    Args:
        signature: Of the model.
        request: What is asked.
        timer: Told how far it is.

    Raises:
        RequestError: An input or output is not one of the signature's, or asks for what is not done here.
    """

    def __init__(self, signature: Signature, request: InferRequest, timer: Timer) -> None:
        self._signature, self._request, self._timer = signature, request, timer
        known = {o.name: o for o in signature.outputs}
        for name in request.outputs or ():
            if name not in known:
                raise RequestError(f"unknown output '{shown(name)}': {nearest_name(name[:100], known)}", shown(name))
        self._rows = read(signature, request)
        timer.rows = len(self._rows)
        self._asks: list[Ask] = []
        if signature.does in ("texts", "ids"):
            listed = () if signature.only_if_asked else request.outputs or ()
            self._asks = asks(self._rows, [known[name].when for name in listed])

    @property
    def stream(self) -> bool | None:
        """Whether the client wants the answer piece by piece; None: it does not say."""
        said = {ask.stream for ask in self._asks}
        if len(said) > 1:
            raise RequestError("the rows of one request are either all streamed or none is", "stream")
        return said.pop() if said else None

    async def whole(self, service: Service) -> list[Tensor]:
        """The whole answer.

        Raises:
            RequestError: The engine refuses it.
            OverloadedError: Too many requests wait.
            RequestTimeoutError: The request's time is up.
        """
        if not self._asks:
            self._timer.phase("queue")
            if self._signature.does == "decode":
                found = await asyncio.to_thread(tokens.decoded, self._rows, service)
            else:
                found = await tokens.encoded(self._signature, self._rows, self._request.outputs, service)
            self._timer.phase("compute_output")
            return found
        everything: list[Text] = []
        begun = await self._prepared(service, self._signature.repeats_prompt)
        if self._signature.does == "ids" or any(text.job.params.logprobs is not None for text in begun):
            check_elements(len(begun), max(map(Text.most_tokens, begun)))
        async with aclosing(self._texts(service, begun)) as growing:
            async for text, _ in growing:
                if text.finish is not None:
                    everything.append(text)
        everything.sort(key=lambda text: (text.batch, text.sequence))
        size = sum(text.job.size_bytes(text.count + len(text.prompt_logprobs)) for text in everything)
        made = await aside(size, outputs, self._signature, self._request.outputs, everything, self._several, service)
        self._timer.phase("compute_output")
        return made

    async def parts(self, service: Service) -> AsyncGenerator[list[Tensor], None]:
        """The answer piece by piece: what is new, or with `accumulate_tokens` all that there is so far.

        Raises: as `whole`; on the way too.
        """
        if self.stream is False or not self._signature.streams:
            yield await self.whole(service)
            return
        accumulate = self._request.parameters.get("accumulate_tokens", False)
        begun: set[tuple[int, int]] = set()
        async with aclosing(self._texts(service, await self._prepared(service, False))) as growing:
            async for text, new in growing:
                if not (new.text or new.logprobs or new.finish or (self._signature.does == "ids" and new.tokens)):
                    continue  # held back: half a character, or what may become a stop string
                which = (text.batch, text.sequence)
                part = text if accumulate else new if which in begun else replace(new, prompt=text.prompt)
                begun.add(which)
                size = part.job.size_bytes(len(part.prompt_logprobs))
                made = await aside(size, outputs, self._signature, self._listed(), [part], self._several, service)
                self._timer.phase("compute_output")
                yield made

    @property
    def _several(self) -> bool:
        """Whether there is more than one text."""
        return len(self._asks) > 1 or (self._asks[0].choices or 1) > 1

    def _listed(self) -> Sequence[str] | None:
        """The outputs that a part was asked for; of several texts each says which one it is of."""
        wanted = self._request.outputs
        if wanted is None or not self._several:
            return wanted
        which = [o.name for o in self._signature.outputs if o.when == "choices" and o.name not in wanted]
        return [*wanted, *which]

    async def _prepared(self, service: Service, repeats_prompt: bool) -> list[Text]:
        """The texts that are asked for, none of them begun."""
        self._timer.phase("queue")
        found = []
        for batch, ask in enumerate(self._asks):
            await asyncio.sleep(0)  # others may go on between many rows
            made = await jobs(service, ask, self._signature, self._request.priority)
            repeats = repeats_prompt if ask.has_prompt is None else ask.has_prompt
            for sequence, job in enumerate(made):
                whole = ask.prompt if self._signature.does == "texts" else job.prompt
                found.append(Text(batch, sequence, ask, job, whole if repeats else ""))
        self._timer.phase("compute_input")
        return found

    async def _texts(self, service: Service, found: Sequence[Text]) -> AsyncGenerator[tuple[Text, Text], None]:
        """Each text as it grows, beside what is new of it. Leaving early aborts all of them."""
        if (seconds := self._request.timeout_s) is not None:
            current().limit(seconds)
        async with aclosing(pieces(await service.start([text.job for text in found]))) as all_pieces:
            async for index, piece in all_pieces:
                new = found[index].take(piece)
                self._timer.phase("compute_infer")
                yield found[index], new
