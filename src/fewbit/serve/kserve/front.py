"""The models of a server under the names of the v2 protocol. HTTP and gRPC are two coats over one `Front`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Literal

from fewbit.errors import RequestError
from fewbit.serve.body import shown
from fewbit.serve.kserve.calls import Call
from fewbit.serve.kserve.messages import VERSION, InferRequest
from fewbit.serve.kserve.signatures import ENSEMBLE, NEMO, TRITON, Signature
from fewbit.serve.kserve.statistics import ModelStatistics, Timer
from fewbit.serve.kserve.tensors import Tensor
from fewbit.serve.models import Models
from fewbit.serve.problems import UnknownModelError
from fewbit.serve.service import Service

Flavor = Literal["ensemble", "nemo", "both"]
FLAVORS: tuple[Flavor, ...] = ("ensemble", "nemo", "both")

Lease = Callable[[str | None], Awaitable[Service]]
"""Gives a model by the name under which it is served (None: the default one) until the answer is sent."""


@dataclass(frozen=True)
class Options:
    """How a server speaks the protocol.

    Attributes:
        flavor: Which clients are expected: "ensemble", those of Triton's TensorRT-LLM repository; "nemo", NeMo's query
            classes, by the model's own name; "both".
        repository_control: Whether clients may load and unload models.
    """

    flavor: Flavor = "ensemble"
    repository_control: bool = False


@dataclass(frozen=True)
class Named:
    """A name of the protocol.

    Attributes:
        name: As clients say it.
        signature: What it takes and gives.
        model: What the model is called on this server; None: the default one.
    """

    name: str
    signature: Signature
    model: str | None


class Front:
    """The models of a server, by the protocol's names.

    A model's own name is an ensemble, or what NeMo's query classes expect; `ensemble`, `tensorrt_llm_bls` and the
    three models they are made of mean the default model.

    Args:
        models: Of the server.
        options: How it speaks.
    """

    def __init__(self, models: Models, options: Options | None = None) -> None:
        self.models, self.options = models, options or Options()
        self._statistics: dict[str, ModelStatistics] = {}

    @property
    def _own(self) -> Signature:
        """What a model's own name is."""
        return ENSEMBLE if self.options.flavor == "ensemble" else NEMO

    def names(self) -> list[Named]:
        """Every name."""
        served = [Named(name, self._own, name) for name in self.models.names]
        taken = {one.name for one in served}
        others = {} if self.options.flavor == "nemo" else TRITON
        return [*served, *(Named(n, s, None) for n, s in others.items() if n not in taken)]

    def find(self, name: str, version: str = "") -> Named:
        """A name.

        Raises:
            UnknownModelError: There is no such model, or not in this version.
        """
        names = {one.name: one for one in self.names()}
        if name not in names:
            served = " and ".join(f"'{n}'" for n in self.models.names)
            raise UnknownModelError(f"the model '{shown(name)}' is not served here, {served} is", "model")
        if version not in ("", VERSION):
            raise UnknownModelError(f"the model '{shown(name)}' has version 1 only, not '{shown(version)}'", "model")
        return names[name]

    def signature(self, name: str) -> Signature:
        """What a request to this name is read by: bodies are checked before the model is looked for."""
        return next((one.signature for one in self.names() if one.name == name), self._own)

    def statistics(self, name: str) -> ModelStatistics:
        """The counters of a name that is known."""
        return self._statistics.setdefault(name, ModelStatistics(name, VERSION))

    async def infer(self, name: str, version: str, request: InferRequest, lease: Lease) -> list[Tensor]:
        """The one answer to a request.

        Raises:
            RequestError: It is wrong, or wants to be streamed.
            UnknownModelError: There is no such model.
            OverloadedError, EngineDownError, GenerationError: It cannot be answered.
        """
        with self._counted(name) as timer:
            call = Call(self.signature(name), request, timer)
            if call.stream:
                raise RequestError(
                    "'stream': True is not supported here, where one answer is given: use generate_stream or "
                    "ModelStreamInfer",
                    "stream",
                )
            return await call.whole(await lease(self.find(name, version).model))

    async def stream(
        self, name: str, version: str, request: InferRequest, lease: Lease
    ) -> AsyncGenerator[list[Tensor], None]:
        """The answers to a request, as they come. Leaving early aborts it.

        Raises: as `infer`.
        """
        with self._counted(name) as timer:
            call = Call(self.signature(name), request, timer)
            service = await lease(self.find(name, version).model)
            async with aclosing(call.parts(service)) as parts:
                async for part in parts:
                    yield part

    @contextmanager
    def _counted(self, name: str) -> Iterator[Timer]:
        """Counts a request; one that is refused or left early is a failure."""
        statistics = self.statistics(name) if any(one.name == name for one in self.names()) else None
        timer = Timer()
        try:
            yield timer
        except BaseException:
            if statistics is not None:
                statistics.failed(timer)
            raise
        if statistics is not None:
            statistics.succeeded(timer)
