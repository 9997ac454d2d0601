"""``fewbit demo``: the whole way once, on the bundled model. Compress, measure, serve, ask."""

from __future__ import annotations

import contextlib
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.common import (
    DeviceOption,
    JsonOption,
    QuietOption,
    SeedOption,
    VerboseOption,
    device_of,
    note,
    print_json,
    progress,
    read_windows,
    size,
    table,
)
from fewbit.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

FLOAT = "fp32"
RECIPES = ("int4", "int8", "fp8", "nvfp4")
HELD_OUT = "heldout.txt.gz"
QUESTION = "Tell me a story about a little fox who was afraid of the dark."
WINDOWS, LENGTH = 24, 256
ROUNDS = 5


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the small models.")] = Path("demo-out"),
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compress the bundled model four ways, compare them, serve one and ask it for a story."""
    from fewbit.demo import demo_model

    source = demo_model()
    try:
        import openai  # noqa: F401
    except ImportError:
        raise UnsupportedError("the demonstration asks through the openai client: pip install 'fewbit[demo]'") from None
    where = device_of(device)
    rows = [_measure(source, source, where, "bf16")]
    for recipe in RECIPES:
        made = output / recipe
        _compress(source, recipe, made, where)
        rows.append(_measure(made, source, where, recipe))
    backends = dict.fromkeys((row["format"] for row in rows), "auto")
    if where.type == "cpu":  # the same numbers, in the dtype that a CPU computes in
        rows.insert(0, {**rows[0], "format": FLOAT})
        backends = {FLOAT: "exact", **backends}
    models = {name: output / name if name in RECIPES else source for name in backends}
    for row, speeds in zip(rows, _decode_speeds(source, models, backends, where), strict=True):
        row |= {"tokens_per_s": statistics.median(speeds), "tokens_per_s_range": [min(speeds), max(speeds)]}
    if not json:
        _show(rows)
    with _server(output / "int4", where) as url:
        answer = _ask(url, "int4", show=not json)
        if json:
            print_json("demo", {"formats": rows, "answer": answer})
    if not json:
        _try_next(output / "int4")


def _compress(source: Path, recipe: str, made: Path, where: torch.device) -> None:
    from fewbit import compress as room
    from fewbit.checkpoint import open_checkpoint

    start = time.perf_counter()
    checkpoint = open_checkpoint(source)
    planned = room.plan(checkpoint, room.read_recipe(recipe))
    with progress() as bars:
        report = room.compress(checkpoint, planned, made, device=str(where), force=True, progress=bars)
    assert report.verified is not None
    note(
        f"{recipe}: compressed in {time.perf_counter() - start:.1f} s, opened again and checked: "
        f"logits equal bit for bit on {report.verified.tokens} held-out tokens"
    )


def _measure(model: Path, base: Path, where: torch.device, name: str) -> dict[str, Any]:
    """One row of the table."""
    from fewbit.checkpoint import open_checkpoint
    from fewbit.measure import facts, quality

    checkpoint = open_checkpoint(model)
    windows = read_windows(base / HELD_OUT, checkpoint.folder, LENGTH, WINDOWS)
    with progress() as bars:
        found = quality.evaluate(checkpoint, open_checkpoint(base), windows, where, bars)
    seen = facts.inspect(checkpoint)
    assert found.kl_mean is not None
    assert found.top1_agreement is not None
    return {
        "format": name,
        "bytes": seen.file_bytes,
        "bits_per_weight": seen.bits_per_weight,
        "perplexity": found.perplexity.value,
        "perplexity_err": found.perplexity.error,
        "kl_mean": found.kl_mean.value,
        "kl_mean_err": found.kl_mean.error,
        "top1_agreement": found.top1_agreement.value,
        "top1_agreement_err": found.top1_agreement.error,
        "tokens": found.tokens,
    }


def _decode_speeds(
    base: Path, models: Mapping[str, Path], backends: Mapping[str, str], where: torch.device
) -> list[list[float]]:
    """Tokens per second of each, in rounds: they take turns, so that whatever else runs here meets all of them."""
    from fewbit.engine.config import EngineOptions
    from fewbit.engine.engine import open_engine
    from fewbit.measure.speed import decode_speed

    prompt = tuple(read_windows(base / HELD_OUT, base, LENGTH, 1)[0][:32])
    shape = EngineOptions(device=str(where), max_batch=1, max_model_len=256, num_blocks=64)
    engines = [open_engine(path, replace(shape, backend=backends[name])) for name, path in models.items()]
    rounds = [[decode_speed(engine, prompt, runs=1).tokens_per_s for engine in engines] for _ in range(ROUNDS)]
    return [list(speeds) for speeds in zip(*rounds, strict=True)]


def _show(rows: list[dict[str, Any]]) -> None:
    columns = ["format", "on disk", "bits/weight", "perplexity", "mean KL (nats)", "top-1 agreement", "decode tokens/s"]
    shown = [
        [
            r["format"],
            size(r["bytes"]),
            f"{r['bits_per_weight']:.3f}",
            f"{r['perplexity']:.2f} ± {r['perplexity_err']:.2f}",
            f"{r['kl_mean']:.5f} ± {r['kl_mean_err']:.5f}",
            f"{100 * r['top1_agreement']:.2f} ± {100 * r['top1_agreement_err']:.2f} %",
            f"{r['tokens_per_s']:.0f} ({r['tokens_per_s_range'][0]:.0f}–{r['tokens_per_s_range'][1]:.0f})",
        ]
        for r in rows
    ]
    print()
    table(columns, shown)
    print(
        f"on {rows[0]['tokens']:,} tokens of books held out of training; KL and agreement against bf16; speeds in turns"
    )
    if rows[0]["format"] == FLOAT:
        print(f"{FLOAT}: the bf16 model with its weights widened to float32 (--exact); quality is of exact arithmetic")
    print()


@contextlib.contextmanager
def _server(model: Path, where: torch.device) -> Iterator[str]:
    """``fewbit serve`` as a user would start it, on a free port; stopped by SIGTERM at the end."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "fewbit.cli",
        "serve",
        str(model),
        "--port",
        str(port),
        "--device",
        str(where),
        "-q",
    ]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_healthy(process, url)
        yield url
        process.send_signal(signal.SIGTERM)
        if (status := process.wait(timeout=60)) != 0:
            raise UnsupportedError(f"the server ended with status {status} after SIGTERM")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait_healthy(process: subprocess.Popen[bytes], url: str, limit_s: float = 120.0) -> None:
    start = time.monotonic()
    while time.monotonic() - start < limit_s:
        if process.poll() is not None:
            raise UnsupportedError(f"the server ended with status {process.returncode} before it was ready")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=1):
            return
        time.sleep(0.1)
    raise UnsupportedError(f"the server did not answer within {limit_s:.0f} s")


def _ask(url: str, model: str, show: bool) -> str:
    """One chat completion through the openai client, streamed."""
    from openai import OpenAI

    if show:
        print(f"{model} on {url}, asked through the openai client: {QUESTION}\n")
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=160,
        temperature=0.7,
        seed=1,
        stream=True,
    )
    answer = ""
    for chunk in stream:
        for choice in chunk.choices:
            answer += choice.delta.content or ""
            if show:
                print(choice.delta.content or "", end="", flush=True)
    if show:
        print("\n")
    if not answer.strip():
        raise UnsupportedError("the server sent an empty answer")
    return answer


def _try_next(model: Path) -> None:
    parameters = '{"max_tokens":100,"bad_words":[""],"stop_words":[""]}'
    body = f'{{"text_input":"How do I count to nine in French?","parameters":{parameters}}}'
    print(
        f"""To go on, start the server again and ask it:

  fewbit serve {model} --port 8000
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{model.name}", "messages": [{{"role": "user", "content": "{QUESTION}"}}], "max_tokens": 80}}'
  curl http://127.0.0.1:8000/v2/models/ensemble/generate \\
    -d '{body}'"""
    )
