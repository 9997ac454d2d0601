"""A headless Chromium, a server of two models that are not there, and visits, which must be quiet and stay at home."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "serve"))

from fake_engine import FakeEngine
from serve_names import models_of, write_model
from served import SAYS, SAYS_SMALL, WAIT_S, serving

from fewbit.serve import create_app
from fewbit.text import Tokenizer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def engines(tokenizer) -> dict[str, FakeEngine]:
    """Two models that agree on how to begin."""
    said = {"storyteller": SAYS, "storyteller-small": SAYS_SMALL}
    found = {name: FakeEngine(tokenizer.vocab_size, max_model_len=1024) for name in said}
    for name, engine in found.items():
        engine.says = tokenizer.encode(said[name], add_special_tokens=False)
    return found


@pytest.fixture
def serve(visit) -> Iterator[Callable]:
    """`serve(app)` gives the URL of an application that is served until the browser has left."""
    with ExitStack() as servers:
        yield lambda app: servers.enter_context(serving(app))
        visit.leave()


@pytest.fixture
def url(engines, tokenizer, serve) -> str:
    return serve(create_app(models_of(tokenizer, **engines)))


@pytest.fixture(scope="module")  # not longer: while it is there, no other event loop can run on this thread
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="NO BROWSER TESTS: pip install 'fewbit[test]'")
    if CHROMIUM is None:
        pytest.skip("NO BROWSER TESTS: there is no chromium here; install your system's")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, timeout=1000 * WAIT_S)
        yield found
        found.close()


@pytest.fixture
def visit(browser) -> Iterator[Callable]:
    """`visit(url)` opens the page; at the end nothing may have been complained about or asked of another server.

    `visit.expected` takes patterns of complaints that a test provokes; more arguments are the browser context's;
    `visit.leave()` closes what is open.
    """
    contexts, complaints, home = [], [], []

    def opened(url: str, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        contexts.append(context)
        home.append(url)
        context.set_default_timeout(1000 * WAIT_S)
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: r.url.startswith(tuple(home)) or complaints.append(f"elsewhere: {r.url}"))
        page.goto(url)
        return page

    def leave() -> None:
        while contexts:
            contexts.pop().close()

    opened.expected, opened.leave = [], leave
    yield opened
    leave()
    unforeseen = [c for c in complaints if not any(re.search(pattern, c) for pattern in opened.expected)]
    assert not unforeseen
