"""Relative links and image paths in Markdown lead to a file of the repository."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence

from tools.checks.source import Finding, Source

LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)[^)]*\)")


def check_all(sources: Sequence[Source]) -> Iterator[Finding]:
    """Links in `*.md` whose target does not exist."""
    files = {source.path for source in sources}
    folders = {folder for path in files for folder in _parents(path)}
    for source in sources:
        if not source.path.endswith(".md"):
            continue
        here = posixpath.dirname(source.path)
        for number, line in enumerate(source.lines, start=1):
            for target in LINK.findall(line):
                path = posixpath.normpath(posixpath.join(here, target))
                if path not in files and path not in folders:
                    message = f"broken link: {target}"
                    yield Finding(path=source.path, line=number, message=message)


def _parents(path: str) -> Iterator[str]:
    while path := posixpath.dirname(path):
        yield path
