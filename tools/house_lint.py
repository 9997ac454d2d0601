"""The rules of this house that no off-the-shelf linter knows. Run by ``make check``; prints ``path:line: what``.

1. ``torch.cuda`` only where devices are somebody's business: the rest of the code takes a ``torch.device`` as it comes.
2. ``print`` only in the command line: stdout carries results, and a library has none.
3. An ``except`` that catches everything raises again, or says on its own line why not: ``# house: <reason>``.
4. No file over 400 lines: there is a noun hiding in it that wants a file of its own.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "fewbit"
CUDA_HOMES = ("ops/", "engine/", "model/load.py", "measure/offline.py", "measure/ceilings.py")
PRINT_HOMES = ("cli.py", "cli/")
MAX_LINES = 400
_EXCUSE = re.compile(r"#\s*house:\s*\S")


def findings(source: str, path: str) -> list[tuple[int, str]]:
    """(line, what is wrong) for the text of a file; `path` is relative to the package, with forward slashes."""
    lines = source.splitlines()
    found = []
    if len(lines) > MAX_LINES:
        found.append((MAX_LINES + 1, f"{len(lines)} lines, {MAX_LINES} at most: which noun is hiding in it?"))
    for node in ast.walk(ast.parse(source, path)):
        if not path.startswith(CUDA_HOMES) and _names_cuda(node):
            found.append((node.lineno, f"torch.cuda belongs into {', '.join(CUDA_HOMES)}"))
        if not path.startswith(PRINT_HOMES) and _is_print(node):
            found.append((node.lineno, f"print belongs into {', '.join(PRINT_HOMES)}"))
        if _swallows(node) and not _EXCUSE.search(lines[node.lineno - 1]):
            found.append((node.lineno, "catches everything and does not raise again; or say why: # house: <reason>"))
    return sorted(found)


def _names_cuda(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id="torch"), attr="cuda"):
            return True
        case ast.ImportFrom(module=str(module), names=names):
            return module.startswith("torch.cuda") or (module == "torch" and any(n.name == "cuda" for n in names))
        case ast.Import(names=names):
            return any(n.name.startswith("torch.cuda") for n in names)
    return False


def _is_print(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def _swallows(node: ast.AST) -> bool:
    return isinstance(node, ast.ExceptHandler) and _catches_all(node.type) and not _raises(node.body)


def _catches_all(caught: ast.expr | None) -> bool:
    match caught:
        case None | ast.Name(id="Exception" | "BaseException"):
            return True
        case ast.Tuple(elts=elements):
            return any(_catches_all(e) for e in elements)
    return False


def _raises(body: list[ast.stmt]) -> bool:
    """Whether a ``raise`` stands in `body` itself, not in a function that is only defined there."""
    return any(isinstance(node, ast.Raise) for statement in body for node in _walk_here(statement))


def _walk_here(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _walk_here(child)


def main() -> int:
    bad = 0
    for file in sorted(PACKAGE.rglob("*.py")):
        for line, what in findings(file.read_text("utf-8"), file.relative_to(PACKAGE).as_posix()):
            print(f"{file.relative_to(PACKAGE.parent.parent)}:{line}: {what}")
            bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
