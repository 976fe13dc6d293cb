"""The leader's series in Ray's metrics: flushed once a second from engine totals, never per token.

They appear as `ray_penstock_*` at the node's metrics port, where Prometheus finds them.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util import metrics as ray_metrics

from cluster.base import metrics as table
from cluster.base.metrics import METRICS, Metric, MetricKind, MetricSource
from replicas.api import ReplicaStats
from replicas.engine.step_ledger import StepTimes


class LoadMetrics:
    """Gauges and counters of one replica."""

    def __init__(self, model: str, replica_id: str) -> None:
        self._tags = {"model": model, "replica": replica_id}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._counters: dict[str, ray_metrics.Counter] = {}
        for metric in METRICS:
            if metric.source is not MetricSource.LEADER:
                continue
            if metric.kind is MetricKind.GAUGE:
                self._gauges[metric.name] = ray_metrics.Gauge(
                    metric.name, metric.help, tag_keys=("model", "replica")
                )
            else:
                self._counters[metric.name] = ray_metrics.Counter(
                    metric.name, metric.help, tag_keys=("model", "replica")
                )
        self._last: dict[str, float] = dict.fromkeys(self._counters, 0.0)

    def flush(self, stats: ReplicaStats, times: StepTimes) -> None:
        """Export the newest totals; counters grow by what was added since the last flush."""
        values = {metric.name: value for metric, value in leader_values(stats, times).items()}
        for name, gauge in self._gauges.items():
            gauge.set(values[name], tags=self._tags)
        for name, counter in self._counters.items():
            added = values[name] - self._last[name]
            if added > 0:
                counter.inc(added, tags=self._tags)
                self._last[name] = values[name]


def leader_values(stats: ReplicaStats, times: StepTimes) -> Mapping[Metric, float]:
    """The value of every leader metric: totals for counters, the present for gauges."""
    return {
        table.RUNNING: stats.num_running,
        table.WAITING: stats.num_waiting,
        table.WAITING_TOKENS: stats.num_waiting_tokens,
        table.KV_BLOCKS: stats.kv_blocks_total,
        table.KV_BLOCKS_FREE: stats.kv_blocks_free,
        table.PREEMPTIONS: stats.num_preemptions,
        table.PREFIX_HIT_TOKENS: stats.prefix_hit_tokens,
        table.PREFIX_QUERY_TOKENS: stats.prefix_query_tokens,
        table.STEPS: times.num_steps,
        table.STEP_SECONDS: times.schedule_s + times.execute_s + times.update_s,
        table.STEP_TOKENS: times.num_tokens,
        table.ENGINE_TOKENS: stats.generated_tokens,
        table.DRAFT_TOKENS: stats.draft_tokens,
        table.ACCEPTED_DRAFT_TOKENS: stats.accepted_draft_tokens,
        table.STREAMED_BYTES: times.traffic.read_bytes,
        table.STREAM_WAIT_SECONDS: times.traffic.wait_s,
        table.STREAMED_EXPERT_HITS: times.traffic.expert_hits,
        table.STREAMED_EXPERT_MISSES: times.traffic.expert_misses,
        table.EARLY_EXPERTS_USED: times.traffic.early_useful,
        table.EARLY_EXPERTS_WASTED: times.traffic.early_wasted,
    }
