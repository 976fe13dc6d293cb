"""One table of every metric: name, kind, unit, labels, help.

Data only: the gateway feeds it to prometheus_client, the leader to Ray's metrics, the docs to a
page. Names follow Prometheus practice: `penstock_` prefix, base units, `_total` on counters.
Labels must stay bounded: models of the cluster file and codes of the error table, never ids.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class MetricKind(enum.StrEnum):
    """What a value does over time."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class MetricSource(enum.StrEnum):
    """Which process observes it."""

    GATEWAY = "gateway"
    LEADER = "leader"
    EXPERTS = "experts"
    """The leader of an expert-parallel replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric; `buckets` are upper bounds in `unit`, of histograms only."""

    name: str
    kind: MetricKind
    source: MetricSource
    help: str
    unit: str = ""
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()


SECONDS_TO_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
SECONDS_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144)


def _counter(name: str, source: MetricSource, text: str, *, labels: tuple[str, ...] = ()) -> Metric:
    return Metric(
        name=f"penstock_{name}",
        kind=MetricKind.COUNTER,
        source=source,
        help=text,
        labels=("model", *labels),
    )


def _gauge(name: str, source: MetricSource, text: str, *, unit: str = "") -> Metric:
    return Metric(
        name=f"penstock_{name}", kind=MetricKind.GAUGE, source=source, help=text, unit=unit
    )


def _histogram(
    name: str, source: MetricSource, text: str, unit: str, buckets: tuple[float, ...]
) -> Metric:
    return Metric(
        name=f"penstock_{name}",
        kind=MetricKind.HISTOGRAM,
        source=source,
        help=text,
        unit=unit,
        buckets=buckets,
    )


_GATEWAY, _LEADER = MetricSource.GATEWAY, MetricSource.LEADER

REQUESTS = _counter(
    "requests_total", _GATEWAY, "Requests answered, by outcome code (ok or an error code).",
    labels=("code",),
)  # fmt: skip
OVERFLOWS = _counter(
    "overflows_total", _GATEWAY,
    "Requests run by the model's overflow, by reason (too_long, busy, unavailable).",
    labels=("reason",),
)  # fmt: skip
RESUMES = _counter(
    "resumes_total", _GATEWAY,
    "Losses of a replica that a request met, by reason (failed, cut, drained) and outcome: resumed "
    "on another one, or ended because of limit or no_replica.",
    labels=("reason", "outcome"),
)  # fmt: skip
REPLAYED_TOKENS = _counter(
    "replayed_tokens_total", _GATEWAY,
    "Prompt and output tokens of resumed requests that another replica computed again.",
)  # fmt: skip
ACTIVE_REQUESTS = _gauge("active_requests", _GATEWAY, "Requests in the gateway now.")
TTFT = _histogram(
    "ttft_seconds", _GATEWAY, "Time from arrival to the first token.", "seconds", SECONDS_TO_FIRST
)
TPOT = _histogram(
    "tpot_seconds",
    _GATEWAY,
    "Mean time per output token after the first, per request.",
    "seconds",
    SECONDS_PER_TOKEN,
)
E2E = _histogram(
    "e2e_seconds", _GATEWAY, "Time from arrival to the last token.", "seconds", SECONDS_WHOLE
)
QUEUE = _histogram(
    "queue_seconds",
    _GATEWAY,
    "Time from arrival to the submission to a replica.",
    "seconds",
    SECONDS_TO_FIRST,
)
PROMPT_TOKENS = _counter("prompt_tokens_total", _GATEWAY, "Prompt tokens of accepted requests.")
GENERATED_TOKENS = _counter("generated_tokens_total", _GATEWAY, "Tokens sent to clients.")
PROMPT_LENGTH = _histogram(
    "prompt_length_tokens", _GATEWAY, "Prompt length per request.", "tokens", TOKENS
)
OUTPUT_LENGTH = _histogram(
    "output_length_tokens", _GATEWAY, "Output length per request.", "tokens", TOKENS
)
READY_REPLICAS = _gauge("ready_replicas", _GATEWAY, "Replicas the gateway can send to now.")

