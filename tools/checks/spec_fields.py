"""Every field that a user can write in the cluster file explains itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tools.checks.source import Finding, Source

SPEC = re.compile(r"cluster/base/(\w+_)?spec\.py")


def check(source: Source) -> Iterator[Finding]:
    """Annotated class fields of the spec without a `description`."""
    if SPEC.fullmatch(source.path) is None:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef):
            for position, field in enumerate(node.body):
                if _is_field(field) and not _described(field, node.body[position + 1 :]):
                    message = f"{node.name} has a field without a description"
                    yield Finding(path=source.path, line=field.lineno, message=message)


def _is_field(node: ast.stmt) -> bool:
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
        return False
    return not node.target.id.startswith(("_", "model_config")) and "ClassVar" not in ast.dump(
        node.annotation
    )


def _described(field: ast.stmt, following: list[ast.stmt]) -> bool:
    for node in ast.walk(field):
        if isinstance(node, ast.keyword) and node.arg == "description":
            return not (isinstance(node.value, ast.Constant) and not node.value.value)
    return bool(following) and _is_docstring(following[0])


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and bool(node.value.value.strip())
    )
