"""How benchmarks report: rows of a table on the terminal and one JSON file per benchmark.

A row compares one measured number of ours with one of somebody else's, taken in the same run.
`ratio` is always "how many times better": above 1 means ours wins, whichever way the metric
points. Numbers are medians; `spread` says how far the samples lay apart.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import describe_commit, describe_machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Repeated measurements of one number; at least one."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median; 0 for a single sample or a median of 0."""
        if not self.median:
            return 0.0
        return (max(self.values) - min(self.values)) / abs(self.median)

    def percentile(self, percent: float) -> float:
        """The value that `percent` % of the samples do not exceed (nearest rank)."""
        ordered = sorted(self.values)
        rank = max(1, -(-len(ordered) * percent // 100))
        return ordered[int(rank) - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a report."""

    case: str
    metric: str
    unit: str
    ours: float
    samples: int
    spread: float
    against: str = ""
    """Who or what is compared; empty when the row only records our number."""
    theirs: float | None = None
    theirs_spread: float | None = None
    ratio: float | None = None
    target: float | None = None
    """The ratio to reach."""
    commit: str = ""
    """Where it was measured, if not at the report's commit."""

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None without one."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio >= self.target


def measured(case: str, metric: str, unit: str, ours: Samples) -> Row:
    """A row that records our number alone."""
    return Row(
        case=case,
        metric=metric,
        unit=unit,
        ours=ours.median,
        samples=len(ours.values),
        spread=ours.spread,
    )


def compared(
    row: Row,
    against: str,
    theirs: Samples,
    *,
    target: float | None = None,
    lower_is_better: bool = False,
) -> Row:
    """`row` with somebody else's number beside ours."""
    better, worse = (theirs.median, row.ours) if lower_is_better else (row.ours, theirs.median)
    ratio = better / worse if worse else None
    return dataclasses.replace(
        row,
        against=against,
        theirs=theirs.median,
        theirs_spread=theirs.spread,
        ratio=ratio,
        target=target,
    )


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned columns."""
    header = ("case", "metric", "ours", "unit", "against", "theirs", "ratio", "target", "n", "±")
    table = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def not_measured(row: Row, against: str, reason: str, *, target: float | None = None) -> Row:
    """`row` beside somebody whose number could not be had, and why: nobody drops out in silence."""
    return dataclasses.replace(row, against=f"{against}: not measured, {reason}", target=target)


def write_report(
    name: str, rows: Sequence[Row], *, notes: Sequence[str] = (), folder: Path = RESULTS
) -> Path:
    """Print the table and write `folder/name.json`, with machine, commit and date."""
    print(format_table(rows))
    for note in notes:
        print(f"note: {note}")
    return save_report(name, rows, notes=notes, folder=folder)


def save_report(
    name: str, rows: Sequence[Row], *, notes: Sequence[str] = (), folder: Path = RESULTS
) -> Path:
    """Write `folder/name.json` only: a long benchmark does so after each case."""
    report = {
        "name": name,
        "machine": describe_machine(),
        **describe_commit(),
        "notes": list(notes),
        "rows": [{**dataclasses.asdict(row), "met": row.met} for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def kept_rows(name: str, folder: Path = RESULTS) -> list[Row]:
    """The rows of a report that was written on this machine; those of other commits name theirs.

    None of another machine, or of files that were in no commit.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    now, then = describe_commit(), str(report.get("commit", ""))
    if report["machine"] != describe_machine():
        return []
    same = all(report.get(key) == now.get(key) for key in ("commit", "uncommitted_changes"))
    if not same and (not then or report.get("uncommitted_changes")):
        return []
    names = {field.name for field in dataclasses.fields(Row)}
    rows = [Row(**{key: row[key] for key in row if key in names}) for row in report["rows"]]
    if same:
        return rows
    return [dataclasses.replace(row, commit=row.commit or then) for row in rows]


def _cells(row: Row) -> tuple[str, ...]:
    mark = {None: "", True: " ok", False: " MISSED"}[row.met]
    return (
        row.case,
        row.metric,
        _number(row.ours),
        row.unit,
        row.against,
        _number(row.theirs),
        _number(row.ratio),
        _number(row.target) + mark,
        str(row.samples),
        f"{row.spread:.0%}",
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
