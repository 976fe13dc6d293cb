"""The leader's series in Ray's metrics: flushed once a second from engine totals, never per token.

They appear as `ray_penstock_*` at the node's metrics port and in the dashboard's Grafana panels.
"""

from __future__ import annotations

from ray.util import metrics as ray_metrics

from cluster.base import metrics as table
from cluster.base.metrics import Metric
from replicas.api import ReplicaStats


class LoadMetrics:
    """Gauges and counters of one replica."""

    def __init__(self, model: str, replica_id: str) -> None:
        self._tags = {"model": model, "replica": replica_id}
        self._gauges = {
            metric.name: _gauge(metric)
            for metric in (
                table.RUNNING,
                table.WAITING,
                table.WAITING_TOKENS,
                table.KV_BLOCKS,
                table.KV_BLOCKS_FREE,
            )
        }
        self._counters = {
            metric.name: _counter(metric)
            for metric in (
                table.PREEMPTIONS,
                table.PREFIX_HIT_TOKENS,
                table.PREFIX_QUERY_TOKENS,
                table.STEPS,
                table.ENGINE_TOKENS,
            )
        }
        self._last = ReplicaStats()

    def flush(self, stats: ReplicaStats) -> None:
        """Export `stats`; counters grow by what was added since the last flush."""
        gauges = {
            table.RUNNING: stats.num_running,
            table.WAITING: stats.num_waiting,
            table.WAITING_TOKENS: stats.num_waiting_tokens,
            table.KV_BLOCKS: stats.kv_blocks_total,
            table.KV_BLOCKS_FREE: stats.kv_blocks_free,
        }
        for metric, value in gauges.items():
            self._gauges[metric.name].set(value, tags=self._tags)
        last = self._last
        added = {
            table.PREEMPTIONS: stats.num_preemptions - last.num_preemptions,
            table.PREFIX_HIT_TOKENS: stats.prefix_hit_tokens - last.prefix_hit_tokens,
            table.PREFIX_QUERY_TOKENS: stats.prefix_query_tokens - last.prefix_query_tokens,
            table.STEPS: stats.step - last.step,
            table.ENGINE_TOKENS: stats.generated_tokens - last.generated_tokens,
        }
        for metric, value in added.items():
            if value > 0:
                self._counters[metric.name].inc(value, tags=self._tags)
        self._last = stats


def _gauge(metric: Metric) -> ray_metrics.Gauge:
    return ray_metrics.Gauge(metric.name, metric.help, tag_keys=("model", "replica"))


def _counter(metric: Metric) -> ray_metrics.Counter:
    return ray_metrics.Counter(metric.name, metric.help, tag_keys=("model", "replica"))
