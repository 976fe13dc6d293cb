"""Benchmark plumbing: the arithmetic of a row, the table, the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.machine import describe_commit, describe_machine
from bench.report import (
    Row,
    Samples,
    compared,
    format_table,
    kept_rows,
    measured,
    not_measured,
    save_report,
    write_report,
)


def row(ours: float = 200.0) -> Row:
    return measured("batch 1", "decode", "tok/s", Samples(values=(ours,)))


def test_samples_give_median_spread_and_percentiles() -> None:
    samples = Samples(values=(4.0, 1.0, 2.0, 3.0))
    assert samples.median == 2.5
    assert samples.spread == pytest.approx(1.2)
    assert [samples.percentile(p) for p in (1, 25, 50, 99, 100)] == [1.0, 1.0, 2.0, 4.0, 4.0]
    assert Samples(values=(0.0, 0.0)).spread == 0.0


def test_ratio_above_one_means_ours_is_better() -> None:
    faster = compared(row(200.0), "peer", Samples(values=(100.0,)), target=1.5)
    assert (faster.ratio, faster.met) == (2.0, True)
    latency = compared(
        row(200.0), "peer", Samples(values=(100.0,)), target=1.0, lower_is_better=True
    )
    assert (latency.ratio, latency.met) == (0.5, False)
    assert row().met is None
    assert compared(row(), "peer", Samples(values=(0.0,))).ratio is None


def test_table_columns_line_up() -> None:
    rows = [row(), compared(row(3.0), "a long peer name", Samples(values=(4.0,)), target=1.0)]
    lines = format_table(rows).splitlines()
    assert lines[2].index("tok/s") == lines[3].index("tok/s") == lines[0].index("unit")
    assert "0.75" in lines[3]
    assert "MISSED" in lines[3]


def test_report_file_holds_rows_machine_and_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_report("engine", [row()], notes=["quiet machine"], folder=tmp_path / "results")
    report = json.loads(path.read_text())
    assert path.name == "engine.json"
    assert report["rows"][0]["ours"] == 200.0
    assert report["rows"][0]["met"] is None
    assert report["machine"]["torch"].startswith("2.")
    assert report["machine"]["cores"] >= 1
    assert report["notes"] == ["quiet machine"]
    assert "decode" in capsys.readouterr().out


def test_commit_is_left_out_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    described = describe_commit()
    assert "commit" not in described
    assert described["date"]


def test_unknown_facts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.machine.PACKAGES", ("no-such-package",))
    machine = describe_machine()
    assert "no-such-package" not in machine
    assert "python" in machine


def test_rows_are_kept_on_one_machine_and_name_another_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(commit: str, *, changed: bool = False) -> None:
        described = {"commit": commit, "uncommitted_changes": changed}
        monkeypatch.setattr("bench.report.describe_commit", lambda: described)

    at("first")
    full = compared(row(), "peer", Samples(values=(150.0,)), target=1.2)
    named = not_measured(row(), "other", "not installed", target=1.2)
    save_report("x", [full, named], folder=tmp_path)
    assert kept_rows("x", tmp_path) == [full, named]
    assert named.met is None
    assert kept_rows("y", tmp_path) == []
    at("second")
    older = kept_rows("x", tmp_path)
    assert [row.commit for row in older] == ["first", "first"]
    save_report("x", [*older, full], folder=tmp_path)
    at("third", changed=True)
    assert [row.commit for row in kept_rows("x", tmp_path)] == ["first", "first", "second"]
    save_report("x", [full], folder=tmp_path)
    at("fourth")
    assert kept_rows("x", tmp_path) == [], "of files that were in no commit"
    at("third", changed=True)
    assert kept_rows("x", tmp_path) == [full]
    monkeypatch.setattr("bench.report.describe_machine", lambda: {"cores": 999})
    assert kept_rows("x", tmp_path) == []
