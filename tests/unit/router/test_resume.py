"""Requests whose replica is lost: where they go, when they end, and what is said of it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from functools import partial
from types import SimpleNamespace

import pytest
from fake_engine import FakeEngine
from gateway_harness import (
    LIMITS,
    MODEL,
    FakeReplica,
    Gateway,
    fake_replica,
    model_plan,
    running_gateway,
    until,
)
from hops import FAST
from mortal_engine import Fate, MortalEngine

from cluster.base.errors import (
    DeadlineExceededError,
    PenstockError,
    UnavailableError,
    WorkerDiedError,
)
from replicas.api import ChoiceProgress, FinishReason, GenerationRequest
from replicas.leader.record import ReplicaState
from router.api import EmbedInput, GenerationInput, Piece, ScoreInput, TextOrIds
from router.gateway_metrics import GatewayMetrics
from router.loss import Loss, LossReason
from router.request_channel import RequestChannel
from router.resume import Move, Outcome, Resumer, Trip
from router.served_model import serve_models

TEXT = "snow ⛄ and 雪, then STOP here and tail"


def a_request(**fields) -> GenerationInput:
    sampling = {"max_tokens": 40} | fields.pop("sampling", {})
    return GenerationInput(**{"model": MODEL, "text": TEXT, "sampling": sampling} | fields)


async def read(gateway: Gateway, request: GenerationInput) -> tuple[list[Piece], object]:
    """All pieces, and the error that ended them if one did."""
    pieces: list[Piece] = []
    try:
        generation = await gateway.handler.generate(request)
        async for piece in generation.pieces:
            pieces.append(piece)  # noqa: PERF401 (kept when the stream fails)
    except PenstockError as error:
        return pieces, error
    return pieces, None


def said(pieces: list[Piece], index: int = 0) -> tuple[object, ...]:
    """All that concerns a choice, and the usage of the request, which rides on any one's last."""
    mine = [piece for piece in pieces if piece.index == index]
    return (
        "".join(piece.text for piece in mine),
        [token for piece in mine for token in piece.token_ids],
        [score for piece in mine for score in piece.logprobs],
        [piece.finish_reason for piece in mine if piece.finish_reason],
        [piece.stop_reason for piece in mine if piece.stop_reason],
        [piece.usage for piece in pieces if piece.usage],
    )


def mortals(fate: Fate, count: int = 2, step_s: float = 0.001) -> list[MortalEngine]:
    return [MortalEngine(FakeEngine(step_s=step_s), fate) for _ in range(count)]


def is_whole(gateway: Gateway) -> bool:
    return len(gateway.directory.snapshot(MODEL)) == len(gateway.replicas)


async def the_busy_one(gateway: Gateway) -> FakeReplica:
    await until(lambda: any(replica.engine.num_running for replica in gateway.replicas))
    return next(replica for replica in gateway.replicas if replica.engine.num_running)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"stop": ["STOP"]},
        {"stop": ["STOP"], "include_stop_in_output": True, "n": 2, "logprobs": 1},
        {"stop": ["雪", "STOP"], "min_tokens": 20},
    ],
    ids=["bytes of letters", "stop", "choices", "minimum"],
)
async def test_no_byte_is_missing_or_said_twice_wherever_the_cut_is(checkpoint, sampling):
    fate, request = Fate(), a_request(sampling=sampling)
    engines = mortals(fate)
    async with running_gateway(
        checkpoint, engines=engines, hop=FAST, resume_wait_s=10.0
    ) as gateway:
        undisturbed, _ = await read(gateway, request)
        num_choices = sampling.get("n", 1)
        for steps in range(41):
            fate.plan(-1, deaths=0)
            await until(lambda: not any(engine.num_running for engine in engines))
            await until(lambda: is_whole(gateway))
            fate.plan(steps)
            pieces, error = await read(gateway, request)
            assert error is None
            for index in range(num_choices):
                assert said(pieces, index) == said(undisturbed, index), steps
        assert "STOP" in TEXT
        assert len(gateway.moves) >= 20


