"""Faults of processes, really made: an engine killed or stopped, a server killed, signals; models of a folder."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from real_server import (
    COMPLETION,
    FLAT,
    GOLDEN,
    START_S,
    STORYTELLER,
    WAIT_S,
    Answer,
    Server,
    all_ended,
    ended,
    until,
)

pytestmark = pytest.mark.slow
WITHIN_S = 60.0
"""The server tells within seconds; a machine that has others to serve may make more of them."""


class Asking(threading.Thread):
    """A long request, whole or streamed, on a thread."""

    def __init__(self, server: Server, stream: bool, tokens: int = FLAT["max_tokens"]) -> None:
        super().__init__(daemon=True)
        self._server, self._body = server, FLAT | {"stream": stream, "max_tokens": tokens}
        self.answer = Answer(0)
        self.start()

    def run(self) -> None:
        self.answer = self._server.ask(COMPLETION, self._body)

    def ended(self) -> Answer:
        self.join(WAIT_S)
        assert not self.is_alive()
        return self.answer


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_an_engine_that_is_killed_or_stopped(sign):
    server = Server("--drain", "2")
    try:
        engine = server.engine
        whole, streamed = Asking(server, False), Asking(server, True)
        server.quiet_but(2)
        began = time.monotonic()
        engine.send_signal(sign)
        if sign == signal.SIGSTOP:
            until(lambda: engine.status() == psutil.STATUS_STOPPED)
        until(lambda: server.ask("/health").status == 503, what="503 of /health")
        refused = server.ask(COMPLETION, GOLDEN)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert server.ask("/v2/health/live").status == 200
        told = whole.ended()
        assert told.status == 503, told
        assert "engine" in told.message
        events = streamed.ended().body.decode().split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert "engine" in json.loads(events[-3].removeprefix("data: "))["error"]["message"]
        assert time.monotonic() - began < WITHIN_S
        until(lambda: server.ask("/health").status == 200, START_S, "200 of /health")
        assert ended(engine)
        assert server.engine.pid != engine.pid
        assert server.metric("engine_restarts_total") >= 1
        server.unharmed()
        server.quiet()
        assert any("starting another" in line for line in server.log)
        server.close()
        assert server.process.returncode == 0
    finally:
        server.kill()


@pytest.mark.parametrize("victim", ["while serving", "while loading"])
def test_a_server_that_is_killed_leaves_nobody_behind(victim, tmp_path):
    if victim == "while serving":
        server = Server()
        root = server.process
    else:
        root = subprocess.Popen([sys.executable, "-m", "fewbit.cli", "serve", str(STORYTELLER), "--port", "0", "-q"])
    try:
        until(lambda: psutil.Process(root.pid).children(recursive=True), START_S, "a child")
        children = psutil.Process(root.pid).children(recursive=True)
    finally:
        root.kill()
        root.wait(WAIT_S)
    assert children
    all_ended(children)


def test_as_process_1_of_a_container():
    unshare = ("unshare", "--fork", "--pid", "--kill-child")
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("NO NAMESPACES, so the server was not tried as process 1")
    server = Server("--drain", "600", wrap=unshare)
    try:
        (first,) = psutil.Process(server.process.pid).children()
        asking = Asking(server, False, tokens=600)
        server.quiet_but(1)
        first.terminate()
        until(lambda: server.ask("/health").status == 503, what="503 of /health")
        assert "shutting down" in server.ask(COMPLETION, GOLDEN).message
        assert asking.ended().status == 200  # what ran has finished
        assert server.process.wait(WAIT_S) == 0
    finally:
        server.kill()


def test_a_model_that_cannot_be_brought_back_ends_the_server(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(STORYTELLER, model)
    server = Server(model=model)
    try:
        (model / "model.safetensors").unlink()
        server.engine.kill()
        assert server.process.wait(START_S) == 2  # five starts in vain, and 15 seconds between them
        until(lambda: "cannot be brought back: the engine process was ended by SIGKILL" in server.log[-1])
    finally:
        server.kill()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder with two models, one of them as NIM has it, and things that are none."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(STORYTELLER, root / "plain")
    command = [sys.executable, "-m", "fewbit.cli", "export", str(STORYTELLER), "--to", "trtllm", "--layout", "nim"]
    subprocess.run([*command, "-o", str(root / "nim"), "-q"], check=True)
    assert (root / "nim" / "trtllm_ckpt" / "rank0.safetensors").is_file()
    shutil.copytree(STORYTELLER, root / ".hidden")
    (root / "notes").mkdir()
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    (root / "outside").symlink_to(STORYTELLER)
    return root


def test_models_of_a_folder(shelf):
    server = Server("--model-dir", str(shelf), "--max-loaded", "1", "--drain", "5", "--model-control", "on-demand",
                    "--preload", "plain", model=None)  # fmt: skip
    try:
        names = [card["id"] for card in server.ask("/v1/models").json["data"]]
        assert names == ["plain", "broken", "nim"]
        log = "".join(server.log)
        for name in (".hidden", "notes", "outside"):
            assert f"{shelf.resolve() / name} is not served" in log
        first = server.engine.pid
        plain = GOLDEN | {"model": "plain"}
        said = server.ask(COMPLETION, plain).json["choices"][0]["text"]
        assert server.engine.pid == first  # it was loaded at once
        other = server.ask(COMPLETION, GOLDEN | {"model": "nim"})
        assert other.status == 200, other
        assert server.engine.pid != first  # one at a time
        assert not psutil.pid_exists(first)
        assert server.ask(COMPLETION, plain).json["choices"][0]["text"] == said
        broken = server.ask(COMPLETION, GOLDEN | {"model": "broken"})
        assert broken.status == 503
        assert "the model 'broken' could not be loaded: " in broken.message
        assert server.ask("/health").status == 200  # nobody depends on it
        assert server.ask(COMPLETION, plain).status == 200
        for name in ("../plain", "/etc", str(shelf / "plain"), ".hidden", "outside", "plain/", "PLAIN"):
            answer = server.ask(COMPLETION, GOLDEN | {"model": name})
            assert answer.status == 404, (name, answer)
        shutil.copytree(STORYTELLER, shelf / "new")
        until(lambda: '"new"' in server.ask("/v1/models").body.decode(), what="the new folder")
        assert server.ask(COMPLETION, GOLDEN | {"model": "new"}).json["choices"][0]["text"] == said
        server.close()
        assert server.process.returncode == 0
    finally:
        server.kill()


def test_a_budget_of_memory(shelf):
    plan = json.loads(
        subprocess.run(
            [sys.executable, "-m", "fewbit.cli", "plan", str(shelf / "plain"), "--json"],
            check=True,
            capture_output=True,
        ).stdout
    )
    one = (512 << 20) + plan["weights"] + plan["workspace"]
    budget = f"{1.9 * one / 2**30:.3f}"  # with a quarter for K and V: room for one, not for two
    server = Server(
        "--model-dir", str(shelf), "--memory-budget", budget, "--max-batch", "2", "--preload", "nim", model=None
    )
    try:
        first = server.engine
        assert server.ask(COMPLETION, GOLDEN | {"model": "plain"}).status == 200
        assert not psutil.pid_exists(first.pid)
        held = server.engine.memory_info().rss
        assert held < float(budget) * 2**30, f"{held / 2**30:.2f} GiB of {budget}"
        server.close()
    finally:
        server.kill()
    server = subprocess.run(
        [sys.executable, "-m", "fewbit.cli", "serve", "--model-dir", str(shelf), "--memory-budget", "0.1", "--preload",
         "plain", "--port", "0"], capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    assert server.returncode == 2
    assert "all models together may take 0.10: raise --memory-budget" in server.stderr
