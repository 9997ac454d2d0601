"""Programs to complete, right if their tests pass: rows of prompt and test (HumanEval), or Python files with doctests.

Of a file the body of one function is left out, behind its docstring, whose examples are the tests.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewbit.errors import RecipeError
from fewbit.measure.rows import rows
from fewbit.measure.tasks.task import Item, Task
from fewbit.text import Tokenizer

STOP = ("\ndef ", "\nclass ", "\n@", "\n#", "\nif ", "\nprint(", "\nassert ")
"""Where the body of a function ends."""
_TESTS = """
import doctest as _doctest
_runner = _doctest.DocTestRunner(verbose=False)
for _test in _doctest.DocTestFinder(recurse=False).find({name}, {name!r}, module=False, globs=globals()):
    _runner.run(_test, out=lambda text: None)
assert _runner.tries and not _runner.failures, f"{{_runner.failures}} of {{_runner.tries}} examples failed"
"""

Maker = Callable[[Tokenizer, int], list[Item]]


def programs(folder: Path) -> tuple[Task, Maker | None]:
    """The task that a folder holds, and what makes its questions if they are not its rows.

    Args:
        folder: Holds human_eval.jsonl or python_test.jsonl, or one of them gzipped.

    Raises:
        RecipeError: It holds none of them.
    """
    for name in ("human_eval", "python_test"):
        for file in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
            if file.is_file():
                task = Task(name="code", kind="code", file=file, delimiter="", stop=STOP, max_tokens=384)
                return task, None if name == "human_eval" else lambda tokenizer, length, of=file: _completions(of)
    raise RecipeError(f"{folder}: no human_eval.jsonl or python_test.jsonl (.gz), which --tasks code reads")


def completion(row: Mapping[str, Any], index: int) -> Item | None:
    """The question that a Python file makes; None: it has no function with examples, or imports what may not be there.

    Args:
        row: With a `text`, the file.
        index: Of the row.
    """
    text = row.get("text")
    if not isinstance(text, str):
        raise RecipeError(f"row {index + 1}: expected an object with a text, a Python file")
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    if not _imported(tree) <= sys.stdlib_module_names:
        return None
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list or len(node.body) < 2:
            continue
        if ">>>" not in (ast.get_docstring(node) or ""):
            continue
        lines = text.splitlines(keepends=True)
        begins, ends = node.body[0].end_lineno, node.end_lineno
        assert begins is not None
        assert ends is not None
        rest = "".join(lines[ends:]) + _TESTS.format(name=node.name)
        solution = "".join(lines[begins:ends])
        return Item(index, ("".join(lines[:begins]),), (rest,), 0, None, solution)
    return None


def _completions(file: Path) -> list[Item]:
    found = [completion(row, index) for index, (_, row) in enumerate(rows(file))]
    kept = [item for item in found if item is not None]
    if not kept:
        raise RecipeError(f"{file}: no row is a Python file with a function whose docstring has examples (>>>)")
    return kept


def _imported(tree: ast.Module) -> set[str]:
    """Names of the packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else (node.module or "").partition(".")[0])
    return found - {"__future__"}