async def test_it_survives_as_many_losses_as_it_may_and_not_one_more(checkpoint):
    fate, request = Fate(), a_request()
    async with running_gateway(checkpoint, engines=mortals(fate, 3), hop=FAST) as gateway:
        undisturbed, _ = await read(gateway, request)
        fate.plan(4, says_so=True, deaths=2)
        pieces, error = await read(gateway, request)
        assert error is None
        assert said(pieces) == said(undisturbed)
        await until(lambda: is_whole(gateway))
        fate.plan(4, says_so=True, deaths=3)
        pieces, error = await read(gateway, request)
        assert isinstance(error, WorkerDiedError)
        assert error.cause == (
            "rank 1 was killed. The request has lost 3 replicas and is not moved again "
            "(gateway.limits.max_resumes). 12 output tokens were delivered."
        )
        assert "the request is the cause" in error.remedy
        assert said(pieces)[1] == said(undisturbed)[1][:12]
        outcomes = [move.outcome for move in gateway.moves]
        assert outcomes == [Outcome.RESUMED] * 4 + [Outcome.LIMIT]
        assert {move.reason for move in gateway.moves} == {LossReason.FAILED}
        assert [move.num_replayed_tokens for move in gateway.moves][2:] == [
            undisturbed[-1].usage.prompt_tokens + told for told in (4, 8)
        ] + [0]
        assert (await gateway.handler.status())["resumed_requests"] == 4


async def test_what_stands_in_the_limits_counts_from_the_next_loss_on(checkpoint):
    fate = Fate()
    async with running_gateway(checkpoint, engines=mortals(fate), hop=FAST) as gateway:
        models = serve_models([model_plan(checkpoint)])
        gateway.handler.serve(models, dataclasses.replace(LIMITS, max_resumes=0))
        fate.plan(3, says_so=True)
        _, error = await read(gateway, a_request())
        assert isinstance(error, WorkerDiedError)
        assert error.cause == "rank 1 was killed. 3 output tokens were delivered."
        gateway.handler.serve(models, LIMITS)
        await until(lambda: is_whole(gateway))
        fate.plan(3, says_so=True)
        assert (await read(gateway, a_request()))[1] is None


async def test_without_another_replica_it_ends_within_the_wait_and_says_why(checkpoint):
    async with running_gateway(checkpoint, hop=FAST) as gateway:
        gateway.engine.step_s = 0.01
        reading = asyncio.create_task(read(gateway, a_request(sampling={"max_tokens": 500})))
        await until(lambda: gateway.engine.num_running == 1)
        await asyncio.sleep(0.1)
        await gateway.replicas[0].kill()
        begun_s = time.monotonic()
        pieces, error = await reading
        assert time.monotonic() - begun_s < 1.0
        assert isinstance(error, UnavailableError)
        num_tokens = len(said(pieces)[1])
        assert num_tokens > 0
        assert "within 0.5 s" in error.cause
        assert f"{num_tokens} output tokens were delivered" in error.cause
        assert gateway.moves == [
            Move(model=MODEL, reason=LossReason.CUT, outcome=Outcome.NO_REPLICA)
        ]


async def test_a_single_replica_that_comes_back_in_time_goes_on(checkpoint):
    fate, request = Fate(), a_request()
    async with running_gateway(checkpoint, engines=mortals(fate, 1), hop=FAST) as gateway:
        undisturbed, _ = await read(gateway, request)
        fate.plan(5)
        pieces, error = await read(gateway, request)
        assert error is None
        assert said(pieces) == said(undisturbed)


async def test_another_one_that_comes_later_is_waited_for(checkpoint):
    async with (
        running_gateway(checkpoint, hop=FAST, resume_wait_s=5.0) as gateway,
        fake_replica(FakeEngine(), "late") as late,
    ):
        gateway.engine.step_s = 0.01
        reading = asyncio.create_task(read(gateway, a_request(sampling={"max_tokens": 50})))
        await until(lambda: gateway.engine.num_running == 1)
        await gateway.replicas[0].kill()
        await asyncio.sleep(0.1)
        assert not reading.done()
        await gateway.membership.publish(late.record)
        pieces, error = await reading
        assert error is None
        assert len(said(pieces)[1]) == 50
        assert late.engine.requests[0].resumed


@pytest.fixture
async def waiting(checkpoint):
    """A gateway, and a request that waits for a replica."""
    async with running_gateway(checkpoint, hop=FAST, resume_wait_s=30.0) as gateway:
        gateway.engine.step_s = 0.01
        request = a_request(request_id="waits", timeout_s=1.0, sampling={"max_tokens": 500, "n": 2})
        generation = await gateway.handler.generate(request)
        await anext(generation.pieces)
        await gateway.replicas[0].kill()
        await until(lambda: not gateway.directory.snapshot(MODEL))
        yield gateway, generation.pieces


