"""Calls that are never right: code from data, unsafe loaders, waits without an end."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tools.checks.source import Finding, Source

FORBIDDEN = {
    "eval": "evaluates data as code",
    "exec": "executes data as code",
    "torch.load": "unpickles; read safetensors",
    "yaml.load": "builds arbitrary objects; use safe_load or a safe loader class",
    "yaml.unsafe_load": "builds arbitrary objects; use safe_load",
    "yaml.full_load": "builds arbitrary objects; use safe_load",
}
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
NEEDS_TIMEOUT = {"ray.get", "ray.wait"}


def check(source: Source) -> Iterator[Finding]:
    """Forbidden calls, pickle imports, remote code, Ray waits that may hang for ever."""
    if not source.is_python:
        return
    for line, name in source.names:
        if name.partition(".")[0] in PICKLES and _is_import(source, line):
            yield Finding(path=source.path, line=line, message="no pickle: it runs what it reads")
    for call, name in source.calls():
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in FORBIDDEN:
            message = f"{name} {FORBIDDEN[name]}"
            yield Finding(path=source.path, line=call.lineno, message=message)
        if name in NEEDS_TIMEOUT and _unbounded(keywords.get("timeout")):
            message = f"{name} needs a timeout: a lost node must not hang the caller"
            yield Finding(path=source.path, line=call.lineno, message=message)
        if _is_true(keywords.get("trust_remote_code")):
            message = "trust_remote_code runs a stranger's Python"
            yield Finding(path=source.path, line=call.lineno, message=message)


def _is_import(source: Source, line: int) -> bool:
    return source.lines[line - 1].lstrip().startswith(("import ", "from "))


def _unbounded(timeout: ast.expr | None) -> bool:
    return timeout is None or (isinstance(timeout, ast.Constant) and timeout.value is None)


def _is_true(value: ast.expr | None) -> bool:
    return value is not None and not (isinstance(value, ast.Constant) and value.value is False)
