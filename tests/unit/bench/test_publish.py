"""The performance page says what the result files say."""

import json

from bench.publish import PAGE, render


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == render()


def test_rows_carry_ratio_and_verdict(tmp_path):
    row = {
        "case": "8 streams", "metric": "tokens/s", "unit": "1/s", "ours": 90.0, "against": "bare",
        "theirs": 100.0, "ratio": 0.9, "target": 0.97, "met": False, "samples": 3, "spread": 0.1,
        "theirs_spread": 0.04, "commit": "0123456789abcdef",
    }  # fmt: skip
    report = {
        "name": "x", "machine": {"cores": 2, "python": "3.11"}, "date": "2026-01-02T00:00",
        "notes": ["a note"], "rows": [row],
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(report))
    (tmp_path / "x.md").write_text("Because of this.")
    page = render(tmp_path, tmp_path)
    assert (
        "| 8 streams | tokens/s | 90 | 1/s | bare | 100 | 0.9 | 0.97 **missed** | 3 | 10% | 4% |"
        in page
    )
    assert "- at commit `0123456789`: 8 streams\n" in page
    assert page.index("| 8 streams") < page.index("Because of this.")
