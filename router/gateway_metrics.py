"""The gateway's Prometheus series: made from the metrics table, fed by a wrapper of the handler.

`MeasuredHandler` changes nothing a front can see. One observation per request and one counter step
per piece: nothing here costs per token.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.base import metrics as table
from cluster.base.errors import PenstockError
from cluster.base.metrics import Metric
from router.api import (
    ChatTurn,
    EmbedInput,
    EmbedOutput,
    Generation,
    GenerationInput,
    Handler,
    ModelInfo,
    Piece,
    PieceStream,
    ScoreInput,
    ScoreOutput,
    Usage,
)

InputT = TypeVar("InputT", EmbedInput, ScoreInput)
AnswerT = TypeVar("AnswerT", EmbedOutput, ScoreOutput)

OK = "ok"
_UNKNOWN = "unknown"


class GatewayMetrics:
    """All series of one gateway, in a registry of their own."""

    def __init__(self, read_models: Callable[[], list[ModelInfo]]) -> None:
        """`read_models` is asked for the number of ready replicas at each scrape."""
        self.registry = CollectorRegistry()
        self.requests = self._counter(table.REQUESTS)
        self.overflows = self._counter(table.OVERFLOWS)
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
        ready = Gauge(
            table.READY_REPLICAS.name,
            table.READY_REPLICAS.help,
            table.READY_REPLICAS.labels,
            registry=self.registry,
        )
        self.known = {info.name for info in read_models()}
        for name in self.known:
            ready.labels(name).set_function(functools.partial(_ready, read_models, name))

    def label(self, model: object) -> str:
        """The model's label; names nobody serves share one, so that labels stay bounded."""
        return model if isinstance(model, str) and model in self.known else _UNKNOWN

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self.registry)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(
            metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry
        )


class MeasuredHandler:
    """A `Handler` that observes another one."""

    def __init__(
        self,
        inner: Handler,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._inner = inner
        self._metrics = metrics
        self._clock = clock

    async def generate(self, request: GenerationInput) -> Generation:
        """As the inner handler; measures the stream to its end."""
        model = self._metrics.label(request.model)
        started_s = self._clock()
        self._metrics.active.labels(model).inc()
        try:
            generation = await self._inner.generate(request)
        except BaseException as error:
            self._end(model, error)
            raise
        self._metrics.queue.labels(model).observe(self._clock() - started_s)
        if generation.tier is not None and generation.tier.overflow:
            self._metrics.overflows.labels(model, generation.tier.overflow).inc()
        return dataclasses.replace(
            generation, pieces=_MeasuredPieces(generation.pieces, self, model, started_s)
        )

    async def embed(self, request: EmbedInput) -> EmbedOutput:
        """As the inner handler; counted as one request."""
        return await self._whole(request.model, self._inner.embed, request)

    async def score(self, request: ScoreInput) -> ScoreOutput:
        """As the inner handler; counted as one request."""
        return await self._whole(request.model, self._inner.score, request)

    async def tokenize(
        self,
        model: object,
        text: object,
        messages: Sequence[ChatTurn] | None,
        add_special_tokens: bool,
    ) -> tuple[list[int], list[str]]:
        """As the inner handler."""
        return await self._inner.tokenize(model, text, messages, add_special_tokens)

    async def detokenize(self, model: object, token_ids: object, skip_special: bool) -> str:
        """As the inner handler."""
        return await self._inner.detokenize(model, token_ids, skip_special)

    def list_models(self) -> list[ModelInfo]:
        """As the inner handler."""
        return self._inner.list_models()

    def cancel(self, request_id: str) -> bool:
        """As the inner handler."""
        return self._inner.cancel(request_id)

    async def status(self) -> dict[str, Any]:
        """As the inner handler."""
        return await self._inner.status()

    def ready(self) -> bool:
        """As the inner handler."""
        return self._inner.ready()

    async def _whole(
        self, model: object, call: Callable[[InputT], Awaitable[AnswerT]], request: InputT
    ) -> AnswerT:
        label = self._metrics.label(model)
        started_s = self._clock()
        self._metrics.active.labels(label).inc()
        try:
            answer = await call(request)
        except BaseException as error:
            self._end(label, error)
            raise
        self._metrics.e2e.labels(label).observe(self._clock() - started_s)
        self._metrics.prompt_tokens.labels(label).inc(answer.usage.prompt_tokens)
        self._end(label, None)
        return answer

    def _end(self, model: str, error: BaseException | None) -> None:
        self._metrics.active.labels(model).dec()
        self._metrics.requests.labels(model, _code(error)).inc()

    def finish_stream(
        self, model: str, started_s: float, first_s: float | None, usage: Usage | None
    ) -> None:
        """Observe a stream that ended well."""
        now_s = self._clock()
        metrics = self._metrics
        metrics.e2e.labels(model).observe(now_s - started_s)
        if usage is not None:
            metrics.prompt_tokens.labels(model).inc(usage.prompt_tokens)
            metrics.generated_tokens.labels(model).inc(usage.completion_tokens)
            metrics.prompt_length.labels(model).observe(usage.prompt_tokens)
            metrics.output_length.labels(model).observe(usage.completion_tokens)
            if first_s is not None and usage.completion_tokens > 1:
                tpot_s = (now_s - first_s) / (usage.completion_tokens - 1)
                metrics.tpot.labels(model).observe(tpot_s)
        self._end(model, None)

    def fail_stream(self, model: str, error: BaseException | None) -> None:
        """Observe a stream that failed, or that its client left (None)."""
        self._end(model, error if error is not None else GeneratorExit())

    def first_token(self, model: str, started_s: float) -> float:
        """Observe the first token; returns its time."""
        now_s = self._clock()
        self._metrics.ttft.labels(model).observe(now_s - started_s)
        return now_s


class _MeasuredPieces(AsyncIterator[Piece]):
    """Passes pieces through and observes first token and end, once each."""

    def __init__(
        self, inner: PieceStream, owner: MeasuredHandler, model: str, started_s: float
    ) -> None:
        self._inner = inner
        self._owner = owner
        self._model = model
        self._started_s = started_s
        self._first_s: float | None = None
        self._usage: Usage | None = None
        self._open = True

    async def __anext__(self) -> Piece:
        try:
            piece = await anext(self._inner)
        except StopAsyncIteration:
            if self._close():
                self._owner.finish_stream(self._model, self._started_s, self._first_s, self._usage)
            raise
        except BaseException as error:
            if self._close():
                self._owner.fail_stream(self._model, error)
            raise
        if self._first_s is None and piece.token_ids:
            self._first_s = self._owner.first_token(self._model, self._started_s)
        self._usage = piece.usage or self._usage
        return piece

    async def aclose(self) -> None:
        """Close the inner stream; a stream whose usage was seen has ended well."""
        await self._inner.aclose()
        if not self._close():
            return
        if self._usage is not None:
            self._owner.finish_stream(self._model, self._started_s, self._first_s, self._usage)
        else:
            self._owner.fail_stream(self._model, None)

    def _close(self) -> bool:
        was_open, self._open = self._open, False
        return was_open


def _code(error: BaseException | None) -> str:
    if error is None:
        return OK
    return error.code if isinstance(error, PenstockError) else "cancelled"


def _ready(read_models: Callable[[], list[ModelInfo]], name: str) -> int:
    return next(info.ready_replicas for info in read_models() if info.name == name)
