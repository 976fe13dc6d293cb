"""The reference page of the metrics: `python -m cluster.base.metrics_doc` writes it.

A test compares the page in docs/ with what this renders, so the page cannot fall behind.
"""

from __future__ import annotations

import sys

from cluster.base.metrics import METRICS, Metric, MetricSource

_HEAD = """# Metrics and the dashboard

This page is generated from `cluster/base/metrics.py` by
`python -m cluster.base.metrics_doc > docs/metrics.md`.

Two places hold them, both in Prometheus' text form:

- **The gateway's own**, at `http://HOST:8000/metrics`: what clients see. Gateways that share a port
  answer in turn, each with its own counts: scrape them this way only where there is one.
- **The replicas'**, in Ray's metrics with `ray_` before the name: at the metrics port of every
  node. Prometheus finds those by the file `/tmp/ray/prom_metrics_service_discovery.json` of the
  head node (`file_sd_configs: [{files: [/tmp/ray/prom_metrics_service_discovery.json]}]`).

Labels are bounded: models of the cluster file, codes of the [error table](api-grpc.md#errors),
layers, experts and replicas; never ids of requests. What to look at, for example:

    rate(penstock_generated_tokens_total[1m])
    histogram_quantile(0.95, sum by (le, model) (rate(penstock_ttft_seconds_bucket[5m])))
    1 - ray_penstock_kv_blocks_free / ray_penstock_kv_blocks

## In Ray's dashboard

`penstock up` prints its address (`ray get-auth-token` prints the token it asks for).

| page | shows |
|---|---|
| Serve | applications `CLUSTER-gateway` and `CLUSTER-engine-MODEL`: every gateway and leader |
| Actors | `CLUSTER/MODEL/REPLICA/EPOCH/rank-N`: a rank, its pid, node and log |
| Actors | `penstock:CLUSTER:directory`: what knows the replicas |
| Logs | JSON lines of each process, with the ids of requests |
"""

_TITLES = {
    MetricSource.GATEWAY: "Gateway",
    MetricSource.LEADER: "Every replica",
    MetricSource.EXPERTS: "Expert-parallel replicas",
}


def render() -> str:
    """The whole page."""
    parts = [_HEAD]
    for source, title in _TITLES.items():
        rows = [_row(metric) for metric in METRICS if metric.source is source]
        parts.append(
            f"\n## {title}\n\n| name | kind | labels | meaning |\n|---|---|---|---|\n"
            + "".join(rows)
        )
    return "".join(parts)


def _row(metric: Metric) -> str:
    labels = metric.labels
    if metric.source is not MetricSource.GATEWAY:
        labels = (*labels, "replica")
    shown = ", ".join(f"`{label}`" for label in labels)
    return f"| `{metric.name}` | {metric.kind} | {shown} | {metric.help} |\n"


if __name__ == "__main__":
    sys.stdout.write(render())
