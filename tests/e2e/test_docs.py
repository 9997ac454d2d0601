"""What the documentation says is so: snippets run, generated parts are fresh, names and links exist."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewbit.demo import demo_model
from fewbit.errors import CheckpointError
from fewbit.ops.cpu.build import library

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "fewbit"
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*/*.md")))
CODE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
SAME_EVERYWHERE = ("fewbit inspect", "fewbit explain")
"""Commands of the README's session whose output depends on no machine."""


def snippets(page: Path, language: str) -> list[str]:
    return [body for kind, body in CODE.findall(page.read_text("utf8")) if kind == language]


@pytest.fixture(scope="module")
def storyteller() -> Path:
    try:
        return demo_model()
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so no snippet was run: {error}")


@pytest.fixture(scope="module")
def environment(storyteller) -> dict[str, str]:
    """As in a shell in which .venv is active; the bundled model is found from any folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"FEWBIT_DEMO_MODEL": str(storyteller), "PATH": path}


@pytest.fixture(scope="module")
def folder(storyteller, tmp_path_factory) -> Path:
    """Where the session runs: the model lies where the README has it."""
    made = tmp_path_factory.mktemp("session")
    (made / "models").mkdir()
    (made / "models" / "storyteller").symlink_to(storyteller)
    return made


def commands() -> list[tuple[str, str]]:
    """Each command of the README's session with what it printed."""
    (text,) = (t for t in snippets(ROOT / "README.md", "text") if t.startswith("$ "))
    found = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        count = 1
        while lines[count - 1].endswith("\\"):
            count += 1
        found.append(("\n".join(lines[:count]), "\n".join(lines[count:]).strip()))
    return found


def shell(line: str, folder: Path, environment: dict[str, str]) -> str:
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, check=False, **both)
    assert done.returncode == 0, f"{line}: {done.stdout}"
    return "\n".join(text.rstrip() for text in done.stdout.strip().splitlines())


@pytest.fixture(scope="module")
def small(folder, environment) -> Path:
    """The model that the session makes, by the session's own command."""
    (compress,) = (line for line, _ in commands() if line.startswith("fewbit compress"))
    shell(compress, folder, environment)
    return folder / "small"


# --- snippets ---------------------------------------------------------------------------------------------------------


def test_the_session_of_the_readme_has_it_all():
    words = [line.split()[1] for line, _ in commands() if line.startswith("fewbit")]
    assert words == ["compress", "inspect", "explain", "eval", "run", "serve"]
    assert sum(line.startswith("curl") for line, _ in commands()) == 2
    assert all(output for _, output in commands())


@pytest.mark.parametrize(("line", "printed"), commands(), ids=lambda text: text.split("\n")[0][:40])
def test_the_session_of_the_readme_runs(line, printed, small, folder, environment):
    if line.startswith(("fewbit compress", "fewbit serve", "curl")):
        return  # the fixture ran it, the test below does
    said = shell(line, folder, environment)
    if line.startswith("fewbit explain") and isinstance(why := library(), str):
        pytest.skip(f"NO CPU KERNELS, so explain says something else: {why}")
    if line.startswith(SAME_EVERYWHERE):
        assert said == printed, "run python tools/readme.py --capture"
    else:
        assert said


def test_the_server_of_the_readme_answers(small, folder, environment):
    if not shutil.which("curl"):
        pytest.skip("NO CURL, so the README's requests were not tried")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (serve,) = (line for line, _ in commands() if line.startswith("fewbit serve"))
    words = shlex.split(serve.replace("8000", str(port)))
    server = subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("serving small") for line in server.stderr)
        threading.Thread(target=deque, args=(server.stderr, 0), daemon=True).start()  # a full pipe would stop it
        for line, printed in commands():
            if line.startswith("curl"):
                answer = shell(line.replace("curl ", "curl -sSf ", 1).replace("8000", str(port)), folder, environment)
                assert re.findall(r'"(\w+)":', answer) == re.findall(r'"(\w+)":', printed)
        server.send_signal(signal.SIGTERM)
        assert server.wait(300) == 0
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("page", ["README.md", "docs/formats.md"])
def test_python_runs(page, small, folder, environment):
    """The snippets of a page, one after the other, in the folder of the session."""
    code = "\n".join(snippets(ROOT / page, "python"))
    assert "open_checkpoint" in code
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"README.md": "Once upon a time", "docs/formats.md": "compressed-tensors int4_g128"}[page] in done.stdout


