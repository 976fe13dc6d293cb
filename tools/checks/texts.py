"""The repository is the same on every machine: no home directories, no package index hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.checks.source import Finding, Source

RULES = (
    (
        re.compile(r"(?<![\w.$}*])/(?:work|root|Users|home/(?!ray/))/?[\w.-]+/"),
        "a path of one machine",
    ),
    (
        re.compile(r"\b(?:(?:test\.)?pypi|files\.pythonhosted|download\.pytorch)\.org\b"),
        "a package index; pip's own configuration says where packages come from",
    ),
    (
        re.compile(r"https?://[^/\s\"']*(?:artifactory|nexus|pypi)[^/\s\"']*"),
        "a package index; pip's own configuration says where packages come from",
    ),
    (re.compile(r"--(?:extra-)?index-url[ =]\S|--find-links[ =]\S"), "a package index setting"),
)


def check(source: Source) -> Iterator[Finding]:
    """Lines of any text file that name a machine or a registry."""
    for number, line in enumerate(source.lines, start=1):
        for pattern, what in RULES:
            if match := pattern.search(line):
                message = f"{match.group(0)!r} is {what}"
                yield Finding(path=source.path, line=number, message=message)
