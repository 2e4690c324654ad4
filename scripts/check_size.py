"""Fails when a file, a function or the whole package has outgrown its limit.

Small is a feature: the package is to be read in a day. Raising PACKAGE_LINES is a decision of its
own and takes a commit that says why.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 60
PACKAGE_LINES = 30_000
"""Lines of all files below src/triptych."""

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "triptych"
FOLDERS = (PACKAGE, *(ROOT / name for name in ("tests", "scripts", "benchmarks", "examples")))


def main() -> int:
    complaints = [text for folder in FOLDERS for text in check_folder(folder)]
    total = sum(count_lines(path) for path in PACKAGE.rglob("*.py"))
    if total > PACKAGE_LINES:
        complaints.append(f"src/triptych has {total} lines, the ceiling is {PACKAGE_LINES}")
    for complaint in complaints:
        print(complaint)
    if not complaints:
        print(f"Sizes are fine: the package has {total} of {PACKAGE_LINES} lines.")
    return 1 if complaints else 0


def check_folder(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(ROOT)
        lines = count_lines(path)
        if lines > FILE_LINES:
            yield f"{name}: {lines} lines, the limit is {FILE_LINES}"
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    where = f"{name}:{node.lineno}: {node.name}"
                    yield f"{where} has {length} lines, the limit is {FUNCTION_LINES}"


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    sys.exit(main())
