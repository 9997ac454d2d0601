"""`fewbit serve`: one model, or a folder of them, over HTTP and gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fewbit.cli.common import (
    BackendOption,
    DeviceOption,
    ExactOption,
    QuietOption,
    SeedOption,
    VerboseOption,
    backend_of,
    note,
    settings,
)
from fewbit.cli.talk import LengthOption
from fewbit.engine.config import Policy
from fewbit.errors import RecipeError

GIB = 2**30


def serve(
    model: Annotated[str | None, typer.Argument(metavar="[DIR]", help="Model directory, or a Hub id.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Model name of the API [default: the folder's]")] = None,
    model_dir: Annotated[
        Path | None,
        typer.Option("--model-dir", metavar="ROOT", help="Serve every model of a folder, each loaded when asked for."),
    ] = None,
    preload: Annotated[
        list[str] | None,
        typer.Option("--preload", metavar="NAME", help="Load at once; not ready without it. May be repeated."),
    ] = None,
    max_loaded: Annotated[
        int | None, typer.Option("--max-loaded", min=1, help="Models of the folder that are loaded at a time.")
    ] = None,
    memory_budget: Annotated[
        float | None,
        typer.Option("--memory-budget", min=0.01, metavar="GIB", help="For all models [default: most of what is free]"),
    ] = None,
    model_control: Annotated[
        Literal["on-demand", "explicit"],
        typer.Option("--model-control", help="Whether a request loads its model, or only the repository's load does."),
    ] = "on-demand",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            "--grpc-port", min=0, max=65535, help="Of gRPC; 0: none [default: 8001 if it is free; none with --port 0]"
        ),
    ] = None,
    triton_flavor: Annotated[
        Literal["ensemble", "nemo", "both"],
        typer.Option("--triton-flavor", help="What a model's own name is to Triton's clients: see docs/serving.md."),
    ] = "ensemble",
    control: Annotated[
        str | None,
        typer.Option("--control", metavar="PATH|PORT", help="Control routes: a unix socket, or a port of 127.0.0.1."),
    ] = None,
    repository_control: Annotated[
        bool,
        typer.Option("--repository-control", help="Answer /v2/repository/models/M/load and unload to clients too."),
    ] = False,
    max_batch: Annotated[int | None, typer.Option("--max-batch", min=1, help="Sequences that run at a time.")] = None,
    max_model_len: LengthOption = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option("--max-batch-tokens", min=1, help="Tokens of one step: how prompts are cut.")
    ] = None,
    kv_blocks: Annotated[int | None, typer.Option("--kv-blocks", min=1, help="Size of the K/V cache.")] = None,
    policy: Annotated[
        Policy,
        typer.Option("--policy", help="Start early and interrupt if need be, or never interrupt (two names)."),
    ] = "max_utilization",
    prefix_cache: Annotated[bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Reuse K/V.")] = True,
    max_queued: Annotated[
        int, typer.Option("--max-queued", min=1, help="Requests that may wait; more get 429.")
    ] = 1024,
    max_queued_tokens: Annotated[
        int | None, typer.Option("--max-queued-tokens", min=1, help="Tokens of prompts that may wait [default: any]")
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option("--request-timeout", min=0.001, metavar="SECONDS", help="Longest answer [default: any]"),
    ] = None,
    drain: Annotated[float, typer.Option("--drain", min=0.0, help="Seconds to finish in after SIGTERM.")] = 30.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="Keys, one a line; else FEWBIT_API_KEY of the environment has one."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", metavar="NAME", help="One more name that the server may be called by."),
    ] = None,
    trust_request_chat_template: Annotated[
        bool,
        typer.Option("--trust-request-chat-template", help="Requests may bring chat templates and variables for them."),
    ] = False,
    metrics_compat: Annotated[
        str, typer.Option("--metrics-compat", metavar="KINDS", help="Metrics under other names too: vllm,triton")
    ] = "",
    log_format: Annotated[Literal["text", "json"], typer.Option("--log-format", help="Of standard error.")] = "text",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option("--log-level", help="info has a line a request [default: warning; info for json]"),
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option("--otlp-endpoint", metavar="URL", help="OpenTelemetry traces (fewbit[otel]).")
    ] = None,
    backend: BackendOption = "auto",
    exact: ExactOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Serve a model, or many, over HTTP: the OpenAI protocol, and KServe v2 as Triton speaks it."""
    from fewbit.engine.config import EngineOptions
    from fewbit.serve import logs
    from fewbit.serve.launch import ServeOptions, serve_models

    logs.set_up(log_format, "debug" if settings.verbose and log_level is None else log_level)
    settings.log = logs.progress if log_format == "json" else None
    engine = EngineOptions(
        device=device or "auto",
        backend=backend_of(backend, exact),
        num_blocks=kv_blocks,
        max_batch=max_batch,
        max_batch_tokens=max_batch_tokens,
        max_model_len=max_model_len,
        prefix_cache=prefix_cache,
        policy=policy,
        max_queued=max_queued,
        max_queued_tokens=max_queued_tokens,
        seed=settings.seed,
    )
    options = ServeOptions(
        model=None if model is None else _located(model),
        model_dir=model_dir,
        name=name,
        host=host,
        port=port,
        drain_s=drain,
        preload=tuple(preload or ()),
        max_loaded=max_loaded,
        memory_bytes=None if memory_budget is None else int(memory_budget * GIB),
        on_demand=model_control == "on-demand",
        grpc_port=grpc_port,
        triton_flavor=triton_flavor,
        repository_control=repository_control or model_control == "explicit",
        control=control,
        api_key_file=api_key_file,
        allowed_hosts=tuple(allowed_host or ()),
        request_timeout_s=request_timeout,
        trust_request_chat_template=trust_request_chat_template,
        metrics_compat=_kinds(metrics_compat),
        otlp_endpoint=otlp_endpoint,
    )
    serve_models(options, engine, progress=note)


def _located(model: str) -> Path:
    path = Path(model).expanduser()
    if path.exists():
        return path
    from fewbit.checkpoint import locate  # imports torch, which this process does without where it can

    return locate(model)


def _kinds(text: str) -> tuple[str, ...]:
    from fewbit.serve.aliases import COMPAT

    kinds = tuple(kind.strip() for kind in text.split(",") if kind.strip())
    for kind in kinds:
        if kind not in COMPAT:
            raise RecipeError(f"--metrics-compat '{kind}': known are {', '.join(COMPAT)}")
    return kinds
