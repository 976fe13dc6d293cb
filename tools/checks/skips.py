"""A skipped or expected failure says why, in words that a user would accept."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tools.checks.source import Finding, Source

FIRST_ARGUMENT = {"pytest.skip", "pytest.xfail"}
KEYWORD = {"pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail", "pytest.importorskip"}


def check(source: Source) -> Iterator[Finding]:
    """`skip`, `skipif` and `xfail` without a reason, as calls, decorators or `pytestmark`."""
    if not source.is_python or "pytest" not in source.text:
        return
    with_reason: set[int] = set()
    for call, name in source.calls():
        if name in FIRST_ARGUMENT | KEYWORD and _has_reason(call, name):
            with_reason.add(call.lineno)
    for line, name in source.names:
        if name in FIRST_ARGUMENT | KEYWORD and line not in with_reason:
            yield Finding(path=source.path, line=line, message=f"{name} needs a reason")


def _has_reason(call: ast.Call, name: str) -> bool:
    reasons = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
    if name in FIRST_ARGUMENT:
        reasons += call.args[:1]
    return any(not (isinstance(value, ast.Constant) and not value.value) for value in reasons)
