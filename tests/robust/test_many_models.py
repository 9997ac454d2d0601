"""Models that come and go: nothing is left of those that are gone, and each says what it said the first time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import pytest
from real_server import COMPLETION, GOLDEN, STORYTELLER, Server, engines, post, until

LOADS = int(os.environ.get("FEWBIT_LOADS", "4"))
"""How often each model is loaded; 1000 for a long look."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 60 * LOADS)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A server of two models, one of them loaded at a time; clients may load and unload."""
    folder: Path = tmp_path_factory.mktemp("served")
    root = folder / "models"
    for name in ("one", "two"):
        shutil.copytree(STORYTELLER, root / name)
    (folder / "elsewhere").symlink_to(STORYTELLER)
    (root / "outside").symlink_to("/etc")
    options = ("--model-dir", str(root), "--repository-control", "--max-loaded", "1", "--drain", "2")
    running = Server(*options, model=None, golden=GOLDEN | {"model": "one"})
    yield running
    running.close()


def test_loading_and_unloading_leaves_nothing_behind(two: Server):
    sizes, files = [], 0
    for i in range(LOADS):
        for name in ("one", "two"):
            assert two.ask(f"/v2/repository/models/{name}/load", {}).status == 200
            answer = two.ask(COMPLETION, GOLDEN | {"model": name})
            assert answer.json["choices"] == two.golden, (i, name)
            assert len(engines(two.process.pid)) == 1
            assert two.ask(f"/v2/repository/models/{name}/unload", {}).status == 200
            until(lambda: not engines(two.process.pid), what="the end of the engine")
        sizes.append(psutil.Process(two.process.pid).memory_info().rss)
        files = files or two.files()
    assert sizes[-1] < 1.01 * sizes[len(sizes) // 2] + (4 << 20), sizes
    two.files_at_most(files)


def test_a_model_that_is_in_use_is_not_taken_away(two: Server):
    """Another one is asked for while the first answers: there is room for one, so somebody waits or is told."""
    with two.connect() as s:
        body = GOLDEN | {"model": "one", "max_tokens": 200, "stream": True}
        s.sendall(post(COMPLETION, body, "Connection: close"))
        first = s.recv(4096)
        other = two.ask(COMPLETION, GOLDEN | {"model": "two"})
        assert other.status in (200, 429, 503), other
        rest = first + b"".join(iter(lambda: s.recv(65536), b""))
    assert b"[DONE]" in rest
    assert b'"error"' not in rest


@pytest.mark.parametrize(
    "name", ["gone", "outside", "../elsewhere", "..%2felsewhere", "/etc", "one/../two", "one%00", "."]
)
def test_names_that_lead_elsewhere(two: Server, name: str):
    for path, body in (
        (f"/v2/repository/models/{name}/load", {}),
        (f"/v2/models/{name}/generate", {"text_input": "x"}),
        (COMPLETION, GOLDEN | {"model": name.replace("%2f", "/").replace("%00", "\0")}),
    ):
        answer = two.ask(path, body)
        assert 400 <= answer.status < 500, (path, answer)
        assert len(answer.body) < 500
    two.unharmed()
