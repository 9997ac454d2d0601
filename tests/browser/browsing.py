"""What a reader of the page does and sees."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from served import WAIT_S

expect = pytest.importorskip("playwright.sync_api", reason="NO BROWSER TESTS: pip install 'fewbit[test]'").expect
expect.set_options(timeout=1000 * WAIT_S)


def until(true: Callable[[], bool]) -> None:
    """Wait for what happens on the server's side."""
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def ask(page, text, wait=True):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    if wait:
        ended(page)


def ended(page):
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".answer.running")).to_have_count(0)


def figure(page, name, answer=0):
    return page.locator(".answer").nth(answer).locator(f"[data-figure={name}] dd")


def texts(page):
    return page.locator(".answer .text").all_text_contents()


def prompts(engine, tokenizer):
    """What the engine was asked, as text."""
    return [tokenizer.decode(list(request.prompt)) for request in engine.seen]
