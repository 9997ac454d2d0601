"""Commands that put load on a server: bench serve."""

from __future__ import annotations

import asyncio
import json as json_
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.common import (
    SCHEMA,
    JsonOption,
    QuietOption,
    SeedOption,
    VerboseOption,
    note,
    open_model,
    print_json,
    progress,
)
from fewbit.cli.loadtext import print_ratios, print_result
from fewbit.errors import RequestError, nearest_name

if TYPE_CHECKING:
    from fewbit.measure.load import Ramp, Result
    from fewbit.text import Tokenizer

KEY = "OPENAI_API_KEY"


def serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of an OpenAI-compatible server: 127.0.0.1:8000.")],
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="URL", help="A second server, asked the same in turns.")
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(
            "--request-rate", help="Open loop: requests/s, sent when due, however slow the server is; or inf."
        ),
    ] = None,
    ramp_up: Annotated[
        str | None,
        typer.Option(
            "--ramp-up", metavar="KIND:FROM:TO", help="Open loop: linear:1:20 or exponential:1:64 requests/s."
        ),
    ] = None,
    burstiness: Annotated[
        float, typer.Option("--burstiness", help="Of an open loop: 1 Poisson, below 1 in bursts, inf even.")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option("--max-concurrency", min=1, help="Of an open loop: others that are due wait.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, help="Closed loop: requests at a time [default: 1]")
    ] = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="Requests of a round.")] = 100,
    num_warmups: Annotated[int, typer.Option("--num-warmups", min=0, help="Requests before, not counted.")] = 2,
    repeats: Annotated[
        int | None, typer.Option("--repeats", min=1, help="Rounds, each of new requests [default: 1; compared: 4]")
    ] = None,
    dataset_name: Annotated[
        str, typer.Option("--dataset-name", help="random, jsonl, sharegpt, trtllm or trace.")
    ] = "random",
    dataset_path: Annotated[Path | None, typer.Option("--dataset-path", help="Its file; .gz will do.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="DIR", help="The model's directory: makes and counts tokens.")
    ] = None,
    input_len: Annotated[
        int | None, typer.Option("--input-len", min=1, help="Tokens of random prompts [default: 1024]")
    ] = None,
    output_len: Annotated[
        int | None, typer.Option("--output-len", min=1, help="Tokens of answers [default: the data set's, else 128]")
    ] = None,
    range_ratio: Annotated[float, typer.Option("--range-ratio", help="Random lengths vary by this share.")] = 0.0,
    prefix_len: Annotated[int, typer.Option("--prefix-len", min=0, help="Tokens that random prompts share.")] = 0,
    as_text: Annotated[
        bool, typer.Option("--text/--ids", help="Random prompts as text (as they are for chat), or token ids.")
    ] = False,
    time_scale: Annotated[float, typer.Option("--time-scale", help="Seconds to a second of a trace.")] = 1.0,
    endpoint: Annotated[str, typer.Option("--endpoint", help="completions or chat.")] = "completions",
    model: Annotated[str | None, typer.Option("--model", help="Name to ask for [default: the server's first]")] = None,
    ignore_eos: Annotated[
        bool | None,
        typer.Option("--ignore-eos/--heed-eos", help="Answers of full length [default: if the data set gives lengths]"),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="Of sampling.")] = 0.0,
    extra_body: Annotated[
        str | None, typer.Option("--extra-body", metavar="JSON", help="More fields of each request.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds until an answer is given up.")] = 600,
    goodput: Annotated[
        str | None, typer.Option("--goodput", help="Objectives: ttft_ms=200,tpot_ms=50,e2el_ms=5000.")
    ] = None,
    model_dir: Annotated[
        str | None, typer.Option("--model-dir", metavar="DIR", help="What URL serves: adds bytes and FLOPs of a step.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="What serves it, for MBU and MFU: h100, h200, ...")] = None,
    percentiles: Annotated[str, typer.Option("--metric-percentiles", help="By commas.")] = "50,90,95,99",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File for the JSON object.")] = None,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="With a value for each request.")] = False,
    label: Annotated[str | None, typer.Option("--label", help="A word of yours for the JSON object.")] = None,
    json: JsonOption = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Speed of a server under load: latencies, throughput and goodput, as its clients see them.

    Without --request-rate, --ramp-up or a trace it is a closed loop. $OPENAI_API_KEY is sent where it is set.
    """
    from fewbit.measure import load as of

    reader = of.dataset_named(dataset_name, dataset_path)
    rated = request_rate is not None or ramp_up is not None
    opened = rated or dataset_name == "trace"
    without_use = [
        option
        for option, given, field in (
            ("--input-len", input_len is not None, "input_tokens"),
            ("--range-ratio", range_ratio != 0, "range_ratio"),
            ("--prefix-len", prefix_len != 0, "prefix_tokens"),
            ("--text", as_text, "as_text"),
            ("--time-scale", time_scale != 1, "time_scale"),
        )
        if given and field not in reader.USES
    ]
    if without_use:
        raise RequestError(f"{without_use[0]} means nothing to data set {dataset_name}; leave it out")
    if concurrency is not None and opened:
        raise RequestError("--concurrency makes a closed loop; bound an open one with --max-concurrency")
    if max_concurrency is not None and not opened:
        raise RequestError("--max-concurrency bounds an open loop; give --request-rate too, or --concurrency instead")
    if burstiness != 1 and not rated:
        raise RequestError("--burstiness shapes an open loop by rate; give --request-rate as well")
    if request_rate is not None and ramp_up is not None:
        raise RequestError("--request-rate and --ramp-up both say the rate; give one of them")
    if gpu is not None and model_dir is None:
        raise RequestError("--gpu is for MBU and MFU, which need the model's sizes: give --model-dir DIR as well")
    if output is not None and not output.absolute().parent.is_dir():
        raise RequestError(f"--output {output}: there is no folder {output.absolute().parent}")
    if endpoint not in of.PATHS:
        raise RequestError(f"--endpoint {endpoint}: {nearest_name(endpoint, of.PATHS)}")
    rounds = repeats or (4 if compare else 1)
    known = _tokenizer(tokenizer or model_dir)
    lengths = (input_len, output_len, range_ratio, prefix_len, as_text or endpoint == "chat")
    wanted = [of.Wanted(num_prompts, dataset_path, known, seed + i, *lengths) for i in range(rounds)]
    drawn = [
        of.load_of(
            reader, one, rate=request_rate, burstiness=burstiness, ramp=_ramp(ramp_up),
            limit=concurrency or max_concurrency, time_scale=time_scale,
        )
        for one in wanted
    ]  # fmt: skip
    warm = of.warmups(reader, wanted[0], num_warmups)
    cuts, objectives = _percentiles(percentiles), of.read_objectives(goodput) if goodput else None
    settings: dict[str, Any] = {
        "temperature": temperature, "ignore_eos": reader.EXACT if ignore_eos is None else ignore_eos,
        "extra": _extra(extra_body), "timeout_s": timeout,
    }  # fmt: skip

    async def run() -> tuple[list[str], list[list[Result]], bool]:
        clients = [of.client_of(one, os.environ.get(KEY)) for one in (url, compare) if one]
        names = [model or (await of.served_models(client))[0] for client in clients]
        asked = [
            of.Endpoint(client, of.Asking(name, endpoint, **settings))
            for client, name in zip(clients, names, strict=True)
        ]
        count = None if known is None else lambda text: len(known.encode(text, add_special_tokens=False))
        with progress() as bars, stopping() as stop:
            found = await of.measure(
                asked, drawn, warm, count_tokens=count, objectives=objectives, percentiles=cuts, progress=bars,
                stop=stop,
            )  # fmt: skip
        return names, found, stop.is_set()

    names, found, stopped = asyncio.run(run())
    if not found[0]:
        raise KeyboardInterrupt  # before anything was answered
    said = _settled(
        of.environment(seed),
        endpoint_type="openai-chat" if endpoint == "chat" else "openai",
        backend="openai-chat" if endpoint == "chat" else "openai",
        label=label, tokenizer_id=tokenizer or model_dir, burstiness=burstiness,
        request_rate=math.inf if drawn[0].due is None else request_rate,
        max_concurrency=concurrency or drawn[0].limit, loop="closed" if drawn[0].due is None else "open",
        ramp_up=ramp_up, num_warmups=num_warmups, ignore_eos=settings["ignore_eos"], temperature=temperature,
        extra_body=settings["extra"], prefix_len=prefix_len,
        dataset={
            "name": dataset_name, "path": None if dataset_path is None else str(dataset_path),
            "sha256": None if dataset_path is None else of.file_hash(dataset_path),
            "distinct_prompts": min(of.distinct(load.samples) for load in drawn),
            "requests_sha256": [of.fingerprint(load.samples) for load in drawn],
        },
    )  # fmt: skip
    objects = []
    for place, (one, name, results) in enumerate(zip((url, compare), names, found)):  # noqa: B905
        if not results:
            break  # stopped before the second server's first round
        made = said | {"base_url": one, "model_id": name} | of.report(of.middle(results), save_detailed)
        made["rounds"] = of.spread(results)
        if model_dir is not None and place == 0:
            made["utilization"] = _utilization(of.middle(results), model_dir, gpu)
        objects.append(made)
    whole = {"result_schema": of.SCHEMA} | objects[0]
    whole["stopped"] = stopped
    if compare and found[1]:
        pairs = min(map(len, found))  # whole rounds, of both
        whole |= {"compared": objects[1], "ratios": of.ratios(found[0][:pairs], found[1][:pairs])}
    if output is not None:
        output.write_text(json_.dumps({"schema": SCHEMA, "command": "bench serve", **whole}) + "\n", "utf8")
        note(f"written to {output}")
    if json:
        print_json("bench serve", whole)
    else:
        for number, made in enumerate(objects):
            if number:
                print()
            print_result(made, rounds)
        if compare and "ratios" in whole:
            print_ratios(whole["ratios"], url, compare)
    if not any(made["completed"] for made in objects):
        reason = objects[0]["failures"][0]
        raise RequestError(f"no request was answered; {reason['requests']} of them: {reason['reason']}")
    if stopped:
        done = sum(len(result.records) for results in found for result in results)
        note(f"stopped: the figures are of the {done} requests that were over")
        raise KeyboardInterrupt


@contextmanager
def stopping() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C sets, so that what was measured until then is not lost; a second one is the usual."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def halt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, halt)
    except (NotImplementedError, RuntimeError, ValueError):  # not the main thread, or not Unix
        yield stop
        return
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _tokenizer(folder: str | None) -> Tokenizer | None:
    from fewbit.checkpoint import locate
    from fewbit.text import Tokenizer

    return None if folder is None else Tokenizer.load(locate(folder))


def _ramp(text: str | None) -> Ramp | None:
    from fewbit.measure.load import Ramp

    if text is None:
        return None
    kind, _, rates = text.partition(":")
    start, _, end = rates.partition(":")
    try:
        if kind not in ("linear", "exponential"):
            raise ValueError
        return Ramp(kind, float(start), float(end))  # type: ignore[arg-type]
    except ValueError:
        raise RequestError(f"--ramp-up {text}: expected linear:FROM:TO or exponential:FROM:TO, requests/s") from None


def _percentiles(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1]
    if not all(0 <= cut <= 100 for cut in found):
        raise RequestError(f"--metric-percentiles {text}: expected numbers from 0 to 100 by commas; for example 50,99")
    return found


def _extra(text: str | None) -> dict[str, Any]:
    try:
        found = json_.loads(text) if text else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"--extra-body {text}: expected a JSON object; for example '{{\"top_k\": 1}}'")
    return found


def _settled(environment: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Settings for JSON, which knows no infinity; vLLM writes it as a word."""
    finite = {k: "inf" if isinstance(v, float) and math.isinf(v) else v for k, v in settings.items()}
    return environment | finite


def _utilization(result: Result, model_dir: str, gpu: str | None) -> dict[str, Any] | None:
    from fewbit.measure.load.limits import utilization
    from fewbit.measure.peaks import peak_named

    return utilization(result, open_model(model_dir), peak_named(gpu) if gpu else None)
