"""A clock that is set while a server runs: limits, gaps and figures go by a clock that nobody sets."""

from __future__ import annotations

import ast
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_server import COMPLETION, FLAT, GOLDEN, Server, post, read_answer

import fewbit

HOURS = 3600.0
# Loaded by every Python process of the server before anything else is.
CLOCK = """
import time

def _ahead(path={path!r}):
    with open(path) as file:
        return float(file.read() or 0)

_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _ahead()
time.time_ns = lambda: _time_ns() + int(_ahead() * 1e9)
"""


class Clock:
    """The time of day as a server's processes see it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "ahead"
        self.set(0)
        (folder / "sitecustomize.py").write_text(CLOCK.format(path=str(self._file)))
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def set(self, hours: float) -> None:
        """Let it be so far ahead."""
        new = self._file.with_suffix(".new")
        new.write_text(str(hours * HOURS))
        new.rename(self._file)


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    return Clock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def jumpy(clock: Clock) -> Iterator[Server]:
    """A server that believes this clock, with a limit that no request of these tests comes near."""
    running = Server("--drain", "2", "--request-timeout", "1000", "--log-format", "json", env=clock.environment)
    yield running
    running.close()


def off(server: Server) -> float:
    """Hours that the server is ahead, as its answers say."""
    created = server.ask(COMPLETION, GOLDEN | {"max_tokens": 1}).json["created"]
    return round((created - time.time()) / HOURS, 1)


def across(server: Server, clock: Clock, hours: float) -> bool:
    """Whether a connection that is idle and a request that is half sent, when the clock jumps, go on."""
    clock.set(0)
    body = post(COMPLETION, GOLDEN)
    with server.connect() as idle, server.connect() as half:
        idle.sendall(body)
        assert read_answer(idle).json["choices"] == server.golden
        half.sendall(body[:-5])
        clock.set(hours)
        idle.sendall(body)
        half.sendall(body[-5:])
        answers = [read_answer(idle), read_answer(half)]
    return all(answer.status == 200 and answer.json["choices"] == server.golden for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("hours", [9.0, -9.0, 200_000.0], ids=["forth", "back", "by years"])
def test_what_runs_and_what_waits_does_not_notice(jumpy: Server, clock: Clock, hours: float):
    """A stream, a whole answer, a connection kept open and a request that arrives in parts, each across the jump."""
    clock.set(0)
    assert off(jumpy) == 0
    engine = jumpy.engine.pid
    asked = FLAT | {"max_tokens": 200}
    alone = jumpy.ask(COMPLETION, asked).json["choices"][0]["text"]
    with jumpy.connect() as stream:
        stream.sendall(post(COMPLETION, asked | {"stream": True}, "Connection: close"))
        got = stream.recv(1)
        # a test that is itself held up for seconds meets the limits for idle and slow clients, but not thrice
        assert any(across(jumpy, clock, hours) for _ in range(3))
        assert off(jumpy) == hours  # the fault is there
        got += b"".join(iter(lambda: stream.recv(65536), b""))
    events = [line[6:] for line in got.split(b"\r\n") for line in line.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(json.loads(e)["choices"][0]["text"] for e in events) == alone
    assert b"[DONE]" in got
    assert jumpy.engine.pid == engine
    assert jumpy.ask("/health").status == 200
    assert jumpy.ask("/v2/health/ready").status == 200
    assert jumpy.metric("engine_restarts_total") == 0
    assert jumpy.metric("requests_timed_out_total") == jumpy.metric("requests_cancelled_total") == 0
    jumpy.quiet()


@pytest.mark.slow
def test_a_limit_holds_while_the_clock_goes_back(jumpy: Server, clock: Clock):
    """By that clock two seconds take five hours."""
    clock.set(0)
    before = jumpy.metric("requests_timed_out_total")
    with jumpy.connect() as s:
        s.sendall(post(COMPLETION, FLAT | {"max_tokens": 1900, "n": 8, "temperature": 1}, "X-Request-Timeout: 2"))
        clock.set(-5)
        assert off(jumpy) == -5
        answer = read_answer(s)
    assert answer.status == 504, answer
    assert jumpy.metric("requests_timed_out_total") > before
    jumpy.quiet()


@pytest.mark.slow
def test_no_figure_is_of_hours(jumpy: Server, clock: Clock):
    """After jumps in both directions, what was measured is what passed."""
    began = time.monotonic()
    before = jumpy.metrics()
    for i in range(6):
        with jumpy.connect() as s:
            s.sendall(post(COMPLETION, FLAT | {"max_tokens": 30}))
            clock.set(9.0 if i % 2 else -9.0)
            assert read_answer(s).status == 200
    assert off(jumpy) == 9.0
    passed = time.monotonic() - began
    found = jumpy.metrics()
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        (key,) = (n for n in found if n.startswith(f"fewbit:{name}_sum"))
        assert 0 < found[key] - before[key] < 8 * passed, name
        assert found[key.replace("_sum", "_count")] > before[key.replace("_sum", "_count")]
    lines = [json.loads(line) for line in jumpy.log if '"seconds"' in line]
    assert lines
    assert all(0 <= line["seconds"] < 1000 for line in lines)
    stats = jumpy.ask("/v2/models/stats").json["model_stats"]
    assert stats


def test_only_what_tells_the_time_of_day_reads_it():
    """Where the server and the engine read the clock that can be set: fields that say when, and nothing else."""
    root = Path(fewbit.__file__).parent
    found = set()
    for file in (*root.glob("serve/**/*.py"), *root.glob("engine/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                if name in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow"):
                    found.add((file.relative_to(root).as_posix(), name))
    assert found == {
        ("serve/kserve/statistics.py", "time.time"),  # when the last inference was
        ("serve/openai/__init__.py", "time.time"),  # created
        ("serve/openai/shapes.py", "time.time"),  # created
        ("serve/tracing.py", "time.time_ns"),  # spans, whose lengths are measured otherwise
    }
