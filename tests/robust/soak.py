"""A soak: mixed traffic over all protocols, with clients that leave, bad inputs and bursts, for as long as it is let.

    python tests/robust/soak.py --minutes 10 --seed 0

It ends with a table and, if anything was not as it should be, with status 1: a 5xx for a good request, a golden
prompt with another answer, blocks or requests that are left, files that stay open, memory that grows. Of the memory it
only judges what had the time to show itself: the second half of a run of `WARM_S + GROWTH_S` seconds or more.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import http.client
import io
import itertools
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from real_server import CHAT, COMPLETION, GENERATE, GOLDEN, Server, post

ABORTED, BAD = 0.10, 0.05
CLIENTS = 12
BURST = 40  # requests at once, every so often
BURST_S = 20.0
SAMPLE_S = 2.0
WARM_S = 120.0
"""Allocators settle in the first half of a run, and in so long at least."""
GROWTH_S = 120.0
"""So long has the rest to be: in less, a burst is as much as a leak."""
MAX_SLOPE = 2.0
"""MiB a minute, by `slope`."""
LEAST = 150
"""Requests of a run, however long they take: fewer do not have all kinds among them."""
WORDS = ("the", "old", "fox", "king", "sea", "rain", "and", "a boy", "who", "lived", "forest", "said to", "one day")
SERVED = ("--drain", "2", "--kv-blocks", "512")
"""A cache that bursts fill, so that all of it is touched early and requests are put back."""


@dataclass
class Found:
    """What was seen."""

    counts: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: collections.defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)  # time, RSS of both, open files


# ---- requests ----


def text(random_: random.Random, most: int = 60) -> str:
    return " ".join(random_.choices(WORDS, k=random_.randint(1, most)))


def sampling(random_: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {"max_tokens": random_.randint(1, 48)}
    if random_.random() < 0.5:
        given["temperature"] = random_.choice([0, 0.5, 1.0, 1.5])
    if random_.random() < 0.3:
        given["top_p"] = 0.9
    if random_.random() < 0.2:
        given["stop"] = [random_.choice(WORDS)]
    return given


def completion(r: random.Random) -> tuple[str, dict[str, Any]]:
    body = sampling(r) | {"prompt": text(r) if r.random() < 0.7 else [text(r, 10) for _ in range(3)]}
    return COMPLETION, body | ({"logprobs": 3} if r.random() < 0.2 else {})


def streamed(r: random.Random) -> tuple[str, dict[str, Any]]:
    return COMPLETION, sampling(r) | {"prompt": text(r), "stream": True, "stream_options": {"include_usage": True}}


def chat(r: random.Random) -> tuple[str, dict[str, Any]]:
    return CHAT, sampling(r) | {"messages": [{"role": "user", "content": text(r)}], "stream": r.random() < 0.5}


def long_prompt(r: random.Random) -> tuple[str, dict[str, Any]]:
    return COMPLETION, {"prompt": [r.randrange(5, 4000) for _ in range(r.randint(200, 1500))], "max_tokens": 4}


def generate(r: random.Random) -> tuple[str, dict[str, Any]]:
    return GENERATE, {"text_input": text(r), "parameters": {"max_tokens": r.randint(1, 32), "bad_words": [""]}}


def generate_stream(r: random.Random) -> tuple[str, dict[str, Any]]:
    return f"{GENERATE}_stream", {"text_input": text(r), "max_tokens": r.randint(1, 32), "stream": True}


def infer(r: random.Random) -> tuple[str, dict[str, Any]]:
    tensors = [("text_input", "BYTES", text(r)), ("max_tokens", "INT32", r.randint(1, 32))]
    inputs = [{"name": n, "shape": [1, 1], "datatype": kind, "data": [value]} for n, kind, value in tensors]
    return "/v2/models/ensemble/infer", {"inputs": inputs}


GOOD = (completion, streamed, chat, long_prompt, generate, generate_stream, infer)
WRONG: tuple[tuple[str, Any], ...] = (
    (COMPLETION, b""),
    (COMPLETION, b'{"prompt": ' + b"[" * 20_000),
    (COMPLETION, {"prompt": "x", "temperature": -1}),
    (COMPLETION, {"prompt": "x", "max_tokens": 10**9}),
    (COMPLETION, {"prompt": "x" * 1_000_000}),
    (COMPLETION, {"prompt": "x", "max_token": 1}),
    (COMPLETION, {"model": "gone", "prompt": "x"}),
    (CHAT, {"messages": [{"role": "pirate", "content": "x"}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]}),
    (GENERATE, {"text_input": 3}),
    ("/v2/models/gone/generate", {"text_input": "x"}),
    ("/nowhere", {}),
)


async def ask(port: int, data: bytes, leave_after_s: float | None = None) -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own; status 0 for a client that left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(leave_after_s):
            received = await reader.read()
    except TimeoutError:
        return 0, b""
    finally:
        writer.close()
    answer = http.client.HTTPResponse(_Received(received))  # type: ignore[arg-type]
    answer.begin()
    return answer.status, answer.read()


class _Received:
    """What a socket gave, for the standard library's parser."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


