"""The v2 protocol over gRPC: `inference.GRPCInferenceService` and gRPC's own health service, on one port.

It runs on the event loop of the HTTP server, over the same `Front`. gRPC is loaded when it is first served.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import TYPE_CHECKING, Any

from fewbit.errors import FewbitError, RecipeError, RequestError
from fewbit.serve import logs
from fewbit.serve.body import LIMIT_BYTES, shown
from fewbit.serve.connection import SLOW_S
from fewbit.serve.exchange import exchange
from fewbit.serve.kserve import describe, protobuf, protocol, repository
from fewbit.serve.kserve.arrival import ARRIVE_S, OPEN, Keys, Waiting, asked_of, door, message
from fewbit.serve.kserve.front import Front
from fewbit.serve.kserve.messages import InferRequest
from fewbit.serve.problems import Problem, UnimplementedError, problem_of
from fewbit.serve.run import bind
from fewbit.serve.service import Service

if TYPE_CHECKING:
    import grpc.aio

MAX_STREAM_REQUESTS = 256  # of one stream, at a time; more wait to be read
MAX_CALLS = 4096
MAX_CALLS_A_CONNECTION = 1024
_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "UNAVAILABLE",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
Handler = Callable[[Any], Awaitable[Any]]


class _FailedError(Exception):
    """A request that failed, and what its client is told."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class _GoneError(Exception):
    """A client that takes nothing any more."""


