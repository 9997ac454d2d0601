"""The page without a mouse, without good eyes, in the dark, on a telephone."""

from __future__ import annotations

import pytest
from browsing import ask, ended, expect, texts

pytestmark = pytest.mark.slow

CONTRAST = """
() => {
  // The page's colors are opaque or transparent; the one gradient ends in the page's own.
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = channels(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return [r, g, b];
    }
    throw new Error("the page has no background");
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim());
    const field = element.matches("input:not([type=radio]), textarea, select");
    if (!(own || field) || !element.checkVisibility() || element.closest(":disabled, .unseen, .skip")) continue;
    const style = getComputedStyle(element);
    const [light, dark] = [channels(style.color).slice(0, 3), behind(element)].map(luminance).sort((a, b) => b - a);
    found.push([(light + 0.05) / (dark + 0.05), `${element.tagName}.${element.className}#${element.id}`]);
  }
  return found;
}
"""
STOPS = """
() => {
  const seen = (style) => style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  const at = document.activeElement;
  const drawn = [at, at.closest(".switch")].filter(Boolean).some((e) => seen(getComputedStyle(e)));
  return [at.id || at.value || at.textContent.trim(), at.matches(".skip") || drawn];
}
"""


def fill(page):
    """A page with everything on it: answers, marks, a refusal, the fields for the key."""
    page.select_option("#second", "storyteller-small")
    ask(page, "Count!")
    page.select_option("#second", "")
    page.fill("#temperature", "hot")
    ask(page, "Count!")
    page.fill("#temperature", "")
    page.click("#key-toggle")


def test_without_a_mouse(visit, url, engines):
    """From the first key to an answer, and every stop on the way can be seen."""
    page = visit(url)
    expect(page.locator(".engine")).to_have_count(2)
    assert page.evaluate("document.body.firstElementChild.matches('a.skip')"), "the first stop"
    page.focus(".skip")
    expect(page.locator(".skip")).to_be_in_viewport()
    stops = []
    while not stops or stops[-1] != "send":
        page.keyboard.press("Tab")
        name, seen = page.evaluate(STOPS)
        assert seen, f"the focus on {name} does not show"
        stops.append(name)
        if name == "prompt":
            page.keyboard.type("Count!")
        assert len(stops) < 40
    order = ["model", "second", "chat", "key-toggle", "system", "temperature", "seed", "stop", "prompt", "send"]
    assert [stop for stop in stops if stop in order] == order
    page.keyboard.press("Enter")
    ended(page)
    assert len(texts(page)) == 1
    page.focus(".skip")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#prompt")).to_have_value("One\ntwo")
    page.keyboard.press("Enter")
    ended(page)
    assert page.locator(".prompt").last.text_content() == "One\ntwo"
    page.focus("input[value=chat]")
    page.keyboard.press("ArrowRight")
    expect(page.locator("input[value=text]")).to_be_checked()
    page.focus("#parameters summary")
    page.keyboard.press("Enter")
    expect(page.locator("#system")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, url, scheme):
    page = visit(url, color_scheme=scheme)
    visit.expected.append("400")
    fill(page)
    found = page.evaluate(CONTRAST)
    assert len(found) > 60
    assert {f"{ratio:.2f} {where}" for ratio, where in found if ratio < 4.5} == set()
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 600) == (scheme == "light")


@pytest.mark.parametrize("width", [320, 360, 700, 1000])
def test_no_window_is_too_narrow(visit, url, engines, tokenizer, width):
    engines["storyteller"].says = tokenizer.encode("w" * 300, add_special_tokens=False)
    page = visit(url, viewport={"width": width, "height": 640})
    visit.expected.append("400")
    folded = page.evaluate("[engine.open, parameters.open]")
    assert folded == [width > 960] * 2
    for step in (lambda: None, lambda: page.evaluate("engine.open = parameters.open = true"), lambda: fill(page)):
        step()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            "[...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && !e.closest('.unseen, .skip')"
            " && (e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1))"
            ".map((e) => e.outerHTML.slice(0, 80))"
        )
        assert outside == []
    page.locator("#prompt").scroll_into_view_if_needed()
    expect(page.locator("#send")).to_be_in_viewport()


def test_everything_has_a_name(visit, url, engines):
    """As a screen reader gets it: what can be used has a name and a role, ids are there once, landmarks are."""
    page = visit(url)
    visit.expected.append("400")
    fill(page)
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in tree if not node["ignored"]]
    usable = {
        "button",
        "textbox",
        "combobox",
        "radio",
        "link",
        "meter",
        "image",
        "article",
        "list",
        "DisclosureTriangle",
    }
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node["ignored"] and node["role"]["value"] in usable and not node.get("name", {}).get("value", "").strip()
    ]
    assert nameless == []
    for role in ("banner", "complementary", "main"):
        assert roles.count(role) == 1, role
    assert {"status", "alert"} & set(roles)
    assert page.locator("h1").count() == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("document.documentElement.lang") == "en"
    status = page.locator("#status")
    assert (status.get_attribute("aria-live"), status.get_attribute("role")) == ("polite", "status")
    assert page.locator("#turns [aria-live]").count() == 0, "a reader is not told every token"


def test_nothing_moves_for_who_asked_for_that(visit, url, engines):
    engines["storyteller"].hold_after = 4
    for motion, animation in (("no-preference", "breathe"), ("reduce", "none")):
        page = visit(url, reduced_motion=motion)
        ask(page, "Count!", wait=False)
        cursor = page.locator(".answer.running .text")
        expect(cursor).to_be_visible()
        assert cursor.evaluate("e => getComputedStyle(e, '::after').animationName") == animation
        page.keyboard.press("Escape")
        ended(page)
