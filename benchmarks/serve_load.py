"""What serving over HTTP costs beside the engine alone, and whether many streams at once go through.

python benchmarks/serve_load.py [--model DIR] [--streams 64] [--tokens 128] [--rounds 7] [--threads 1]

Rounds alternate between two engine processes of the same settings, asked for the same greedy answers, STREAMS of them
at once, each of exactly TOKENS tokens:

  engine   over its unix socket, by `SocketClient`: tokens, no text and no HTTP
  server   over HTTP, from `fewbit serve`: /v1/completions with `stream: true`

The clock of a round runs from the first request to the last token. A stream that fails, or that has not all its
tokens, ends the benchmark. Printed are the median rounds and the median of their ratios, as one JSON object, and
beside them the processor time that each process of `fewbit serve` took for a token, which depends less on whatever
else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import psutil

import fewbit
from fewbit.engine.config import EngineOptions
from fewbit.engine.socketclient import SocketClient
from fewbit.engine.spawn import spawn
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.text import Tokenizer

PROMPT = "Once upon a time there was a fox who lived in story number {}, and"


async def over_socket(client: SocketClient, prompts: list[tuple[int, ...]], tokens: int) -> None:
    """All answers from the engine itself."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    async def one(number: int, prompt: tuple[int, ...]) -> None:
        stream = await client.submit(GenerateRequest(id=str(number), prompt=prompt, params=params))
        count = 0
        async for event in stream:
            count += event.token is not None
        assert count == tokens, f"{count} tokens instead of {tokens}"

    await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts)))


class Counter(asyncio.Protocol):
    """A client that does as little as it can: it keeps the bytes and looks at the last ones."""

    def __init__(self, request: bytes, done: asyncio.Future[bytes]) -> None:
        self._request, self._done, self._last = request, done, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Forget all but the end."""
        self._last = (self._last + data)[-2000:]

    def connection_lost(self, error: Exception | None) -> None:
        """The answer is complete, or was never."""
        if not self._done.done():
            self._done.set_result(self._last)


async def over_http(url: str, prompts: list[tuple[int, ...]], tokens: int) -> None:
    """All answers as event streams."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    asked = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}

    async def one(prompt: tuple[int, ...]) -> None:
        body = json.dumps({"prompt": prompt, **asked, "stream_options": {"include_usage": True}}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bytes] = loop.create_future()
        await loop.create_connection(lambda: Counter(head.encode() + body, done), host, port)
        last = await done
        assert f'"completion_tokens":{tokens},'.encode() in last, last
        assert b"data: [DONE]" in last, last

    await asyncio.gather(*(one(p) for p in prompts))


def processes(pid: int) -> tuple[psutil.Process, psutil.Process]:
    """The process of a server that answers HTTP, and its engine's."""
    http = psutil.Process(pid)
    (engine,) = (p for p in http.children(recursive=True) if "fewbit.engine.process" in p.cmdline())
    return http, engine


def cpu_s(process: psutil.Process) -> float:
    """Processor time that a process has taken."""
    return sum(process.cpu_times()[:2])


async def timed(work: Callable[[], Awaitable[None]]) -> float:
    """Seconds that `work` takes."""
    begun = time.perf_counter()
    await work()
    return time.perf_counter() - begun


async def measure(args: argparse.Namespace) -> dict[str, object]:
    """The figures, see above."""
    tokenizer = Tokenizer.load(args.model)
    options = EngineOptions(max_batch=args.streams, prefix_cache=False, seed=0)
    same = {"device": "cpu", "grpc_port": 0, "max_batch": args.streams, "prefix_cache": False}
    with spawn(args.model, options) as process, fewbit.serve(args.model, port=0, **same) as server:
        client = await process.connect()
        took: dict[str, list[float]] = {"engine": [], "server": []}
        http, engine = processes(server.pid)
        spent_s = [0.0, 0.0]
        try:
            for number in range(-1, args.rounds):  # the first is for warming up
                texts = [PROMPT.format(number * args.streams + i) for i in range(args.streams)]
                prompts = [tuple(tokenizer.encode(text)) for text in texts]
                for kind in ("engine", "server") if number % 2 else ("server", "engine"):

                    async def work(kind: str = kind, prompts: list[tuple[int, ...]] = prompts) -> None:
                        if kind == "engine":
                            await over_socket(client, prompts, args.tokens)
                        else:
                            await over_http(server.url, prompts, args.tokens)

                    before = cpu_s(http), cpu_s(engine)
                    seconds = await timed(work)
                    if number >= 0:
                        took[kind].append(seconds)
                    if number >= 0 and kind == "server":
                        spent_s = [spent_s[0] + cpu_s(http) - before[0], spent_s[1] + cpu_s(engine) - before[1]]
        finally:
            await client.close()
    made = args.streams * args.tokens
    rates = {kind: [made / s for s in seconds] for kind, seconds in took.items()}
    ratios = [s / e - 1 for e, s in zip(took["engine"], took["server"], strict=True)]
    return {
        "streams": args.streams,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "threads": args.threads,
        "cores": psutil.cpu_count(),
        "load_before": args.load,
        "engine_tokens_per_s": round(statistics.median(rates["engine"]), 1),
        "server_tokens_per_s": round(statistics.median(rates["server"]), 1),
        "overhead_percent": round(100 * statistics.median(ratios), 2),
        "http_process_cpu_us_per_token": round(1e6 * spent_s[0] / (made * args.rounds)),
        "engine_process_cpu_us_per_token": round(1e6 * spent_s[1] / (made * args.rounds)),
        "overhead_percent_of_rounds": [round(100 * r, 1) for r in ratios],
    }


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=str, default=None)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the engines, for their arithmetic")
    args = parser.parse_args()
    args.model = args.model or fewbit.demo_model()
    args.load = round(os.getloadavg()[0], 2)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the processes below inherit it
    print(json.dumps(asyncio.run(measure(args)), indent=1))


if __name__ == "__main__":
    main()
