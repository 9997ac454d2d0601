"""Each rule of tools/house_lint.py catches a bad sample, and lets a good one pass."""

import importlib.util
from pathlib import Path

import pytest

_FILE = Path(__file__).parents[2] / "tools" / "house_lint.py"
_SPEC = importlib.util.spec_from_file_location("house_lint", _FILE)
house_lint = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(house_lint)


def lines(source, path="spec/decoder.py"):
    return [line for line, _ in house_lint.findings(source, path)]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nx = torch.cuda.is_available()",
        "import torch\nfrom torch import cuda",
        "import torch\nimport torch.cuda",
        "import torch\nfrom torch.cuda import graphs",
    ],
)
def test_cuda_only_where_devices_are_looked_after(source):
    assert lines(source) == [2]
    for home in ("ops/device.py", "engine/graphs.py", "model/load.py"):
        assert lines(source, home) == []
    assert lines(source, "model/decoder.py") == [2]


def test_print_only_in_the_command_line():
    assert lines("def f():\n    print('hello')") == [2]
    assert lines("def f():\n    print('hello')", "cli.py") == []
    assert lines("def f():\n    print('hello')", "cli/run.py") == []
    assert lines("def f(console):\n    console.print('hello')") == []


@pytest.mark.parametrize("caught", ["", " Exception", " BaseException", " (ValueError, Exception)", " Exception as e"])
def test_catching_everything_raises_again_or_gives_a_reason(caught):
    sample = "try:\n    work()\nexcept{}:{}\n    {}\n"
    assert lines(sample.format(caught, "", "pass")) == [3]
    assert lines(sample.format(caught, "", "raise")) == []
    assert lines(sample.format(caught, "", "raise RuntimeError from None")) == []
    assert lines(sample.format(caught, "  # house: the loop must go on", "pass")) == []
    assert lines(sample.format(caught, "  # house:", "pass")) == [3]
    assert lines(sample.format(caught, "  # noqa", "pass")) == [3]


def test_a_raise_in_a_function_that_is_only_defined_there_does_not_count():
    assert lines("try:\n    work()\nexcept Exception:\n    def f():\n        raise\n") == [3]


def test_catching_something_in_particular_is_fine():
    assert lines("try:\n    work()\nexcept (ValueError, KeyError):\n    pass\n") == []


def test_files_stay_short():
    assert lines("x = 1\n" * 400) == []
    assert lines("x = 1\n" * 401) == [401]


def test_the_report_names_file_and_line(tmp_path, monkeypatch, capsys):
    package = tmp_path / "src" / "fewbit"
    package.mkdir(parents=True)
    (package / "bad.py").write_text("\nprint(1)\n")
    monkeypatch.setattr(house_lint, "PACKAGE", package)
    assert house_lint.main() == 1
    assert capsys.readouterr().out.startswith("src/fewbit/bad.py:2: print belongs into cli.py")
    (package / "bad.py").unlink()
    assert house_lint.main() == 0
