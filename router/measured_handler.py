"""A handler that observes another one; a front cannot tell them apart."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

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
from router.gateway_metrics import GatewayMetrics, ModelSeries

InputT = TypeVar("InputT", EmbedInput, ScoreInput)
AnswerT = TypeVar("AnswerT", EmbedOutput, ScoreOutput)


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
        series = self._metrics.of(request.model)
        started_s = self._clock()
        series.begin()
        try:
            generation = await self._inner.generate(request)
        except BaseException as error:
            series.end(error)
            raise
        series.queue.observe(self._clock() - started_s)
        if generation.tier is not None and generation.tier.overflow:
            series.went_over(generation.tier.overflow)
        pieces = _MeasuredPieces(generation.pieces, series, self._clock, started_s)
        return dataclasses.replace(generation, pieces=pieces)

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

    async def cancel(self, request_id: str) -> bool:
        """As the inner handler."""
        return await self._inner.cancel(request_id)

    async def status(self) -> dict[str, Any]:
        """As the inner handler."""
        return await self._inner.status()

    def ready(self) -> bool:
        """As the inner handler."""
        return self._inner.ready()

    async def _whole(
        self, model: object, call: Callable[[InputT], Awaitable[AnswerT]], request: InputT
    ) -> AnswerT:
        series = self._metrics.of(model)
        started_s = self._clock()
        series.begin()
        try:
            answer = await call(request)
        except BaseException as error:
            series.end(error)
            raise
        series.e2e.observe(self._clock() - started_s)
        series.prompt_tokens.inc(answer.usage.prompt_tokens)
        series.end(None)
        return answer


class _MeasuredPieces(AsyncIterator[Piece]):
    """Passes pieces through and observes first token and end, once each."""

    def __init__(
        self,
        inner: PieceStream,
        series: ModelSeries,
        clock: Callable[[], float],
        started_s: float,
    ) -> None:
        self._inner = inner
        self._series = series
        self._clock = clock
        self._started_s = started_s
        self._first_s: float | None = None
        self._usage: Usage | None = None
        self._open = True

    async def __anext__(self) -> Piece:
        try:
            piece = await anext(self._inner)
        except StopAsyncIteration:
            self._close(None)
            raise
        except BaseException as error:
            self._close(error)
            raise
        if self._first_s is None and piece.token_ids:
            self._first_s = self._clock()
            self._series.ttft.observe(self._first_s - self._started_s)
        self._usage = piece.usage or self._usage
        return piece

    async def aclose(self) -> None:
        """Close the inner stream; one whose usage was not seen was left by its client."""
        await self._inner.aclose()
        self._close(None if self._usage is not None else GeneratorExit())

    def _close(self, error: BaseException | None) -> None:
        """Observe the end, once."""
        if not self._open:
            return
        self._open = False
        if error is None:
            self._observe_whole()
        self._series.end(error)

    def _observe_whole(self) -> None:
        now_s, series, usage = self._clock(), self._series, self._usage
        series.e2e.observe(now_s - self._started_s)
        if usage is None:
            return
        series.prompt_tokens.inc(usage.prompt_tokens)
        series.generated_tokens.inc(usage.completion_tokens)
        series.prompt_length.observe(usage.prompt_tokens)
        series.output_length.observe(usage.completion_tokens)
        if self._first_s is not None and usage.completion_tokens > 1:
            series.tpot.observe((now_s - self._first_s) / (usage.completion_tokens - 1))
