"""Programs that a model wrote: how they are run, what stops them, and which questions files make."""

from __future__ import annotations

import json
import sys

import pytest

from fewbit.errors import RecipeError
from fewbit.measure.tasks import sandbox, suite
from fewbit.measure.tasks.programs import completion, programs
from fewbit.measure.tasks.sandbox import Limits, fences, missing, namespaces, run_program
from fewbit.measure.tasks.suite import suite_of

FILE = '''"""Sums."""
import math


def half(number: int) -> int:
    """
    >>> half(8), half(9)
    (4, 4)
    """
    return rounded(number / 2)


def rounded(number: float) -> int:
    return math.floor(number)


if __name__ == "__main__":
    raise SystemExit(input())
'''


def test_a_program_passes_only_at_its_end():
    assert run_program("import math\nassert math.floor(2.5) == 2").finished
    assert run_program("print('no line end', end='')").finished
    for source, reason in (
        ("assert 1 == 2", "AssertionError"),
        ("raise SystemExit(0)", "left before its end"),
        ("import os\nos._exit(0)", "left before its end"),
        ("def f(:", "SyntaxError"),
        ("input()", "EOFError"),
    ):
        ran = run_program(source)
        assert not ran.finished
        assert reason in ran.reason


def test_a_program_has_limits():
    small = Limits(cpu_s=4, memory=256 << 20, file=1 << 16)
    assert "exit status" in run_program("while True: pass", small).reason
    assert "MemoryError" in run_program("x = bytearray(1 << 30)", small).reason
    assert not run_program("open('big', 'wb').write(bytes(1 << 20))", small).finished
    assert run_program("open('small', 'wb').write(bytes(1 << 12))", small).finished
    assert run_program("import time\ntime.sleep(60)", Limits(wall_s=0.5)).reason == "stopped after 0.5 s"


def test_a_program_sees_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    assert run_program("import os\nassert 'secret' not in os.environ.values(), os.environ").finished
    assert "No module named 'fewbit'" in run_program("import fewbit").reason


def test_a_program_does_with_its_folder_what_it_likes(monkeypatch):
    monkeypatch.setattr(sandbox, "fences", lambda: False)  # behind one the folder itself cannot be removed
    gone = "import os, shutil\nshutil.rmtree(os.getcwd())"
    assert run_program(gone).finished
    for made in ("os.mkfifo('.said')", "os.symlink('/dev/zero', '.said')", "os.mkdir('.said'); os.chmod('.', 0)"):
        assert run_program(f"import os\n{made}").finished
    assert run_program(f"{gone}\nraise SystemExit('x' * 9000)").reason.startswith("exit status 1: xxx")


def test_the_word_stands_in_no_file_of_the_program():
    found = run_program("raise SystemExit(open(__file__).read())")
    assert found.reason == "exit status 1: raise SystemExit(open(__file__).read())"


def test_a_program_changes_no_files_of_ours(tmp_path):
    if not fences():
        pytest.skip("NO LANDLOCK: this kernel cannot keep programs from changing other files")
    (kept := tmp_path / "kept").write_text("ours")
    for change in (
        "open({!r}, 'w')", "open({!r}, 'a')", "os.remove({!r})", "os.truncate({!r}, 0)", "os.rename({!r}, 'mine')",
        "os.mkdir({!r} + 's')", "os.symlink('x', {!r} + 's')",
    ):  # fmt: skip
        assert "PermissionError" in run_program("import os\n" + change.format(str(kept))).reason, change
    assert kept.read_text() == "ours"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    own = "import os\nos.mkdir('a')\nopen('a/b', 'w').write('c')\nos.rename('a/b', 'd')\nos.rmdir('a')\nos.remove('d')"
    assert run_program(f"{own}\nopen('/dev/null', 'w').write('x')").finished


def test_a_program_may_not_fork_without_limit():
    asked = "import resource\nassert resource.getrlimit(resource.RLIMIT_NPROC) == (7, 7)"
    assert run_program(asked, Limits(processes=7)).finished


def test_programs_are_refused_where_nothing_holds_them(tmp_path, monkeypatch):
    (tmp_path / "human_eval.jsonl").write_text('{"prompt": "a = 1", "test": ""}')
    monkeypatch.setattr(suite, "missing", lambda: "a program would reach the network")
    with pytest.raises(RecipeError, match="reach the network; where that may be, give --allow-unconfined-code"):
        suite_of(["code"], tmp_path, allow_code=True)
    assert suite_of(["code"], tmp_path, allow_code=True, allow_unconfined=True).entries


def test_a_program_has_no_network():
    if not namespaces():
        pytest.skip("NO NAMESPACES: this machine lets no user make them, so programs have a network")
    source = "import socket\nsocket.create_connection(('127.0.0.1', {}), 5)"
    with __import__("socket").socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "unreachable" in run_program(source.format(taken.getsockname()[1])).reason


def test_the_body_of_a_function_is_left_out_and_its_examples_are_the_tests():
    item = completion({"text": FILE}, 3)
    assert item.index == 3
    assert item.contexts[0].endswith('    (4, 4)\n    """\n')
    assert item.thought == "    return rounded(number / 2)\n"
    tests = item.answers[0]
    assert run_program(item.contexts[0] + item.thought + tests).finished
    for wrong in ("    return 5\n", "    return round(number / 2 + 1)\n", "    pass\n"):
        assert "1 of 1 examples failed" in run_program(item.contexts[0] + wrong + tests).reason
    assert completion({"text": FILE.replace(">>>", "")}, 0) is None
    assert completion({"text": FILE.replace("math", "numpy")}, 0) is None
    assert completion({"text": "def f("}, 0) is None


def test_rows_of_prompts_and_tests(tmp_path):
    row = {
        "prompt": "def twice(n):\n",
        "test": "def check(candidate):\n    assert candidate(4) == 8",
        "entry_point": "twice",
    }
    (tmp_path / "human_eval.jsonl").write_text(json.dumps(row))
    task, make = programs(tmp_path)
    assert make is None
    (item,) = task.items()
    assert run_program(f"{item.contexts[0]}    return 2 * n\n{item.answers[0]}").finished
    assert not run_program(f"{item.contexts[0]}    return n\n{item.answers[0]}").finished
    with pytest.raises(RecipeError, match="give --allow-code-execution"):
        suite_of(["code"], tmp_path)
    allowed = suite_of(["code"], tmp_path, allow_code=True, allow_unconfined=bool(missing()))
    assert allowed.entries[0].name == "code"
    with pytest.raises(RecipeError, match=r"no human_eval.jsonl or python_test.jsonl"):
        programs(tmp_path / "elsewhere")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_files_of_the_shared_data_pass_their_own_tests(shared_data):
    _, make = programs(shared_data / "code")
    items = make(None, 0)
    assert len(items) > 40
    for item in items:
        ran = run_program(item.contexts[0] + item.thought + item.answers[0])
        assert ran.finished, (item.index, ran.reason)
        assert not run_program(f"{item.contexts[0]}    return None\n{item.answers[0]}").finished
