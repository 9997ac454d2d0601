"""What the documentation says is so: snippets run, generated parts are fresh, names and links exist."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fewbit

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*/*.md")))
CODE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def snippets(page: Path, language: str) -> list[str]:
    return [body for kind, body in CODE.findall(page.read_text("utf8")) if kind == language]


def test_the_python_of_the_readme_runs(tmp_path):
    code = "\n".join(snippets(ROOT / "README.md", "python"))
    assert "open_checkpoint" in code
    environment = os.environ | {"FEWBIT_DEMO_MODEL": str(fewbit.demo_model())}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Once upon a time" in done.stdout


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "serving.md"], ids=lambda p: p.name)
def test_commands_in_the_pages_are_real(page):
    """Every option that a page's session gives to a command exists."""
    help_text = (ROOT / "docs" / "cli.md").read_text("utf8")
    sections = dict(re.findall(r"## fewbit (\w+)\n\n```text\n(.*?)```", help_text, re.DOTALL))
    calls = re.findall(r"\$ fewbit (\w+)([^\n]*)", page.read_text("utf8"))
    for command, rest in calls:
        assert command in sections
        for option in re.findall(r"--[\w-]+", rest):
            assert re.search(rf"{option}\b", sections[command]), f"{command} has no {option}"
    assert calls or page.name != "README.md"


def test_the_recipe_in_the_guide_is_a_recipe():
    from fewbit.compress.recipe import parse_recipe

    (text,) = snippets(ROOT / "docs" / "recipes.md", "yaml")
    recipe = parse_recipe("guide", text)
    assert len(recipe.rules) == 2
    assert recipe.kv is not None


def test_generated_parts_are_fresh():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}: run python tools/readme.py"


def test_every_name_of_the_tour_exists():
    named = re.findall(r"`([\w/]+\.py)(?::(\w+))?`", (ROOT / "docs" / "tour.md").read_text("utf8"))
    assert len(named) > 30
    for file, name in named:
        assert (ROOT / "src" / "fewbit" / file).is_file(), file
        if name:
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            assert hasattr(importlib.import_module(f"fewbit.{module}"), name), f"{file}:{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target.replace("\\", "")).exists(), f"{page.name} links to {target}"