async def nobody_waits(gateway: Gateway) -> bool:
    await until(lambda: not gateway.handler._dispatcher._resumer._waiting, timeout_s=0.2)
    return True


async def test_cancelled_while_it_moves(waiting):
    gateway, pieces = waiting
    assert await gateway.handler.cancel("waits")
    rest = [piece async for piece in pieces]
    assert [piece.finish_reason for piece in rest][-2:] == [FinishReason.ABORT] * 2
    assert await nobody_waits(gateway)


async def test_its_deadline_holds_while_it_moves(waiting):
    gateway, pieces = waiting
    begun_s = time.monotonic()
    with pytest.raises(DeadlineExceededError, match="1 s"):
        async for _ in pieces:
            pass
    assert time.monotonic() - begun_s < 1.5
    assert await nobody_waits(gateway)


async def test_a_client_that_leaves_while_it_moves_leaves_nothing(waiting):
    gateway, pieces = waiting
    await pieces.aclose()
    assert await nobody_waits(gateway)
    assert (await gateway.handler.status())["active_requests"] == 0


async def test_requests_that_have_not_begun_go_elsewhere_at_once(checkpoint):
    async with running_gateway(
        checkpoint, engines=[FakeEngine(), FakeEngine()], hop=FAST
    ) as gateway:
        for replica in gateway.replicas:
            replica.engine.paused.set()
        text = TextOrIds(text="abc")
        requests = [
            read(gateway, a_request()),
            read(gateway, a_request(sampling={"max_tokens": 0, "prompt_logprobs": 0})),
            gateway.handler.embed(EmbedInput(model=MODEL, inputs=[text, text])),
            gateway.handler.score(ScoreInput(model=MODEL, prompt=text, continuations=[text])),
        ]
        reading = asyncio.gather(*requests)
        first, second = gateway.replicas
        await until(lambda: first.engine.num_running + second.engine.num_running == 5)
        num_lost = first.engine.num_running
        assert num_lost > 0
        await first.kill()
        await until(lambda: second.engine.num_running == 5)
        second.engine.paused.clear()
        (pieces, error), (scored, problem), embedded, score = await reading
        assert error is problem is None
        assert len(said(pieces)[1]) == 40
        assert len([s for piece in scored for s in piece.prompt_logprobs]) == len(TEXT.encode())
        assert len(embedded.vectors) == 2
        assert len(score.scores[0]) == 3
        assert [move.outcome for move in gateway.moves] == [Outcome.RESUMED] * num_lost
        assert len([r for r in second.engine.requests if r.resumed]) == num_lost


async def test_a_replica_that_is_taken_away_gives_its_streams_to_the_others(checkpoint):
    async with running_gateway(
        checkpoint, engines=mortals(Fate(), 3, step_s=0.005), hop=FAST, max_resumes=1
    ) as gateway:
        request = a_request(sampling={"max_tokens": 300})
        undisturbed, _ = await read(gateway, request)
        reading = asyncio.create_task(read(gateway, request))
        for num_left in (2, 1):  # of them no loss counts
            leaving = await the_busy_one(gateway)
            assert not await leaving.server.drain(0.05)
            await until(lambda left=num_left: len(gateway.directory.snapshot(MODEL)) == left)
            leaving.engine.end_all(UnavailableError("The replica is shutting down."))
            await leaving.kill()
        pieces, error = await reading
        assert error is None
        assert said(pieces) == said(undisturbed)
        assert [(move.reason, move.outcome) for move in gateway.moves] == [
            (LossReason.DRAINED, Outcome.RESUMED)
        ] * 2


async def test_a_stream_stays_with_replicas_that_are_built_alike(checkpoint):
    async with (
        running_gateway(checkpoint, hop=FAST) as gateway,
        fake_replica(FakeEngine(), "other") as other,
    ):
        gateway.engine.step_s = 0.01
        mine = dataclasses.replace(gateway.replicas[0].record, version="a")
        await gateway.membership.publish(dataclasses.replace(mine, epoch="gone"))
        await until(lambda: not gateway.directory.snapshot(MODEL))
        await gateway.membership.publish(mine)
        await until(lambda: len(gateway.directory.snapshot(MODEL)) == 1)
        reading = asyncio.create_task(read(gateway, a_request(sampling={"max_tokens": 500})))
        await until(lambda: gateway.engine.num_running == 1)
        theirs = dataclasses.replace(other.record, version="b")
        await gateway.membership.publish(mine, theirs)
        await until(lambda: len(gateway.directory.snapshot(MODEL)) == 2)
        await gateway.replicas[0].kill()
        _, error = await reading
        assert isinstance(error, UnavailableError)
        assert other.engine.requests == []
        assert (await read(gateway, a_request()))[1] is None  # new ones may go there


