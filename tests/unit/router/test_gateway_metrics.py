"""The measured handler: one observation per request, labels bounded, streams passed through."""

import pytest

from cluster.base.errors import InvalidRequestError, OverloadedError
from cluster.base.metrics import METRICS, MetricSource
from replicas.api import FinishReason
from router.api import Generation, GenerationInput, ModelInfo, Piece, Usage
from router.gateway_metrics import GatewayMetrics
from router.measured_handler import MeasuredHandler


class Clock:
    now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


class Stream:
    """Three pieces, half a second apart; may fail at the last."""

    def __init__(self, clock: Clock, failure: Exception | None) -> None:
        self.closed = False
        self._clock = clock
        self._failure = failure
        self._pieces = [
            Piece(index=0, text="a", token_ids=(1,)),
            Piece(index=0, text="b", token_ids=(2,)),
            Piece(
                index=0,
                text="c",
                token_ids=(3,),
                finish_reason=FinishReason.LENGTH,
                usage=Usage(prompt_tokens=7, completion_tokens=3),
            ),
        ]

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Piece:
        if not self._pieces:
            raise StopAsyncIteration
        if self._failure is not None and len(self._pieces) == 1:
            raise self._failure
        self._clock.now_s += 0.5
        return self._pieces.pop(0)

    async def aclose(self) -> None:
        self.closed = True


class FakeHandler:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.refusal: Exception | None = None
        self.failure: Exception | None = None
        self.stream: Stream | None = None

    async def generate(self, request: GenerationInput) -> Generation:
        if self.refusal is not None:
            raise self.refusal
        self.clock.now_s += 0.25
        self.stream = Stream(self.clock, self.failure)
        return Generation(request_id="r", model="m", created=0, pieces=self.stream)

    def list_models(self) -> list[ModelInfo]:
        return [
            ModelInfo(
                name="m", family="llama", engine="tensor_parallel", max_context=8, vocab_size=8,
                ready_replicas=2, replicas=2, chat=False, created=0,
            )
        ]  # fmt: skip


@pytest.fixture
def parts():
    clock = Clock()
    inner = FakeHandler(clock)
    metrics = GatewayMetrics(inner.list_models)
    return inner, metrics, MeasuredHandler(inner, metrics, clock)


def value(metrics: GatewayMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"penstock_{name}", {"model": "m", **labels})


def test_every_gateway_metric_of_the_table_is_exported(parts):
    _, metrics, _ = parts
    exported = {family.name for family in metrics.registry.collect()}
    declared = {
        metric.name.removesuffix("_total")
        for metric in METRICS
        if metric.source is MetricSource.GATEWAY
    }
    assert exported == declared


async def test_a_finished_stream_is_observed_once(parts):
    inner, metrics, handler = parts
    generation = await handler.generate(GenerationInput(model="m", text="x"))
    assert value(metrics, "active_requests") == 1
    text = "".join([piece.text async for piece in generation.pieces])
    await generation.pieces.aclose()
    assert text == "abc"
    assert inner.stream.closed
    assert value(metrics, "active_requests") == 0
    assert value(metrics, "requests_total", code="ok") == 1
    assert value(metrics, "queue_seconds_sum") == 0.25
    assert value(metrics, "ttft_seconds_sum") == 0.75
    assert value(metrics, "tpot_seconds_sum") == 0.5
    assert value(metrics, "e2e_seconds_sum") == 1.75
    assert value(metrics, "generated_tokens_total") == 3
    assert value(metrics, "prompt_length_tokens_sum") == 7


async def test_refusals_failures_and_leaving_are_counted_by_code(parts):
    inner, metrics, handler = parts
    inner.refusal = OverloadedError("full")
    with pytest.raises(OverloadedError):
        await handler.generate(GenerationInput(model="m", text="x"))
    inner.refusal = None
    inner.failure = InvalidRequestError("bad")
    generation = await handler.generate(GenerationInput(model="m", text="x"))
    with pytest.raises(InvalidRequestError):
        [piece async for piece in generation.pieces]
    inner.failure = None
    generation = await handler.generate(GenerationInput(model="m", text="x"))
    await anext(generation.pieces)
    await generation.pieces.aclose()
    await generation.pieces.aclose()
    counts = {
        code: value(metrics, "requests_total", code=code)
        for code in ("overloaded", "invalid_request", "cancelled")
    }
    assert counts == {"overloaded": 1, "invalid_request": 1, "cancelled": 1}
    assert value(metrics, "active_requests") == 0


async def test_names_nobody_serves_share_one_label(parts):
    _, metrics, handler = parts
    for name in ("a", "b", 7, None):
        generation = await handler.generate(GenerationInput(model=name, text="x"))
        await generation.pieces.aclose()
    assert (
        metrics.registry.get_sample_value(
            "penstock_requests_total", {"model": "unknown", "code": "cancelled"}
        )
        == 4
    )
