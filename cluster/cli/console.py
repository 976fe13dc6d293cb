"""The terminal: one console for output, one way to print an error, the exit codes.

An error is its cause and what to do about it; a traceback never reaches a user. Colours follow
NO_COLOR and vanish when the output is not a terminal (rich does both).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from cluster.base.errors import PenstockError, UserError
from cluster.base.problems import ClusterFileError
from cluster.planner.table import Table

EXIT_INTERNAL = 1
EXIT_USER = 2

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


def report_error(error: Exception) -> int:
    """Print an error that ended a command; returns the exit code."""
    if not isinstance(error, PenstockError):
        logging.getLogger(__name__).debug("unexpected error", exc_info=error)
        _print("error", "bold red", f"internal: {type(error).__name__}: {error}")
        _print("fix", "bold", "Run it again with PENSTOCK_LOG_LEVEL=debug and report what it logs.")
        return EXIT_INTERNAL
    if isinstance(error, ClusterFileError) and len(error.problems) > 1:
        count = len(error.problems) + error.num_hidden
        _print("error", "bold red", f"{count} problems in the cluster file")
        error_console.print(escape(error.cause), soft_wrap=True)
        return EXIT_USER
    key = f"{error.param}: " if error.param and error.param not in error.cause else ""
    _print("error", "bold red", f"{key}{error.cause}")
    if error.remedy:
        _print("fix", "bold", error.remedy)
    return EXIT_USER if isinstance(error, UserError) else EXIT_INTERNAL


def print_warning(text: str) -> None:
    """A warning on stderr, so that it never mixes with a command's output."""
    _print("warning", "bold yellow", text)


def print_edit(lines: Sequence[str]) -> None:
    """What an edited file changes of a running cluster."""
    for line in lines or ["nothing to change"]:
        style = {"+": "green", "-": "red", "~": "yellow"}.get(line[:1], "")
        console.print(line, style=style, markup=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """A table with its title; cells wrap to the width of the terminal."""
    grid = RichTable(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for column in table.columns:
        grid.add_column(column, overflow="fold")
    for row in table.rows:
        grid.add_row(*(escape(cell) for cell in row))
    console.print(f"[bold]{escape(table.title)}[/]")
    console.print(grid)


def _print(label: str, style: str, text: str) -> None:
    first, *rest = text.splitlines() or [""]
    error_console.print(f"[{style}]{label}:[/] {escape(first)}", soft_wrap=True)
    for line in rest:
        error_console.print(f"  {escape(line)}", soft_wrap=True)
