"""Text files end in one newline and hold no merge markers or trailing blanks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.checks.source import Finding, Source

MERGE_MARKER = re.compile(r"^(?:<{7} |>{7} |={7}$)")
MAX_BYTES = 500_000
AS_THEY_CAME = ("LICENSE*", "*.json", "*.lock", "*_pb2*")


def check(source: Source) -> Iterator[Finding]:
    """Size, merge markers, whitespace."""
    if len(source.text) > MAX_BYTES:
        message = f"{len(source.text)} characters; large data does not belong in git"
        yield Finding(path=source.path, line=1, message=message)
    if source.matches(*AS_THEY_CAME):
        return
    for number, line in enumerate(source.lines, start=1):
        if MERGE_MARKER.match(line):
            yield Finding(path=source.path, line=number, message="merge marker")
        elif line != line.rstrip():
            yield Finding(path=source.path, line=number, message="trailing whitespace")
    if source.text and (not source.text.endswith("\n") or source.text.endswith("\n\n")):
        message = "a file ends with exactly one newline"
        yield Finding(path=source.path, line=len(source.lines), message=message)
