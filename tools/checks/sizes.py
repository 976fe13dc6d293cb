"""A file is read top to bottom once: it warns at 250 lines and fails at 600, a function at 80."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tools.checks.source import Finding, Severity, Source

FILE_WARNING_LINES = 250
FILE_ERROR_LINES = 600
FUNCTION_ERROR_LINES = 80


def check(source: Source) -> Iterator[Finding]:
    """Oversized Python files and functions."""
    if not source.is_python:
        return
    length = len(source.lines)
    if length > FILE_WARNING_LINES:
        severity = Severity.ERROR if length > FILE_ERROR_LINES else Severity.WARNING
        message = f"file has {length} lines; the house aims at {FILE_WARNING_LINES}"
        yield Finding(path=source.path, line=1, message=message, severity=severity)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_ERROR_LINES:
                message = f"{node.name} has {length} lines; at most {FUNCTION_ERROR_LINES}"
                yield Finding(path=source.path, line=node.lineno, message=message)
