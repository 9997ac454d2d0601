"""The wheel as a user gets it: what is in it, and the main commands in an environment that has nothing else.

The environment is made with the standard library's ``venv`` and gets the wheel without its extras. What the wheel asks
for (torch is gigabytes from some sources) is not downloaded again: the environment is lent the running one's copies of
just those packages and of what these ask for in turn. A dependency that pyproject.toml forgets is therefore missing
here too, as it would be at a user's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.metadata import parse_email
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fewbit.version import __version__
from helpers import make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def wanted(asked: list[str]) -> set[str]:
    """Names of the packages that these requirements need, and of what those need in turn."""
    found: set[str] = set()
    todo = [(Requirement(text), frozenset[str]()) for text in asked]
    while todo:
        requirement, extras = todo.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras or {""}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            inner = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # nothing that is needed here: it would be missing in the running environment too
        assert requirement.specifier.contains(distribution(name).version, prereleases=True), str(requirement)
        if name not in found or requirement.extras:
            found.add(name)
            todo += [(Requirement(text), frozenset(requirement.extras)) for text in inner]
    return found


@pytest.fixture(scope="module")
def bin_dir(built, tmp_path_factory) -> Path:
    """``bin`` of an environment with the wheel."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    (wheel,) = built.glob("*.whl")
    packages = next(home.glob("lib/python*/site-packages"))
    command = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "-q", "--no-deps", wheel]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        asked = parse_email(archive.read(name))[0]["requires_dist"]
    names = wanted(asked)
    assert {"torch", "tokenizers", "fastapi"} <= names
    assert not names & {"openai", "transformers", "pytest", "fewbit"}, "those are only in extras"
    installed = Path(sysconfig.get_paths()["purelib"])
    for package in names:
        for file in distribution(package).files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).exists() and (installed / top).exists():
                (packages / top).symlink_to(installed / top)
    return home / "bin"


def call(bin_dir: Path, *arguments: object, program: str = "fewbit", **environment: str):
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FEWBIT_DEMO_MODEL")} | environment
    return subprocess.run(
        [bin_dir / program, *map(str, arguments)], env=variables, capture_output=True, text=True, check=False, cwd="/"
    )


def result(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    recipes = {p.name for p in (ROOT / "src" / "fewbit" / "compress" / "recipes").glob("*.yaml")}
    assert recipes == {n.rpartition("/")[2] for n in names if n.startswith("fewbit/compress/recipes/")}
    page = {p.name for p in (ROOT / "src" / "fewbit" / "serve" / "page" / "static").iterdir()}
    assert page == {n.rpartition("/")[2] for n in names if n.startswith("fewbit/serve/page/static/")} != set()
    for name in ("fewbit/compress/calibration.txt.gz", "fewbit/py.typed", "fewbit/cli/__init__.py"):
        assert name in names
    assert any(n.endswith("dist-info/licenses/LICENSE") for n in names)
    assert {n.partition("/")[0] for n in names} == {"fewbit", f"fewbit-{__version__}.dist-info"}
    assert not [n for n in names if "storyteller" in n or "__pycache__" in n]
    assert wheel.stat().st_size < 1.25 * 2**20


def test_the_sdist(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    for name in (
        "models/storyteller/model.safetensors",
        "models/storyteller/tokenizer.json",
        "models/storyteller/heldout.txt.gz",
        "src/fewbit/compress/calibration.txt.gz",
        "tests/conftest.py",
        "tools/readme.py",
        "docs/tour.md",
        "deploy/Dockerfile",
        "pyproject.toml",
        "README.md",
        "Makefile",
        "LICENSE",
    ):
        assert name in names
    assert not [n for n in names if n.startswith((".venv", "demo-out", ".git/")) or "__pycache__" in n]


def test_the_main_commands(bin_dir, tmp_path):
    assert result(call(bin_dir, "--version")) == f"fewbit {__version__}\n"
    where = result(call(bin_dir, "-c", "import fewbit; print(fewbit.__file__)", program="python"))
    assert where.startswith(str(bin_dir.parent)), "not the checkout's"
    model, small = make_model(tmp_path / "tiny"), tmp_path / "small"
    assert "LlamaForCausalLM" in result(call(bin_dir, "inspect", model))
    report = json.loads(
        result(call(bin_dir, "compress", model, "--recipe", "fp8", "--length", 128, "-o", small, "--json"))
    )
    assert "shipped with fewbit" in report["calibration"]  # the text in the wheel
    found = json.loads(result(call(bin_dir, "inspect", small, "--json")))
    assert found["format"] == "compressed-tensors"
    told = result(call(bin_dir, "run", small, "--prompt", "Once upon a time", "--raw", "--max-tokens", 8))
    assert told.strip()
    assert "kernels on cpu" in result(call(bin_dir, "explain", "--device", "cpu"))
    assert not [line for line in result(call(bin_dir, "doctor")).splitlines() if line.startswith("FAIL")]


def test_the_demonstration_says_what_it_lacks(bin_dir, tmp_path):
    done = call(bin_dir, "demo")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "models/storyteller" in done.stderr
    assert "FEWBIT_DEMO_MODEL" in done.stderr
    done = call(bin_dir, "demo", FEWBIT_DEMO_MODEL=str(make_model(tmp_path / "tiny")))
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "fewbit[demo]" in done.stderr


def test_a_hub_id_says_which_command_would_fetch_it(bin_dir, tmp_path):
    """The tokenizers library brings the Hub's client; without a network one line says what to do."""
    done = call(bin_dir, "inspect", "someone/something", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "hf download someone/something" in done.stderr or "fewbit[hub]" in done.stderr
