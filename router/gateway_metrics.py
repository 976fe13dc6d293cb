"""The gateway's Prometheus series, made from the metrics table.

One observation per request and one counter step per piece: nothing here costs per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.base import metrics as table
from cluster.base.errors import PenstockError
from cluster.base.metrics import Metric
from router.api import ModelInfo
from router.resume import Move

OK = "ok"
_UNKNOWN = "unknown"


class ModelSeries:
    """The series of one model, looked up once: a lookup costs as much as an observation."""

    def __init__(self, metrics: GatewayMetrics, model: str) -> None:
        self._requests = metrics.requests
        self._overflows = metrics.overflows
        self._model = model
        self.active = metrics.active.labels(model)
        self.ttft = metrics.ttft.labels(model)
        self.tpot = metrics.tpot.labels(model)
        self.e2e = metrics.e2e.labels(model)
        self.queue = metrics.queue.labels(model)
        self.prompt_length = metrics.prompt_length.labels(model)
        self.output_length = metrics.output_length.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.generated_tokens = metrics.generated_tokens.labels(model)

    def begin(self) -> None:
        """A request is here."""
        self.active.inc()

    def end(self, error: BaseException | None) -> None:
        """It has ended, well if `error` is None."""
        self.active.dec()
        self._requests.labels(self._model, _code(error)).inc()

    def went_over(self, why: str) -> None:
        """A request ran on another entry than the one asked for."""
        self._overflows.labels(self._model, why).inc()


class GatewayMetrics:
    """All series of one gateway, in a registry of their own."""

    def __init__(self, read_models: Callable[[], list[ModelInfo]]) -> None:
        """`read_models` is asked for the number of ready replicas at each scrape."""
        self.registry = CollectorRegistry()
        self.requests = self._counter(table.REQUESTS)
        self.overflows = self._counter(table.OVERFLOWS)
        self._resumes = self._counter(table.RESUMES)
        self._replayed_tokens = self._counter(table.REPLAYED_TOKENS)
        self.active = Gauge(
            table.ACTIVE_REQUESTS.name,
            table.ACTIVE_REQUESTS.help,
            table.ACTIVE_REQUESTS.labels,
            registry=self.registry,
        )
        self.ttft = self._histogram(table.TTFT)
        self.tpot = self._histogram(table.TPOT)
        self.e2e = self._histogram(table.E2E)
        self.queue = self._histogram(table.QUEUE)
        self.prompt_length = self._histogram(table.PROMPT_LENGTH)
        self.output_length = self._histogram(table.OUTPUT_LENGTH)
        self.prompt_tokens = self._counter(table.PROMPT_TOKENS)
        self.generated_tokens = self._counter(table.GENERATED_TOKENS)
        self._read_models = read_models
        self._ready = Gauge(
            table.READY_REPLICAS.name,
            table.READY_REPLICAS.help,
            table.READY_REPLICAS.labels,
            registry=self.registry,
        )
        self.known: set[str] = set()
        self._series: dict[str, ModelSeries] = {}
        self.follow_models()

    def follow_models(self) -> None:
        """Have series of the models that are served now; those of others are kept, but for how
        many replicas are ready."""
        served = {info.name for info in self._read_models()}
        for name in self.known - served:
            self._ready.remove(name)
        for name in served - self.known:
            count = functools.partial(_count_ready, self._read_models, name)
            self._ready.labels(name).set_function(count)
        self.known = served

    def of(self, model: object) -> ModelSeries:
        """The model's series; names nobody serves share one, so that labels stay bounded."""
        label = self._label(model)
        series = self._series.get(label)
        if series is None:
            series = self._series[label] = ModelSeries(self, label)
        return series

    def note_move(self, move: Move) -> None:
        """A request has lost its replica, and this became of it."""
        model = self._label(move.model)
        self._resumes.labels(model, move.reason.value, move.outcome.value).inc()
        self._replayed_tokens.labels(model).inc(move.num_replayed_tokens)

    def _label(self, model: object) -> str:
        return model if isinstance(model, str) and model in self.known else _UNKNOWN

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self.registry)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(
            metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry
        )


def _code(error: BaseException | None) -> str:
    if error is None:
        return OK
    return error.code if isinstance(error, PenstockError) else "cancelled"


def _count_ready(read_models: Callable[[], list[ModelInfo]], name: str) -> int:
    return sum(info.ready_replicas for info in read_models() if info.name == name)
