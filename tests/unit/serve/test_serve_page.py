"""The page's files: their types, their tags, and that they load nothing from elsewhere."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

STATIC = {f.name: f.read_text("utf-8") for f in files("fewbit.serve.page").joinpath("static").iterdir()}
TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}


def path_of(name):
    return "/" if name == "index.html" else f"/page/{name}"


@pytest.mark.parametrize("name", sorted(STATIC))
def test_each_file_as_it_is(ask, name):
    answer = ask(path_of(name))
    assert (answer.status_code, answer.text) == (200, STATIC[name])
    assert answer.headers["content-type"].split(";")[0] == TYPES[name.rpartition(".")[2]]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert ask(path_of(name), method="HEAD").headers["etag"] == answer.headers["etag"]


def test_a_file_that_is_known_is_not_sent_again(ask):
    tag = ask("/").headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = ask("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert ask("/", headers={"If-None-Match": '"other"'}).status_code == 200
    assert ask("/").headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/page/none.js", "/page/index.html", "/page/..%2f__init__.py", "/page/", "/page"])
def test_nothing_else_is_there(ask, path):
    assert ask(path).status_code == 404


def test_what_the_files_name_is_there_and_nowhere_else():
    for name, text in STATIC.items():
        named = set(re.findall(r'(?:src|href)="([^"#]+)"|from "\./([^"]+)"', text))
        assert {a.removeprefix("page/") or b for a, b in named} <= STATIC.keys(), name
        elsewhere = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.\w+[^\"'\s]*", text)) - {"http://www.w3.org/2000/svg"}
        assert not elsewhere, (name, elsewhere)
        assert not re.search(r"@import|url\(|innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", STATIC["index.html"])


def test_no_file_is_too_long_to_read():
    for name, text in STATIC.items():
        lines = text.splitlines()
        assert len(lines) <= 400, name
        assert max(map(len, lines)) <= 120, (name, max(lines, key=len))
