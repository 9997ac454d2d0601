"""The wheel as a user gets it: what is in it, and the main commands in an environment that has nothing else.

The environment is empty but for the wheel and its dependencies. Those, torch among them, are not downloaded again:
a ``.pth`` file lends the packages of the running environment, from which fewbit itself is hidden.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fewbit

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def bin_dir(built, tmp_path_factory) -> Path:
    """``bin`` of an environment with the wheel."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    (wheel,) = built.glob("*.whl")
    packages = next(home.glob("lib/python*/site-packages"))
    command = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "-q", "--no-deps", wheel]
    subprocess.run(command, check=True, capture_output=True)
    lent = packages / "lent"
    lent.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        # neither fewbit's editable install nor what only extras bring
        if not entry.name.lower().startswith(
            ("fewbit", "_editable", "__editable", "_fewbit", "openai", "transformers")
        ):
            (lent / entry.name).symlink_to(entry)
    (packages / "lent.pth").write_text("lent\n")
    return home / "bin"


def call(bin_dir: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FEWBIT_DEMO_MODEL")} | environment
    return subprocess.run(
        [bin_dir / "fewbit", *map(str, arguments)], env=variables, capture_output=True, text=True, check=False, cwd="/"
    )


def test_contents(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("compress/recipes/int4.yaml", "compress/calibration.txt.gz", "py.typed", "cli/__init__.py"):
        assert f"fewbit/{wanted}" in names
    assert not [n for n in names if n.startswith(("models/", "tests/")) or "storyteller" in n]
    assert wheel.stat().st_size < 2**20
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = [n.partition("/")[2] for n in archive.getnames()]
    for wanted in ("models/storyteller/model.safetensors", "tests/conftest.py", "Makefile", "LICENSE"):
        assert wanted in members


def test_the_main_commands(bin_dir, tmp_path):
    model, small = fewbit.demo_model(), tmp_path / "small"
    version = call(bin_dir, "--version")
    assert version.stdout == f"fewbit {fewbit.__version__}\n", version.stderr
    where = subprocess.run(
        [bin_dir / "python", "-c", "import fewbit; print(fewbit.__file__)"], capture_output=True, text=True, check=True
    )
    assert str(bin_dir.parent) in where.stdout
    assert "LlamaForCausalLM" in call(bin_dir, "inspect", model).stdout
    made = call(bin_dir, "compress", model, "--recipe", "int8", "-o", small)
    assert made.returncode == 0, made.stderr
    told = call(bin_dir, "run", small, "--prompt", "Once upon a time", "--raw", "--max-tokens", 8)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip()


def test_the_demonstration_says_what_it_lacks(bin_dir):
    done = call(bin_dir, "demo")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "models/storyteller" in done.stderr
    assert "FEWBIT_DEMO_MODEL" in done.stderr
    done = call(bin_dir, "demo", FEWBIT_DEMO_MODEL=str(fewbit.demo_model()))
    assert done.returncode == 2
    assert "fewbit[demo]" in done.stderr
