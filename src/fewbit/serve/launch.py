"""From model directories to a server that answers: engine processes, clients of them, the applications."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from fewbit.engine.config import EngineOptions
from fewbit.errors import RecipeError
from fewbit.serve import control, kserve
from fewbit.serve.app import Manner, create_app
from fewbit.serve.auth import KEY_VARIABLE, Gate, Keys, is_loopback, read_keys
from fewbit.serve.metrics import Metrics
from fewbit.serve.modeldir import ModelDirs, ModelFolder
from fewbit.serve.models import Models
from fewbit.serve.run import bind, serve_app
from fewbit.serve.tracing import NoTraces, open_traces

log = logging.getLogger(__name__)

GRPC_PORT = 8001
Tell = Callable[[str], None]


@dataclass(frozen=True)
class ServeOptions:
    """How a server listens, which models it has, and how it treats requests.

    Attributes:
        model: A model directory; None: there is a `model_dir`.
        model_dir: A folder that holds a folder for each model.
        name: What requests call the one model; None: the directory's name.
        host: Address to listen on.
        port: Port to listen on; 0: any free one.
        drain_s: How long requests that run may go on after the first signal.
        preload: Models of the folder that are loaded at once, and without which the server is not ready.
        max_loaded: Models of the folder that may be loaded at a time; None: as memory allows.
        memory_bytes: That all models may take; None: most of what is free.
        on_demand: Whether a request loads its model.
        grpc_port: Of gRPC; 0: there is none; None: 8001 if it is free, and none where `port` is 0.
        triton_flavor: Which of Triton's clients are expected; see `kserve.Options`.
        repository_control: Whether clients may load and unload models.
        control: A port of 127.0.0.1, or the path of a unix socket, for the control routes; None: there are none.
        api_key_file: Where the API keys stand; None: in the environment, if anywhere.
        allowed_hosts: More names that the server may be called by.
        trust_request_chat_template: Whether requests may bring a chat template, or variables for the model's own.
        request_timeout_s: How long a request may take; None: any time.
        metrics_compat: Whose names the metrics have besides; see `fewbit.serve.aliases`.
        otlp_endpoint: Where traces go; None: nowhere.
    """

    model: Path | None = None
    model_dir: Path | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    drain_s: float = 30.0
    preload: tuple[str, ...] = ()
    max_loaded: int | None = None
    memory_bytes: int | None = None
    on_demand: bool = True
    grpc_port: int | None = 0
    triton_flavor: kserve.Flavor = "ensemble"
    repository_control: bool = False
    control: str | None = None
    api_key_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    request_timeout_s: float | None = None
    trust_request_chat_template: bool = False
    metrics_compat: tuple[str, ...] = ()
    otlp_endpoint: str | None = None


def serve_models(options: ServeOptions, engine: EngineOptions, *, progress: Tell = lambda text: None) -> None:
    """Serve until a signal comes.

    Args:
        options: Of the server.
        engine: Of every model's engine.
        progress: Told in words what is going on.

    Raises:
        FewbitError: A model that is needed cannot be opened or kept alive, an address is taken, or an option makes no
            sense; nothing is left running.
        KeyboardInterrupt: It was stopped with Ctrl-C.
    """
    _check(options)
    models, preload = _models(options, engine, progress)
    keys = read_keys(options.api_key_file)
    listeners = [bind(options.host, options.port)]  # before weights are read: a taken port should not cost a minute
    try:
        if options.control is not None:
            listeners.append(control.bind_control(options.control))
        asyncio.run(_serve(models, preload, listeners, options, keys, progress))
    finally:
        for listener in listeners:
            listener.close()
        if options.control is not None and not options.control.isdecimal():
            Path(options.control).unlink(missing_ok=True)


def _check(options: ServeOptions) -> None:
    """Raise a RecipeError for what contradicts itself."""
    if (options.model is None) == (options.model_dir is None):
        raise RecipeError("give one model directory, or a folder of them with --model-dir")
    if options.model is not None:
        wanted = {"--preload": options.preload, "--max-loaded": options.max_loaded}
        wanted |= {"--memory-budget": options.memory_bytes, "--model-control explicit": not options.on_demand}
        if many := [flag for flag, value in wanted.items() if value]:
            verb = "needs" if len(many) == 1 else "need"
            raise RecipeError(f"{' and '.join(many)} {verb} --model-dir: one model directory is served here")
    elif options.name is not None:
        raise RecipeError("--name is for one model directory; under --model-dir models are called as their folders are")


def _models(options: ServeOptions, engine: EngineOptions, progress: Tell) -> tuple[Models, Sequence[str]]:
    """The models, and which of them are loaded at once."""
    one, preload = options.model, options.preload
    if one is not None:
        name = options.name or one.resolve().name
        found, preload = {name: one}, (name,)
    source = ModelDirs(
        ModelFolder(options.model_dir, preload) if options.model_dir is not None else lambda: found,
        engine,
        shared=one is None,
        budget=options.memory_bytes,
        drain_s=options.drain_s,
        tell=progress,
    )
    models = Models(
        (),
        Metrics(options.metrics_compat),
        source,
        max_loaded=options.max_loaded,
        on_demand=options.on_demand,
        drain_s=options.drain_s,
    )
    models.trust_request_chat_template = options.trust_request_chat_template
    return models, preload


def _manner(options: ServeOptions, keys: Keys | None) -> Manner:
    here = is_loopback(options.host)
    if keys is None and not here:
        log.warning(
            "EVERYBODY WHO REACHES %s PORT %s MAY USE THIS SERVER: it has no API key; give --api-key-file or set %s",
            options.host, options.port, KEY_VARIABLE,
        )  # fmt: skip
    return Manner(
        gate=Gate(keys, options.allowed_hosts if here or options.allowed_hosts else None),
        timeout_s=options.request_timeout_s,
        traces=NoTraces() if options.otlp_endpoint is None else open_traces(options.otlp_endpoint),
    )


async def _serve_grpc(
    stack: AsyncExitStack, front: kserve.Front, options: ServeOptions, keys: Keys | None, progress: Tell
) -> None:
    """Answer gRPC until the stack is closed, which is when everything has been drained."""
    from fewbit.serve.kserve.rpc import serve_grpc  # gRPC's library is large

    try:
        server = await serve_grpc(front, options.host, options.grpc_port or GRPC_PORT, keys, options.request_timeout_s)
    except RecipeError as error:
        if options.grpc_port is not None:
            raise
        log.warning("there is no gRPC: %s", error)
        return
    stack.push_async_callback(server.stop)
    progress(f"gRPC on {options.host}:{server.port}")


def _control_manner(options: ServeOptions, keys: Keys | None) -> Manner:
    """On a port as strict as can be; a unix socket can be opened by this user alone."""
    assert options.control is not None
    return Manner(Gate(keys, options.allowed_hosts)) if options.control.isdecimal() else Manner()


async def _serve(
    models: Models,
    preload: Sequence[str],
    listeners: Sequence[socket.socket],
    options: ServeOptions,
    keys: Keys | None,
    progress: Tell,
) -> None:
    manner = _manner(options, keys)

    async def load(url: str) -> None:
        await models.preload(preload)
        count = len(models.names)
        if not count:
            log.warning("there is no model in %s yet; what comes there is served", options.model_dir)
        several = f"{count} model{'s' if count != 1 else ''} of {options.model_dir}"
        what = preload[0] if options.model is not None else several
        progress(f"serving {what} on {url} (Ctrl-C stops it)")
        await models.until_lost()

    app = create_app(models, kserve.Options(options.triton_flavor, options.repository_control), manner)
    async with AsyncExitStack() as stack:
        stack.callback(manner.traces.close)
        stack.push_async_callback(models.close)
        if len(listeners) > 1:
            await stack.enter_async_context(control.answering(models, listeners[1], _control_manner(options, keys)))
        if options.grpc_port or (options.grpc_port is None and options.port):
            await _serve_grpc(stack, app.state.front, options, keys, progress)
        await serve_app(app, listeners[0], drain_s=options.drain_s, beside=load)