# ---- traffic ----


async def one(port: int, r: random.Random, found: Found, routes: list[Any]) -> None:
    """One request: bad, left, or good."""
    chance = r.random()
    if chance < BAD:
        path, body = r.choice(WRONG)
        status, _ = await ask(port, post(path, body, "Connection: close"))
        found.counts["bad", str(status)] += 1
        if not 400 <= status < 500:
            found.wrong.append(f"{status} for a bad request to {path}: {str(body)[:80]}")
        return
    kind = r.choice(routes)
    path, body = kind(r)
    leaves = chance < BAD + ABORTED
    began = time.monotonic()
    status, answer = await ask(port, post(path, body, "Connection: close"), r.uniform(0, 0.3) if leaves else None)
    if status == 0:
        found.counts["left", "-"] += 1
        return
    found.counts[kind.__name__, str(status)] += 1
    found.seconds[kind.__name__].append(time.monotonic() - began)
    failed = b'data: {"error"' in answer or (body.get("stream") and path != CHAT and not answer)
    if status != 200 or failed:
        found.wrong.append(f"{status} for a good request to {path}: {answer[-200:]!r}")


async def client(port: int, seed: int, found: Found, routes: list[Any], until: float) -> None:
    """One after the other."""
    r = random.Random(seed)
    while time.monotonic() < until or found.counts.total() < LEAST:
        await one(port, r, found, routes)
        await asyncio.sleep(r.expovariate(20))


async def bursts(port: int, seed: int, found: Found, routes: list[Any], until: float) -> None:
    """Many at once, then none for a while."""
    r = random.Random(seed)
    while time.monotonic() + BURST_S / 2 < until:
        await asyncio.sleep(BURST_S / 2)
        await asyncio.gather(*(one(port, r, found, routes) for _ in range(BURST)))


async def watch(server: Server, found: Found, until: float) -> None:
    """Memory, files, and in the middle the golden prompt."""
    began, middle = time.monotonic(), (time.monotonic() + until) / 2
    while (now := time.monotonic()) < until:
        rss = server.rss()
        found.samples.append((now - began, *rss, server.files()))
        if now > middle:
            middle = until
            await golden(server, found, "in the middle")
        await asyncio.sleep(SAMPLE_S)


async def golden(server: Server, found: Found, when: str) -> None:
    """The golden prompt is answered as at first."""
    status, body = await ask(server.port, post(COMPLETION, GOLDEN, "Connection: close"))
    same = status == 200 and json.loads(body)["choices"] == server.golden
    found.counts["golden", str(status)] += 1
    if not same:
        found.wrong.append(f"the golden prompt has another answer {when}: {status} {body!r}")


async def traffic(server: Server, found: Found, minutes: float, seed: int, routes: list[Any]) -> None:
    until = time.monotonic() + 60 * minutes
    clients = [client(server.port, seed * 1000 + i, found, routes, until) for i in range(CLIENTS)]
    await asyncio.gather(*clients, bursts(server.port, seed, found, routes, until), watch(server, found, until))
    await golden(server, found, "at the end")


# ---- the verdict ----


