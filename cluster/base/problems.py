"""What is wrong with a cluster file: all of it at once, each with its line and key path.

A `Problem` is one finding; `ClusterFileError` is the error that carries every finding of one file.
The texts may echo what the user wrote, so `shown` makes any value safe for a terminal first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.base.errors import ConfigError

MAX_PROBLEMS = 50
"""More findings than this are counted, not listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One finding.

    `line` counts from 1 and is 0 when the finding concerns the file as a whole; `param` is the
    key path (`models[0].parallel.tp`), empty for the file as a whole.
    """

    file: str
    line: int
    param: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        key = f"{self.param}: " if self.param else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{place}: {key}{self.message}{hint}"


class ClusterFileError(ConfigError):
    """Everything that is wrong with one cluster file, in order of lines."""

    def __init__(self, problems: Sequence[Problem], remedy: str = "") -> None:
        ordered = sorted(problems, key=lambda problem: problem.line)
        self.problems = tuple(ordered[:MAX_PROBLEMS])
        self.num_hidden = len(ordered) - len(self.problems)
        lines = [str(problem) for problem in self.problems]
        if self.num_hidden:
            lines.append(f"... and {self.num_hidden} more problems")
        only = self.problems[0].param if len(ordered) == 1 else None
        super().__init__("\n".join(lines), remedy, param=only)


def shown(value: object, limit: int = 48) -> str:
    """A value as YAML would write it, cut to `limit` characters, without control characters.

    Mappings and lists are named, not printed: their content has problems of its own.
    """
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
        case str():
            return f'"{_printable(value, limit)}"'
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
    return _printable(str(value), limit)


def _printable(text: str, limit: int) -> str:
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