RUNNING = _gauge("running_requests", _LEADER, "Requests that take part in steps.")
WAITING = _gauge("waiting_requests", _LEADER, "Requests that wait for room.")
WAITING_TOKENS = _gauge("waiting_tokens", _LEADER, "Prompt tokens not computed yet.", unit="tokens")
KV_BLOCKS = _gauge("kv_blocks", _LEADER, "Blocks of the key/value cache.", unit="blocks")
KV_BLOCKS_FREE = _gauge(
    "kv_blocks_free", _LEADER, "Blocks that no live request holds.", unit="blocks"
)
PREEMPTIONS = _counter(
    "preemptions_total", _LEADER, "Requests put back to waiting for lack of blocks."
)
PREFIX_HIT_TOKENS = _counter(
    "prefix_hit_tokens_total", _LEADER, "Prompt tokens answered from the prefix cache."
)
PREFIX_QUERY_TOKENS = _counter(
    "prefix_query_tokens_total", _LEADER, "Prompt tokens looked up in the prefix cache."
)
STEPS = _counter("steps_total", _LEADER, "Engine steps.")
STEP_SECONDS = _counter(
    "step_seconds_total", _LEADER, "Time spent in engine steps, scheduling included."
)
STEP_TOKENS = _counter(
    "step_tokens_total", _LEADER, "Tokens computed by steps, prompt and output together."
)
ENGINE_TOKENS = _counter(
    "engine_generated_tokens_total", _LEADER, "Tokens sampled, resent ones included."
)
DRAFT_TOKENS = _counter(
    "draft_tokens_total", _LEADER, "Tokens guessed and checked by speculative decoding."
)
ACCEPTED_DRAFT_TOKENS = _counter(
    "accepted_draft_tokens_total", _LEADER, "Guessed tokens that were right."
)
STREAMED_BYTES = _counter(
    "streamed_weight_bytes_total", _LEADER, "Weights that an offload replica's first rank has read."
)
STREAM_WAIT_SECONDS = _counter(
    "streamed_weight_wait_seconds_total", _LEADER, "What its steps lost waiting for weights."
)
STREAMED_EXPERT_HITS = _counter(
    "streamed_expert_hits_total", _LEADER, "Visits of streamed experts that found them in memory."
)
STREAMED_EXPERT_MISSES = _counter(
    "streamed_expert_misses_total", _LEADER, "Visits of streamed experts that took a read."
)
EARLY_EXPERTS_USED = _counter(
    "early_experts_used_total", _LEADER, "Experts read before their layer asked, and used."
)
EARLY_EXPERTS_WASTED = _counter(
    "early_experts_wasted_total", _LEADER, "Experts read before their layer asked, for nothing."
)

LOST_RANKS = Metric(
    name="penstock_lost_ranks",
    kind=MetricKind.GAUGE,
    source=MetricSource.EXPERTS,
    help="Ranks that an expert-parallel replica serves without.",
    labels=("model",),
)
EXPERT_ROWS = _counter(
    "expert_rows_total",
    MetricSource.EXPERTS,
    "Rows routed to an expert (one per token and expert it visits), by decoder layer.",
    labels=("layer", "expert"),
)
EXPERT_DROPPED = _counter(
    "expert_rows_dropped_total",
    MetricSource.EXPERTS,
    "Rows that skipped an expert because of moe.capacity_factor.",
)
EXPERT_MOVES = _counter(
    "expert_moves_total", MetricSource.EXPERTS, "Experts fetched by ranks to follow the load."
)
EXPERT_IMBALANCE = Metric(
    name="penstock_expert_imbalance",
    kind=MetricKind.GAUGE,
    source=MetricSource.EXPERTS,
    help="Rows of the busiest rank over the mean of all ranks, lately, by decoder layer.",
    labels=("model", "layer"),
)

METRICS: tuple[Metric, ...] = (
    REQUESTS,
    OVERFLOWS,
    RESUMES,
    REPLAYED_TOKENS,
    ACTIVE_REQUESTS,
    TTFT,
    TPOT,
    E2E,
    QUEUE,
    PROMPT_TOKENS,
    GENERATED_TOKENS,
    PROMPT_LENGTH,
    OUTPUT_LENGTH,
    READY_REPLICAS,
    RUNNING,
    WAITING,
    WAITING_TOKENS,
    KV_BLOCKS,
    KV_BLOCKS_FREE,
    PREEMPTIONS,
    PREFIX_HIT_TOKENS,
    PREFIX_QUERY_TOKENS,
    STEPS,
    STEP_SECONDS,
    STEP_TOKENS,
    ENGINE_TOKENS,
    LOST_RANKS,
    EXPERT_ROWS,
    EXPERT_DROPPED,
    EXPERT_MOVES,
    EXPERT_IMBALANCE,
    DRAFT_TOKENS,
    ACCEPTED_DRAFT_TOKENS,
    STREAMED_BYTES,
    STREAM_WAIT_SECONDS,
    STREAMED_EXPERT_HITS,
    STREAMED_EXPERT_MISSES,
    EARLY_EXPERTS_USED,
    EARLY_EXPERTS_WASTED,
)
"""Every metric, gateway's first."""