def slope(samples: list[tuple[float, int]]) -> float:
    """MiB a minute, of seconds and bytes: the median of the slopes between pairs of samples (after Theil and Sen).

    Of the pairs that are apart for longer than a burst and at most for a third of the time. A leak goes on between
    most of these. What an allocator takes once, however much, and what it gives back lies between few of them, where a
    line of least squares would rise with it.
    """
    most = (samples[-1][0] - samples[0][0]) / 3
    pairs = itertools.combinations(samples, 2)
    return statistics.median((b - a) / (t - s) for (s, a), (t, b) in pairs if BURST_S < t - s <= most) * 60 / (1 << 20)


def growth(samples: list[tuple[float, int]]) -> float | None:
    """MiB a minute after the warm-up; None: the run was too short to tell."""
    end = samples[-1][0]
    settled = [s for s in samples if s[0] >= max(end / 2, WARM_S)]
    return slope(settled) if settled and end - settled[0][0] >= GROWTH_S - 2 * SAMPLE_S else None


def judge(server: Server, found: Found, files: int) -> list[tuple[str, str]]:
    """What is left when nobody asks any more; adds to what is wrong."""
    rows = []
    for index, who in ((1, "server"), (2, "engine")):
        grows = growth([(s[0], s[index]) for s in found.samples])
        sizes = [s[index] / (1 << 20) for s in found.samples]
        how = "too short to say whether it grows" if grows is None else f"{grows:+.2f} MiB/min in the second half"
        rows.append((f"RSS of the {who}", f"{sizes[0]:.0f} -> {sizes[-1]:.0f} MiB, {how}"))
        if grows is not None and grows > MAX_SLOPE:
            found.wrong.append(f"the {who} grows by {grows:.1f} MiB a minute, and {MAX_SLOPE:g} is the most")
    try:
        server.quiet()
        rows.append(("requests, blocks left", "0"))
    except AssertionError as e:
        found.wrong.append(str(e))
    try:
        server.files_at_most(files + 3)
    except AssertionError:
        found.wrong.append(f"{server.files() - files} files stay open")
    rows.append(("open files", f"{files} -> {server.files()}, {max(s[3] for s in found.samples)} at most"))
    metrics = server.metrics()
    rows += [
        (
            "cancelled, failed",
            f"{total(metrics, 'requests_cancelled_total'):.0f}, {total(metrics, 'requests_failed_total'):.0f}",
        ),
        ("tokens generated", f"{total(metrics, 'generation_tokens_total'):.0f}"),
        ("preemptions", f"{total(metrics, 'num_preemptions_total'):.0f}"),
    ]
    if errors := [line for line in server.log if "Traceback" in line or "unforeseen" in line]:
        found.wrong.append(f"the server logged {len(errors)} failures: {errors[0].strip()}")
    return rows


def total(metrics: dict[str, float], name: str) -> float:
    return sum(v for n, v in metrics.items() if n.partition("{")[0] == f"fewbit:{name}")


def report(found: Found, rows: list[tuple[str, str]]) -> str:
    """The table."""
    lines = [f"{'kind':<18}{'status':>8}{'count':>8}{'p50 s':>9}{'p99 s':>9}"]
    for (kind, status), count in sorted(found.counts.items()):
        times = sorted(found.seconds.get(kind, ()))
        p50, p99 = (f"{times[int(q * (len(times) - 1))]:.3f}" if times else "" for q in (0.5, 0.99))
        lines.append(f"{kind:<18}{status:>8}{count:>8}{p50:>9}{p99:>9}")
    lines += ["", *(f"{name:<26}{value}" for name, value in rows)]
    lines += ["", *(f"WRONG: {w}" for w in found.wrong[:20])]
    return "\n".join([*lines, f"{len(found.wrong)} things were wrong" if found.wrong else "all was as it should be"])


def soak(minutes: float, seed: int) -> tuple[Found, str]:
    """Start a server, ask it, and say how it was."""
    found, server = Found(), Server(*SERVED)
    try:
        r = random.Random(seed)
        routes = [kind for kind in GOOD if server.ask(*kind(r)).status not in (404, 405)]
        files = server.files()
        asyncio.run(traffic(server, found, minutes, seed, routes))
        rows = judge(server, found, files)
    finally:
        server.close()
    return found, report(found, rows)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found, said = soak(args.minutes, args.seed)
    print(said)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
