"""What the house rules look at and what they answer: files, names used in them, findings."""

from __future__ import annotations

import ast
import enum
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

HIDDEN = {".git", ".venv", "build", "__pycache__"}


class Severity(enum.StrEnum):
    """Only `ERROR` makes the run fail."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One place that breaks a rule."""

    path: str
    line: int
    message: str
    severity: Severity = Severity.ERROR

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.severity}: {self.message}"


class Source:
    """A text file of the repository; `path` is relative to its root, with forward slashes."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text

    @property
    def is_python(self) -> bool:
        """Hand-written Python: generated protobuf modules are nobody's style."""
        return self.path.endswith(".py") and not self.path.endswith(("_pb2.py", "_pb2_grpc.py"))

    @cached_property
    def lines(self) -> list[str]:
        """The text, line by line."""
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed module.

        Raises:
            SyntaxError: the file is not Python.
        """
        return ast.parse(self.text, filename=self.path)

    @cached_property
    def names(self) -> list[tuple[int, str]]:
        """(line, dotted name) of every import and attribute chain, with aliases resolved."""
        aliases = _aliases(self.tree)
        found = list(_imported(self.tree))
        found += (
            (node.lineno, dotted_name(node, aliases))
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Name | ast.Attribute)
        )
        return [(line, name) for line, name in found if name]

    def matches(self, *patterns: str) -> bool:
        """Whether the path matches one of the patterns; a trailing `/` names a folder."""
        path = PurePosixPath(self.path)
        return any(
            self.path.startswith(pattern) if pattern.endswith("/") else path.match(pattern)
            for pattern in patterns
        )

    def calls(self) -> Iterator[tuple[ast.Call, str]]:
        """Every call with the resolved dotted name of what it calls (empty: not a name)."""
        aliases = _aliases(self.tree)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield node, dotted_name(node.func, aliases)


def dotted_name(node: ast.expr, aliases: dict[str, str]) -> str:
    """`a.b.c` for a name or attribute chain, its root replaced by what was imported."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    parts.append(aliases.get(node.id, node.id))
    return ".".join(reversed(parts))


def _imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _aliases(tree: ast.Module) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return aliases


def repository_sources(root: Path) -> list[Source]:
    """Every text file that git tracks or would track; all visible files outside a checkout."""
    if shutil.which("git") and (root / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        paths = [root / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [path for path in root.rglob("*") if not HIDDEN & set(path.parts)]
    return [source for path in sorted(paths) if (source := _read(root, path))]


def _read(root: Path, path: Path) -> Source | None:
    if not path.is_file():
        return None
    try:
        return Source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return None
