"""File names that say what is inside, empty package files, one test file per name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from tools.checks.source import Finding, Source

DRAWERS = {"utils.py", "util.py", "common.py", "misc.py", "helpers.py", "helper.py"}


def check(source: Source) -> Iterator[Finding]:
    """Junk-drawer modules and `__init__.py` files with content."""
    name = PurePosixPath(source.path).name
    if name in DRAWERS:
        message = f"{name} says nothing about its content; name the file after what it owns"
        yield Finding(path=source.path, line=1, message=message)
    if name == "__init__.py" and source.text.strip():
        yield Finding(path=source.path, line=1, message="__init__.py files stay empty")


def check_all(sources: Sequence[Source]) -> Iterator[Finding]:
    """Test files that share a base name: without packages pytest imports only one of them."""
    first: dict[str, str] = {}
    for source in sources:
        path = PurePosixPath(source.path)
        if path.parts[0] != "tests" or not path.match("test_*.py"):
            continue
        if path.name in first:
            message = f"another test file has this name: {first[path.name]}"
            yield Finding(path=source.path, line=1, message=message)
        first.setdefault(path.name, source.path)