async def test_a_replica_listed_as_failed_loses_its_requests_at_once(checkpoint):
    async with running_gateway(
        checkpoint, engines=[FakeEngine(), FakeEngine()], hop=FAST
    ) as gateway:
        for replica in gateway.replicas:
            replica.engine.step_s = 0.005
        reading = asyncio.create_task(read(gateway, a_request(sampling={"max_tokens": 200})))
        await until(lambda: any(r.engine.num_running for r in gateway.replicas))
        lost, other = sorted(gateway.replicas, key=lambda r: not r.engine.num_running)
        failed = dataclasses.replace(
            lost.record,
            state=ReplicaState.FAILED,
            error=WorkerDiedError("rank 0 was killed").to_dict(),
        )
        await gateway.membership.publish(failed, other.record)
        pieces, error = await reading
        assert error is None
        assert len(said(pieces)[1]) == 200
        assert [move.reason for move in gateway.moves] == [LossReason.FAILED]


async def test_a_gateway_that_leaves_takes_its_requests_along(checkpoint):
    async with running_gateway(
        checkpoint, engines=[FakeEngine(), FakeEngine()], hop=FAST
    ) as gateway:
        reading = asyncio.create_task(read(gateway, a_request(sampling={"max_tokens": 900})))
        await until(lambda: any(r.engine.num_running for r in gateway.replicas))
        await gateway.directory.close()
        _, error = await reading
        assert isinstance(error, UnavailableError)
        assert "shutting down" in error.cause
        assert gateway.moves == []


async def test_only_choices_that_have_not_ended_go_on(checkpoint):
    fate = Fate()
    request = a_request(sampling={"n": 3, "stop": ["n"], "max_tokens": 30})
    engines = mortals(fate, step_s=0.005)
    async with running_gateway(checkpoint, engines=engines, hop=FAST) as gateway:
        undisturbed, _ = await read(gateway, request)
        fate.plan(12)
        pieces, error = await read(gateway, request)
        assert error is None
        assert [said(pieces, index) for index in range(3)] == [
            said(undisturbed, index) for index in range(3)
        ]


async def test_a_replica_that_is_ready_before_anybody_listens_is_not_missed():
    submitted, moves = [], []
    stream = SimpleNamespace(endpoint="r1", submit=lambda rest, channel: submitted.append(rest))
    answers = iter([None, stream])
    never = asyncio.Event()
    resumer = Resumer(lambda *_: next(answers), never.wait, LIMITS, moves.append)
    trip = Trip(model=MODEL, version="")
    request = GenerationRequest(request_id="r", prompt_token_ids=(1, 2))
    channel = RequestChannel(request, limit=16, on_loss=partial(resumer.lose, trip))
    channel.lose(Loss.of(UnavailableError("cut"), is_draining=False))
    await until(lambda: bool(submitted))
    assert submitted[0].resumed == (ChoiceProgress(index=0),)
    assert [move.outcome for move in moves] == [Outcome.RESUMED]


def test_moves_are_counted_by_reason_and_outcome():
    metrics = GatewayMetrics(list)
    metrics.known = {MODEL}
    metrics.note_move(
        Move(
            model=MODEL,
            reason=LossReason.CUT,
            outcome=Outcome.RESUMED,
            num_replayed_tokens=31,
        )
    )
    metrics.note_move(Move(model=MODEL, reason=LossReason.CUT, outcome=Outcome.LIMIT))
    sample = metrics.registry.get_sample_value
    labels = {"model": MODEL, "reason": "cut"}
    assert sample("penstock_resumes_total", labels | {"outcome": "resumed"}) == 1
    assert sample("penstock_resumes_total", labels | {"outcome": "limit"}) == 1
    assert sample("penstock_replayed_tokens_total", {"model": MODEL}) == 31
