"""Writes docs/performance.md from bench/results/*.json: numbers on that page are never typed.

    python -m bench.publish [--check]

What a result means, and why it falls short where it does, is prose in bench/notes/NAME.md, which is
put under the table of NAME.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NOTES = HERE / "notes"
PAGE = HERE.parent / "docs" / "performance.md"

_VERDICTS = {True: "met", False: "**missed**", None: ""}
_INTRODUCTION = """# Performance

Generated from `bench/results/*.json` by `python -m bench.publish`; do not edit. `ratio` is how many
times better ours is than what it is compared with in the same run (above 1: ours wins, whichever
way the metric points); numbers are medians, ± is (largest - smallest) / median of the samples.
"""


def render(results: Path = RESULTS, notes: Path = NOTES) -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for path in sorted(results.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        parts.append(_section(report))
        note = notes / f"{path.stem}.md"
        if note.is_file():
            parts.append(note.read_text(encoding="utf-8").strip() + "\n")
    return "\n".join(parts)


def _section(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "ray") if name in machine)
    lines = [
        f"## {report['name']}",
        "",
        f"`python -m bench.{report['name']}` on {machine.get('cpu', 'an unnamed CPU')}, "
        f"{machine['cores']} cores, {machine.get('memory_gib', '?')} GiB; Python "
        f"{machine['python']}, {versions}; {report['date'][:10]}, "
        f"commit `{str(report.get('commit', 'none'))[:10]}`.",
        "",
        *(f"- {note}" for note in report["notes"]),
        *_older(report["rows"]),
        "",
        "| case | metric | ours | unit | against | theirs | ratio | target | n | ± | ± theirs |",
        "|---|---|--:|---|---|--:|--:|---|--:|--:|--:|",
        *(_row(row) for row in report["rows"]),
        "",
    ]
    return "\n".join(lines)


def _older(rows: list[dict[str, Any]]) -> list[str]:
    """Which cases were measured at which other commit."""
    cases: dict[str, dict[str, None]] = {}
    for row in rows:
        if commit := row.get("commit"):
            cases.setdefault(commit, {})[row["case"]] = None
    return [f"- at commit `{commit[:10]}`: {', '.join(names)}" for commit, names in cases.items()]


def _row(row: dict[str, Any]) -> str:
    target = ""
    if row["target"] is not None:
        target = f"{row['target']:g} {_VERDICTS[row['met']]}".rstrip()
    cells = (
        row["case"],
        row["metric"],
        _number(row["ours"]),
        row["unit"],
        row["against"],
        _number(row["theirs"]),
        _number(row["ratio"]),
        target,
        str(row["samples"]),
        f"{row['spread']:.0%}",
        "" if row.get("theirs_spread") is None else f"{row['theirs_spread']:.0%}",
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def main() -> None:
    """Write the page, or with --check only compare it; exit status 1 when it is out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    page = render()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE.name} is out of date: run python -m bench.publish")


if __name__ == "__main__":
    main()