def test_the_recipe_in_the_guide_is_a_recipe():
    from fewbit.compress.recipe import parse_recipe

    plain, measured, fast = (parse_recipe("guide", text) for text in snippets(ROOT / "docs" / "recipes.md", "yaml"))
    assert len(plain.rules) == 2
    assert plain.kv is not None
    assert measured.auto is not None
    assert measured.auto.bits == 5.0
    assert fast.auto is not None
    assert fast.auto.tokens_per_s == 300


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_the_pages_are_real(page):
    """Every command that a page names exists, and every option that it gives to one."""
    help_text = (ROOT / "docs" / "cli.md").read_text("utf8")
    sections = dict(re.findall(r"## fewbit (\w+(?: \w+)?)\n\n```text\n(.*?)```", help_text, re.DOTALL))
    text = re.sub(r"`?fewbit build`?[^.;\n]*", "", page.read_text("utf8"))  # planned
    for command, rest in re.findall(r"(?:^\$ |`)fewbit (?!-)(bench \w+|\w+)([^`\n]*)", text, re.MULTILINE):
        assert command in sections, f"fewbit {command}"
        for option in re.findall(r"--[\w-]+", rest):
            assert re.search(rf"{option}\b", sections[command]), f"{command} has no {option}"


def test_excerpts_are_what_the_files_say():
    """CONTRIBUTING shows pieces of real files, character for character but for the indentation."""

    def plain(text: str) -> str:
        return "\n".join(line.strip().removesuffix(",") for line in text.strip().splitlines())

    excerpts = snippets(ROOT / "CONTRIBUTING.md", "python")
    assert len(excerpts) == 5
    files = [plain(file.read_text("utf8")) for file in PACKAGE.rglob("*.py")]
    for excerpt in excerpts:
        assert any(plain(textwrap.dedent(excerpt)) in file for file in files), excerpt


# --- what is generated ------------------------------------------------------------------------------------------------


def test_generated_parts_are_fresh():
    if isinstance(why := library(), str):
        pytest.skip(f"NO CPU KERNELS, so the table of formats is another: {why}")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}: run python tools/readme.py"


def test_the_support_table_is_what_explain_prints(capsys):
    from fewbit import cli

    assert cli.run(["explain", "--device", "cpu"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = re.search(r"generated: support -->(.*?)<!-- end", (ROOT / "README.md").read_text("utf8"), re.DOTALL)[1]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.strip().splitlines()[2:]]
    assert cells
    assert all(row[:3] in printed for row in cells)


# --- names and links --------------------------------------------------------------------------------------------------


def test_every_name_of_the_tour_exists():
    named = re.findall(r"`([\w/]+\.py)(?::(\w+))?`", (ROOT / "docs" / "tour.md").read_text("utf8"))
    assert len(named) > 30
    for file, name in named:
        assert (PACKAGE / file).is_file(), file
        if name:
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            assert hasattr(importlib.import_module(f"fewbit.{module}"), name), f"{file}:{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_of_the_package_that_a_page_names_exists(page):
    """`room/file.py` and `room/file.py:name` in running text; what is planned says so on its line."""
    text = re.sub(r"```.*?```", "", page.read_text("utf8"), flags=re.DOTALL)
    for line in text.splitlines():
        for file, name in re.findall(r"`(?:src/fewbit/)?([a-z]\w*/[\w/]+\.py)(?::(\w+))?`", line):
            where = [root / file for root in (PACKAGE, PACKAGE.parent, ROOT) if (root / file).is_file()]
            example = file.endswith(("/x.py", "/NAME.py"))
            assert where or example or "planned" in line, f"{page.name}: {file}"
            if name and where:
                assert re.search(rf"\b{name}\b", where[0].read_text("utf8")), f"{page.name}: {file}:{name}"


def rooms() -> Iterator[tuple[str, set[str]]]:
    """Each room in the tree of architecture.md with the files and folders it lists."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf8")
    tree = re.search(r"^src/fewbit/ .*?^```", text, re.DOTALL | re.MULTILINE)[0]
    room, names = "", set[str]()
    for line in tree.splitlines()[1:-1]:
        start = re.match(r"  (\w+)/ ", line)
        if start or not line.startswith("   "):
            if room:
                yield room, names
            room, names = (start[1] if start else ""), set()
        listed = re.split(r"\s{2,}", (line[start.end() :] if start else line).strip())[0]
        names |= set(listed.split())
    if room:
        yield room, names


def test_the_rooms_of_the_plan_are_the_rooms_there_are():
    found = dict(rooms())
    assert found.keys() == {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    for room, names in found.items():
        here = [p for p in (PACKAGE / room).iterdir() if not p.name.startswith("__")]
        there = {p.stem for p in here if p.suffix == ".py"} | {f"{p.name}/" for p in here if p.is_dir()}
        assert names == there, room


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target.replace("\\", "")).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_know_no_machine(page):
    assert not re.search(r"/work/|/tmp/|/home/|\bshared/", page.read_text("utf8"))
