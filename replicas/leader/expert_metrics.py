"""The leader's series about experts in Ray's metrics; one series per layer and expert.

Only what has changed since the last flush is touched, and an idle replica flushes nothing.
"""

from __future__ import annotations

from ray.util import metrics as ray_metrics

from cluster.base import metrics as table
from cluster.base.metrics import Metric
from replicas.leader.record import ExpertLayerRecord, ExpertRecord


class ExpertMetrics:
    """Counters and gauges of one replica's experts."""

    def __init__(self, model: str, replica_id: str) -> None:
        self._tags = {"model": model, "replica": replica_id}
        self._rows = _counter(table.EXPERT_ROWS)
        self._dropped = _counter(table.EXPERT_DROPPED)
        self._moves = _counter(table.EXPERT_MOVES)
        self._imbalance = _gauge(table.EXPERT_IMBALANCE)
        self._lost = _gauge(table.LOST_RANKS)
        self._last = ExpertRecord()
        self._last_rows: dict[tuple[int, int], int] = {}

    def flush(self, record: ExpertRecord) -> None:
        """Export the newest totals; counters grow by what was added since the last flush.

        New ranks count from zero again.
        """
        if sum(map(_rows, record.layers)) < sum(map(_rows, self._last.layers)):
            self._last, self._last_rows = ExpertRecord(), {}
        for layer in record.layers:
            tags = {**self._tags, "layer": str(layer.layer)}
            self._imbalance.set(layer.imbalance, tags=tags)
            for expert, rows in enumerate(layer.rows):
                key = (layer.layer, expert)
                if (added := rows - self._last_rows.get(key, 0)) > 0:
                    self._rows.inc(added, tags={**tags, "expert": str(expert)})
                    self._last_rows[key] = rows
        if (dropped := record.num_dropped - self._last.num_dropped) > 0:
            self._dropped.inc(dropped, tags=self._tags)
        if (moved := record.num_moves - self._last.num_moves) > 0:
            self._moves.inc(moved, tags=self._tags)
        self._last = record

    def flush_lost(self, number: int) -> None:
        """Export how many ranks the replica serves without."""
        self._lost.set(number, tags=self._tags)


def _rows(layer: ExpertLayerRecord) -> int:
    return sum(layer.rows)


def _counter(metric: Metric) -> ray_metrics.Counter:
    return ray_metrics.Counter(metric.name, metric.help, tag_keys=(*metric.labels, "replica"))


def _gauge(metric: Metric) -> ray_metrics.Gauge:
    return ray_metrics.Gauge(metric.name, metric.help, tag_keys=(*metric.labels, "replica"))
