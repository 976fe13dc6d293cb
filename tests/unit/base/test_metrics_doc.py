"""The reference page of the metrics is what their table says today."""

from __future__ import annotations

from pathlib import Path

from cluster.base.metrics import METRICS
from cluster.base.metrics_doc import render

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run: python -m cluster.base.metrics_doc > docs/metrics.md"


def test_every_metric_is_on_the_page_once() -> None:
    page = render()
    for metric in METRICS:
        assert page.count(f"| `{metric.name}` |") == 1