class GrpcServer:
    """A running server.

    Attributes:
        port: It listens on.
    """

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self._server, self.port = server, port

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no new calls; end those that still run after `grace_s`."""
        await self._server.stop(grace_s)


async def serve_grpc(
    front: Front, host: str, port: int, keys: Keys | None = None, timeout_s: float | None = None
) -> GrpcServer:
    """Serve on the running event loop.

    Args:
        front: The models; `create_app` has it as `app.state.front`.
        host: Address to listen on.
        port: Port to listen on; 0: any free one.
        keys: Without one of these only health is told; None: everybody may ask.
        timeout_s: How long a request may take; None: as long as it does.

    Raises:
        RecipeError: The address is taken or not this machine's.
    """
    import grpc.aio

    bind(host, port, "--grpc-port").close()  # of a port that is taken gRPC also writes a line of its own
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", LIMIT_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", MAX_CALLS_A_CONNECTION),
            ("grpc.so_reuseport", 0),  # a port that is taken is an error, not shared
        ],
        maximum_concurrent_rpcs=MAX_CALLS,
        interceptors=[] if keys is None else [door(keys)],
    )
    server.add_generic_rpc_handlers(_Grpc(front, timeout_s).handlers())
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError as e:
        raise RecipeError(f"cannot listen for gRPC on {host} port {port} ({e}); choose another port") from e
    await server.start()
    return GrpcServer(server, bound)


class _Grpc:
    """The handlers."""

    def __init__(self, front: Front, timeout_s: float | None) -> None:
        self._front, self._timeout_s = front, timeout_s
        self._waiting = Waiting()
        self._types = protocol.messages()
        self._health = protocol.messages(protocol.HEALTH)

    def handlers(self) -> list[Any]:
        """Both services, for a server."""
        import grpc

        unary: dict[str, Handler] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server,
            "ModelMetadata": self._metadata,
            "ModelConfig": self._config,
            "ModelInfer": self._infer,
            "ModelStatistics": self._statistics,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "TraceSetting": self._trace,
            "LogSettings": self._logging,
        }
        # Messages come as bytes, to be parsed here: within the limits of bodies, and with errors of the protocol.
        table = {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(name, unary.get(name, self._shared_memory), self._types[f"{name}Request"]),
                None,
                self._types[f"{name}Response"].SerializeToString,
            )
            for name in protocol.METHODS
        }
        table["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._stream, None, self._types["ModelStreamInferResponse"].SerializeToString
        )
        for name in OPEN[:2]:
            table[name] = self._open_call(name, unary[name], self._types, name, reads=False)
        health = self._open_call("Check", self._check, self._health, "HealthCheck", reads=True)
        return [
            grpc.method_handlers_generic_handler(protocol.INFERENCE, table),
            grpc.method_handlers_generic_handler(protocol.HEALTH, {"Check": health}),
        ]

    def _guarded(self, name: str, handler: Handler, kind: Any) -> Callable[[bytes, Any], Awaitable[Any]]:
        """A handler of calls with one answer, which answers failures with a status."""

        async def guarded(raw: bytes, context: Any) -> Any:
            try:
                with self._answering(name, context):
                    return await handler(await message(kind, raw))
            except _FailedError as e:
                await context.abort(_code(e.problem), e.problem.message)

        return guarded

    def _open_call(self, name: str, handler: Handler, types: Any, called: str, *, reads: bool) -> Any:
        """A method that needs no key. Its calls take room before their message is there, so that has limits.

        Where the message has no fields it is not read.
        """
        import grpc

        guarded = self._guarded(name, handler, types[f"{called}Request"])

        async def call(requests: AsyncIterator[bytes], context: Any) -> Any:
            raw = await self._waiting.first(requests) if reads else b""
            if raw is None:
                text = f"the message of the call did not come within {ARRIVE_S:g} s, or while there was room to wait"
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, text)
            return await guarded(raw or b"", context)

        # To a client this is the same as a call of one message, which gRPC would wait for by itself, for ever.
        answer = types[f"{called}Response"].SerializeToString
        return grpc.stream_unary_rpc_method_handler(call, None, answer)

    @contextmanager
    def _answering(self, name: str, context: Any) -> Iterator[None]:
        """What is done for every request: it counts as work, has an id and a time limit, and is logged.

        Raises:
            _FailedError: Whatever went wrong within, as what the client is told.
        """
        models, status = self._front.models, 499  # the client has left
        metadata = dict(context.invocation_metadata() or ())
        with exchange(metadata.get("x-request-id")) as asked, models.answering():
            if self._timeout_s is not None:
                asked.limit(self._timeout_s)
            try:
                yield
                status = 200
            except _GoneError:
                raise
            except Exception as e:
                problem = problem_of(e)
                status = problem.status
                models.metrics.rejected(problem.kind)
                raise _FailedError(problem) from e
            finally:
                logs.answered(asked, "gRPC", name, status)

    def _answer(self, name: str, content: dict[str, Any]) -> Any:
        from google.protobuf import json_format

        return json_format.ParseDict(content, self._types[name]())

    # ---- what the server is ----

    async def _live(self, request: Any) -> Any:
        return self._types["ServerLiveResponse"](live=True)

    async def _ready(self, request: Any) -> Any:
        return self._types["ServerReadyResponse"](ready=await _is(self._front.models.check_ready()))

    async def _check(self, request: Any) -> Any:
        if request.service not in ("", protocol.INFERENCE):
            return self._health["HealthCheckResponse"](status="SERVICE_UNKNOWN")
        ready = await _is(self._front.models.check_ready())
        return self._health["HealthCheckResponse"](status="SERVING" if ready else "NOT_SERVING")

    async def _server(self, request: Any) -> Any:
        return self._answer("ServerMetadataResponse", describe.server())

    async def _trace(self, request: Any) -> Any:
        if request.settings:
            raise UnimplementedError(describe.FIXED)
        settings = {k: {"value": v if isinstance(v, list) else [v]} for k, v in describe.TRACE_SETTINGS.items()}
        return self._answer("TraceSettingResponse", {"settings": settings})

    async def _logging(self, request: Any) -> Any:
        if request.settings:
            raise UnimplementedError(describe.FIXED)
        kinds = {bool: "bool_param", int: "uint32_param", str: "string_param"}
        settings = {k: {kinds[type(v)]: v} for k, v in describe.LOG_SETTINGS.items()}
        return self._answer("LogSettingsResponse", {"settings": settings})

    async def _shared_memory(self, request: Any) -> Any:
        raise UnimplementedError(describe.NO_SHARED_MEMORY)

    # ---- what its models are ----

    async def _model_ready(self, request: Any) -> Any:
        self._front.find(request.name, request.version)
        ready = await _is(repository.check_ready(self._front, request.name, request.version))
        return self._types["ModelReadyResponse"](ready=ready)

    async def _metadata(self, request: Any) -> Any:
        found = describe.metadata(self._front.find(request.name, request.version))
        return self._answer("ModelMetadataResponse", found)

    async def _config(self, request: Any) -> Any:
        found = describe.config(self._front, self._front.find(request.name, request.version))
        return self._answer("ModelConfigResponse", {"config": found})

    async def _statistics(self, request: Any) -> Any:
        found = repository.statistics(self._front, request.name, request.version)
        return self._answer("ModelStatisticsResponse", found)

    async def _index(self, request: Any) -> Any:
        _no_repository(request)
        return self._answer("RepositoryIndexResponse", {"models": repository.index(self._front, request.ready)})

    async def _load(self, request: Any) -> Any:
        _no_repository(request)
        await repository.load(self._front, request.model_name, protobuf.parameters(request.parameters))
        return self._types["RepositoryModelLoadResponse"]()

    async def _unload(self, request: Any) -> Any:
        _no_repository(request)
        await repository.unload(self._front, request.model_name, protobuf.parameters(request.parameters))
        return self._types["RepositoryModelUnloadResponse"]()

    # ---- inference ----

    async def _infer(self, request: Any) -> Any:
        asked, name, version = await asked_of(request), request.model_name, request.model_version
        del request  # of any size, and no longer needed while the model works
        async with AsyncExitStack() as leases:
            found = await self._front.infer(name, version, asked, self._lease(leases))
        return protobuf.answer(name, asked.id, found)

    async def _stream(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Each request of a stream is answered as it goes; their parts may come between one another."""
        import grpc

        room, writing = asyncio.Semaphore(MAX_STREAM_REQUESTS), asyncio.Lock()

        async def write(message: Any) -> None:
            try:
                async with writing, asyncio.timeout(SLOW_S):
                    await context.write(message)
            except TimeoutError as e:
                raise _GoneError from e

        async def work(raw: bytes) -> None:
            name = request_id = ""
            try:
                with self._answering("ModelStreamInfer", context):
                    request = await message(self._types["ModelInferRequest"], raw)
                    name, request_id, version = request.model_name, request.id, request.model_version
                    asked = await asked_of(request)
                    del raw, request  # of any size, and no longer needed while the model works
                    await self._parts(name, version, asked, write)
            except _FailedError as e:  # the others of this stream go on
                failed = self._types["ModelInferResponse"](model_name=name, id=request_id)
                await write(
                    self._types["ModelStreamInferResponse"](error_message=e.problem.message, infer_response=failed)
                )
            finally:
                room.release()

        slow = False
        try:
            async with asyncio.TaskGroup() as tasks:
                async for raw in requests:
                    await room.acquire()
                    tasks.create_task(work(raw))
                    del raw
        except* _GoneError:
            slow = True
        if slow:
            await context.abort(grpc.StatusCode.CANCELLED, f"nothing of the stream was taken for {SLOW_S:g} s")

    async def _parts(self, name: str, version: str, asked: InferRequest, write: Handler) -> None:
        """The answers to one request of a stream."""
        reply = self._types["ModelStreamInferResponse"]
        says_final = asked.parameters.get("triton_enable_empty_final_response", False)
        async with AsyncExitStack() as leases:
            parts = self._front.stream(name, version, asked, self._lease(leases))
            async with aclosing(parts):
                async for part in parts:
                    found = protobuf.answer(name, asked.id, part)
                    if says_final:
                        found.parameters["triton_final_response"].bool_param = False
                    await write(reply(infer_response=found))
        if says_final:
            found = protobuf.answer(name, asked.id, ())
            found.parameters["triton_final_response"].bool_param = True
            await write(reply(infer_response=found))

    def _lease(self, leases: AsyncExitStack) -> Any:
        async def lease(model: str | None) -> Service:
            return await leases.enter_async_context(self._front.models.lease(model))

        return lease


async def _is(check: Awaitable[None]) -> bool:
    """Whether a check finds nothing wrong."""
    try:
        await check
    except FewbitError:
        return False
    return True


def _code(problem: Problem) -> Any:
    import grpc

    return grpc.StatusCode[_STATUS.get(problem.status, "INTERNAL")]


def _no_repository(request: Any) -> None:
    if request.repository_name:
        name = shown(request.repository_name)
        raise RequestError(f"there is one model repository, without a name; got repository_name '{name}'")
