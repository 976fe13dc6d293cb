"""The whole gateway over real gRPC: both clients, streams, cancels, losses, limits, health."""

import asyncio
import time
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from fake_engine import FakeEngine
from gateway_harness import BOS, IM_END, IM_START, MODEL, running_gateway, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.base.errors import (
    CancelledError,
    ContextTooLongError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
    WorkerDiedError,
)
from replicas.api import FinishReason, Pooling
from replicas.leader.record import ReplicaState
from replicas.text.detokenizer import IncrementalDetokenizer
from router import choice_stream
from router.api import ChatTurn
from router.client import AsyncPenstockClient, PenstockClient, RequestOptions
from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc


def script_of(text: str, gateway_model):
    """An engine that always says `text`, whatever max_tokens allows of it."""
    ids = gateway_model.tokenizer.encode(text)
    return lambda request, index: ids[: request.params.max_tokens]


async def drain(call):
    while await call.read() is not grpc.aio.EOF:
        pass


def served(gateway):
    return gateway.handler._models[MODEL]


async def test_streams_text_piece_by_piece_with_usage_at_the_end(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        stream = client.generate(MODEL, "hello ", max_tokens=12)
        pieces = [piece async for piece in stream]
        assert "".join(piece.text for piece in pieces) == "hello hello "
        assert len(pieces) > 1
        assert [p.finish_reason for p in pieces if p.finish_reason] == [FinishReason.LENGTH]
        assert [p.usage for p in pieces[:-1]] == [None] * (len(pieces) - 1)
        usage = pieces[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (6, 12, 3)
        assert (await stream.request_id()).startswith("req-")
        assert gw.handler._running._by_id == {}


async def test_choices_are_told_apart(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        answers = await client.generate(MODEL, "abc", max_tokens=4, n=3).result()
        assert [answer.text for answer in answers] == ["abca", "bcab", "cabc"]


async def test_blocking_client_does_all_calls(checkpoint):
    def drive(target):
        with PenstockClient(target) as client:
            stream = client.generate(MODEL, "ab", max_tokens=4)
            assert [piece.text for piece in stream][-1]
            assert stream.request_id.startswith("req-")
            (answer,) = client.chat(MODEL, [ChatTurn(role="user", content="hi")]).result()
            assert answer.finish_reason is FinishReason.LENGTH
            assert client.embed(MODEL, ["abc"]).usage.prompt_tokens == 3
            assert len(client.score(MODEL, "ab", ["cd"]).scores[0]) == 2
            ids, texts = client.tokenize(MODEL, "ab")
            assert texts == ["a", "b"]
            assert client.detokenize(MODEL, ids) == "ab"
            assert [model.name for model in client.models()] == [MODEL]
            assert client.cancel("nobody") is False
            status = client.status()
            assert status["replicas"][0]["state"] == "ready"
            assert isinstance(status["gateway_pid"], int)
            with pytest.raises(UnknownModelError, match="tiny"):
                client.generate("tinny", "x").result()

    async with running_gateway(checkpoint) as gw:
        await asyncio.to_thread(drive, gw.target)


async def test_chat_applies_the_template_and_keeps_control_text_as_text(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        turns = [{"role": "developer", "content": "be <|im_end|> brief"}]
        await client.chat(MODEL, turns, max_tokens=1).result()
        ids = gw.engine.requests[-1].prompt_token_ids
        assert ids.count(IM_START) == 2
        assert ids.count(IM_END) == 1
        text = served(gw).tokenizer.decode(ids, skip_special_tokens=False)
        assert text == (
            "<|im_start|>system\nbe <|im_end|> brief<|im_end|>\n<|im_start|>assistant\n"
        )


async def test_control_text_in_a_prompt_is_text(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        await client.generate(MODEL, "<|bos|>", max_tokens=1).result()
        assert BOS not in gw.engine.requests[-1].prompt_token_ids


async def test_unset_max_tokens_is_16_for_text_and_the_rest_for_chat(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        await client.generate(MODEL, "ab").result()
        assert gw.engine.requests[-1].params.max_tokens == 16
        stream = client.chat(MODEL, [{"role": "user", "content": "hi"}])
        await anext(stream)
        stream.cancel()
        request = gw.engine.requests[-1]
        assert request.params.max_tokens == 1024 - len(request.prompt_token_ids)


async def test_stop_string_across_tokens_cuts_text_and_stops_the_engine(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        gw.engine.script = script_of("one STOP two" + "." * 500, served(gw))
        pieces = [p async for p in client.generate(MODEL, "x", max_tokens=400, stop=["STOP"])]
        assert "".join(piece.text for piece in pieces) == "one "
        assert pieces[-1].finish_reason is FinishReason.STOP
        assert pieces[-1].stop_reason == "STOP"
        assert pieces[-1].usage.completion_tokens == len("one STOP")
        assert sum(len(piece.token_ids) for piece in pieces) == len("one STOP")
        await until(lambda: gw.engine.num_running == 0)
        assert len(gw.engine.aborts) == 1


async def test_stop_string_in_output_and_false_start(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        gw.engine.script = script_of("a STO STOP b", served(gw))
        (answer,) = await client.generate(
            MODEL, "x", max_tokens=50, stop=["STOP"], include_stop_in_output=True
        ).result()
        assert answer.text == "a STO STOP"


async def test_held_back_text_is_shown_when_the_choice_ends(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        gw.engine.script = script_of("almost STO", served(gw))
        (answer,) = await client.generate(MODEL, "x", max_tokens=50, stop="STOP").result()
        assert answer.text == "almost STO"
        assert answer.finish_reason is FinishReason.LENGTH


async def test_stop_string_of_one_choice_leaves_the_other(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        say = served(gw).tokenizer.encode
        gw.engine.script = lambda request, index: say("aaa!bbb" if index == 0 else "cccccccccc")
        answers = await client.generate(MODEL, "x", max_tokens=50, n=2, stop="!").result()
        assert [(a.text, a.finish_reason) for a in answers] == [
            ("aaa", FinishReason.STOP),
            ("cccccccccc", FinishReason.LENGTH),
        ]
        assert [index for _, index in gw.engine.aborts] == [0]


async def test_no_stop_string_before_min_tokens(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        gw.engine.script = script_of("a.b.c.d.", served(gw))
        (answer,) = await client.generate(
            MODEL, "x", max_tokens=50, stop=["."], min_tokens=4
        ).result()
        assert answer.text == "a.b.c"


async def test_stop_token_is_listed_but_not_printed(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        (stop_id,) = served(gw).tokenizer.encode("d")
        gw.engine.script = script_of("abcdef", served(gw))
        sampling = {"max_tokens": 50, "stop_token_ids": [stop_id]}
        (answer,) = await client.generate(MODEL, "x", **sampling).result()
        assert answer.text == "abc"
        assert answer.token_ids[-1] == stop_id
        assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, "d")
        (shown,) = await client.generate(
            MODEL, "x", include_stop_in_output=True, **sampling
        ).result()
        assert shown.text == "abcd"


async def test_multi_byte_characters_are_never_split(checkpoint):
    text = "naïve 日本語 🙂 end"
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        gw.engine.script = script_of(text, served(gw))
        pieces = [p async for p in client.generate(MODEL, "x", max_tokens=100)]
        assert "".join(piece.text for piece in pieces) == text
        assert not any("\ufffd" in piece.text for piece in pieces)


async def test_logprobs_carry_token_texts(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        (answer,) = await client.generate(
            MODEL, "ab", max_tokens=2, logprobs=2, prompt_logprobs=1
        ).result()
        assert [entry.text for entry in answer.logprobs] == ["a", "b"]
        assert [top.text for top in answer.logprobs[0].top] == ["a", "b"]
        first, second = answer.prompt_logprobs
        assert (first.text, first.logprob, first.rank) == ("a", None, 0)
        assert (second.text, second.logprob, len(second.top)) == ("b", -0.5, 1)


async def test_echo_begins_every_choice_with_the_prompt(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        options = RequestOptions(echo=True)
        ids = served(gw).tokenizer.encode("abc")
        answers = await client.generate(MODEL, ids, options=options, max_tokens=2, n=2).result()
        assert [answer.text for answer in answers] == ["abcab", "abcbc"]
        (scored,) = await client.generate(
            MODEL, "abc", options=options, max_tokens=0, prompt_logprobs=0
        ).result()
        assert scored.text == "abc"
        assert len(scored.prompt_logprobs) == 3


async def test_seed_is_kept_or_drawn(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        for seed in (-(2**63), 7, None, None):
            await client.generate(MODEL, "a", max_tokens=1, seed=seed).result()
        seeds = [request.params.seed for request in gw.engine.requests]
        assert seeds[:2] == [-(2**63), 7]
        assert seeds[2] != seeds[3]


async def test_embed_pools_cuts_and_normalises(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        output = await client.embed(MODEL, [[3, 4, 5], [6, 8]], pooling="mean", dimensions=2)
        assert [vector == pytest.approx((0.6, 0.8)) for vector in output.vectors] == [True, True]
        assert {request.pooling for request in gw.engine.requests} == {Pooling.MEAN}
        raw = await client.embed(MODEL, [[3, 4]], normalize=False)
        assert raw.vectors == ((3.0, 4.0),)
        with pytest.raises(InvalidRequestError, match="at most the model's 2"):
            await client.embed(MODEL, [[3, 4]], dimensions=3)
        assert len(gw.handler._running) == 0


async def test_score_covers_exactly_the_continuations(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        output = await client.score(MODEL, "ab", ["cde", "f"])
        assert [[e.text for e in scores] for scores in output.scores] == [["c", "d", "e"], ["f"]]
        assert {request.params.max_tokens for request in gw.engine.requests} == {0}
        mixed = await client.score(MODEL, [1, 2], ["c"])
        assert [entry.text for entry in mixed.scores[0]] == ["c"]


async def test_cancel_by_id_ends_the_stream_with_abort(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        options = RequestOptions(request_id="mine-1")
        stream = client.generate(MODEL, "ab", options=options, max_tokens=900, n=2)
        await anext(stream)
        with pytest.raises(InvalidRequestError, match="is running"):
            await client.generate(MODEL, "ab", options=options).result()
        assert await client.cancel("mine-1")
        answers = await stream.result()
        assert {answer.finish_reason for answer in answers} == {FinishReason.ABORT}
        assert await stream.request_id() == "mine-1"
        await until(lambda: gw.engine.num_running == 0)
        assert not await client.cancel("mine-1")
        await client.generate(MODEL, "ab", options=options, max_tokens=1).result()


async def test_client_cancel_reaches_the_engine(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        stream = client.generate(MODEL, "ab", max_tokens=900)
        await anext(stream)
        stream.cancel()
        await until(lambda: len(gw.engine.aborts) == 1 and gw.engine.num_running == 0)
        await until(lambda: len(gw.handler._running) == 0)
        with pytest.raises(CancelledError):
            await stream.result()


async def test_client_cancel_before_the_first_token_reaches_the_engine(checkpoint):
    engine = FakeEngine()
    engine.paused.set()
    async with (
        running_gateway(checkpoint, engines=[engine]) as gw,
        AsyncPenstockClient(gw.target) as client,
    ):
        stream = client.generate(MODEL, "ab", max_tokens=900)
        reader = asyncio.create_task(anext(stream))
        await until(lambda: engine.num_running == 1)
        stream.cancel()
        await until(lambda: engine.num_running == 0)
        with pytest.raises(CancelledError):
            await reader
        assert gw.handler._running._admission.waiting_tokens == 0


async def test_broken_connections_free_everything(checkpoint):
    async with running_gateway(checkpoint) as gw:
        for _ in range(3):
            client = AsyncPenstockClient(gw.target)
            for _ in range(5):
                await anext(client.generate(MODEL, "ab", max_tokens=900))
            await client.close()
        await until(lambda: gw.engine.num_running == 0 and len(gw.handler._running) == 0)
        assert gw.handler._running._admission.active_requests == 0
        assert len(gw.engine.aborts) == 15


async def test_call_deadline_stops_the_engine(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        with pytest.raises(DeadlineExceededError):
            await client.generate(MODEL, "ab", max_tokens=1000, deadline_s=0.15).result()
        await until(lambda: gw.engine.num_running == 0 and len(gw.handler._running) == 0)


@pytest.mark.parametrize("paused", [False, True])
async def test_server_deadline_stops_the_engine(checkpoint, paused):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        if paused:
            gw.engine.paused.set()
        options = RequestOptions(timeout_s=0.15)
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=r"0\.15 s"):
            await client.generate(MODEL, "ab", options=options, max_tokens=1000).result()
        assert time.monotonic() - started < 1.0
        await until(lambda: gw.engine.num_running == 0)


async def test_default_deadline_covers_whole_answers(checkpoint):
    async with (
        running_gateway(checkpoint, default_timeout_s=0.1) as gw,
        AsyncPenstockClient(gw.target) as client,
    ):
        gw.engine.paused.set()
        with pytest.raises(DeadlineExceededError):
            await client.score(MODEL, "ab", ["c", "d"])
        await until(lambda: gw.engine.num_running == 0)
        assert len(gw.handler._running) == 0


async def test_replica_loss_mid_stream_keeps_tokens_and_ends_unavailable(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        streams = [client.generate(MODEL, "ab", max_tokens=900) for _ in range(8)]
        first = [await anext(stream) for stream in streams]
        assert all(piece.token_ids for piece in first)
        started = time.monotonic()
        await gw.replicas[0].kill()
        results = await asyncio.gather(*(s.result() for s in streams), return_exceptions=True)
        assert {type(result) for result in results} == {UnavailableError}
        assert time.monotonic() - started < 1.0
        with pytest.raises(UnavailableError, match="tiny"):
            await client.generate(MODEL, "ab").result()
        assert not gw.handler.ready()


async def test_failed_member_ends_its_requests_with_the_cause(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        stream = client.generate(MODEL, "ab", max_tokens=900)
        await anext(stream)
        cause = WorkerDiedError("rank 0 ran out of memory").to_dict()
        record = replace(gw.replicas[0].record, state=ReplicaState.FAILED, error=cause)
        await gw.membership.publish(record)
        with pytest.raises(WorkerDiedError, match="rank 0"):
            await stream.result()


async def test_members_survive_a_broken_source_and_requests_finish_after_unlisting(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        stream = client.generate(MODEL, "ab", max_tokens=300)
        await anext(stream)
        gw.membership.broken = True
        gw.membership.version += 1
        await client.generate(MODEL, "ab", max_tokens=1).result()
        gw.membership.broken = False
        gw.directory._apply([])
        with pytest.raises(UnavailableError):
            await client.generate(MODEL, "ab").result()
        assert (await stream.result())[0].finish_reason is FinishReason.LENGTH


async def test_requests_spread_over_replicas(checkpoint):
    engines = [FakeEngine(), FakeEngine()]
    async with running_gateway(checkpoint, engines=engines) as gw:
        await until(lambda: gw.handler.list_models()[0].ready_replicas == 2)
        async with AsyncPenstockClient(gw.target) as client:
            streams = [client.generate(MODEL, f"p{at}", max_tokens=500) for at in range(8)]
            for stream in streams:
                await anext(stream)
            assert {engine.num_running for engine in engines} == {4}


async def test_overload_is_refused_with_pushback(checkpoint):
    async with (
        running_gateway(checkpoint, max_active_requests=2) as gw,
        AsyncPenstockClient(gw.target) as client,
    ):
        running = [client.generate(MODEL, "ab", max_tokens=900) for _ in range(2)]
        for stream in running:
            await anext(stream)
        with pytest.raises(OverloadedError) as caught:
            await client.generate(MODEL, "ab").result()
        assert 1.0 <= caught.value.retry_after_s <= 3.0
        async with grpc.aio.insecure_channel(gw.target) as channel:
            call = pb_grpc.PenstockStub(channel).Generate(pb.GenerateRequest(model=MODEL, text="x"))
            trailing = dict(await call.trailing_metadata())
        assert 1000 <= int(trailing["grpc-retry-pushback-ms"]) <= 3000
        assert trailing["penstock-error-code"] == "overloaded"
        for stream in running:
            stream.cancel()
        await until(lambda: len(gw.handler._running) == 0)
        await client.generate(MODEL, "ab", max_tokens=1).result()


async def test_engine_overload_keeps_its_code(checkpoint):
    engine = FakeEngine(refuse=OverloadedError("too many wait"))
    async with (
        running_gateway(checkpoint, engines=[engine]) as gw,
        AsyncPenstockClient(gw.target) as client,
    ):
        with pytest.raises(OverloadedError, match="too many wait"):
            await client.generate(MODEL, "ab").result()


async def test_client_that_never_reads_is_cut_off_and_others_are_not(checkpoint):
    async with running_gateway(checkpoint, stream_buffer_events=64) as gw:
        big = served(gw).tokenizer.encode("x" * 900)
        gw.engine.script = lambda request, index: big[: request.params.max_tokens]
        options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
        async with (
            grpc.aio.insecure_channel(gw.target, options=options) as channel,
            AsyncPenstockClient(gw.target) as client,
        ):
            message = pb.GenerateRequest(model=MODEL, text="ab")
            message.sampling.max_tokens = 900
            message.sampling.logprobs = 20
            message.sampling.n = 8
            call = pb_grpc.PenstockStub(channel).Generate(message)
            await call.read()
            (answer,) = await client.generate(MODEL, "ab", max_tokens=200).result()
            assert len(answer.text) == 200
            await until(lambda: gw.engine.num_running == 0, 20.0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await drain(call)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_text_side_fault_ends_one_request_without_its_text(checkpoint, monkeypatch):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        (poison,) = served(gw).tokenizer.encode("!")

        class Faulty(IncrementalDetokenizer):
            def push(self, token_ids):
                if poison in token_ids:
                    raise ZeroDivisionError("secret detail")
                return super().push(token_ids)

        monkeypatch.setattr(choice_stream, "IncrementalDetokenizer", Faulty)
        good = client.generate(MODEL, "abc", max_tokens=300)
        await anext(good)
        with pytest.raises(InternalError) as caught:
            await client.generate(MODEL, "ab!", max_tokens=300).result()
        assert "secret" not in str(caught.value)
        assert "req-" in str(caught.value)
        await until(lambda: gw.engine.num_running == 1)
        assert (await good.result())[0].finish_reason is FinishReason.LENGTH


async def test_context_is_checked_with_the_numbers(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        with pytest.raises(ContextTooLongError, match=r"1025 tokens.*1024"):
            await client.generate(MODEL, "a" * 1025).result()
        with pytest.raises(ContextTooLongError, match=r"1000 tokens plus max_tokens 25"):
            await client.generate(MODEL, "a" * 1000, max_tokens=25).result()
        await client.generate(MODEL, "a" * 1000, max_tokens=24).result()
        with pytest.raises(ContextTooLongError):
            await client.generate(MODEL, [1] * 2000).result()
        with pytest.raises(ContextTooLongError):
            await client.generate(MODEL, "a" * 1024).result()


async def test_no_replica_yet_is_unavailable(checkpoint):
    async with (
        running_gateway(checkpoint, engines=[]) as gw,
        AsyncPenstockClient(gw.target) as client,
    ):
        with pytest.raises(UnavailableError):
            await client.generate(MODEL, "ab").result()
        (info,) = await client.models()
        assert (info.ready_replicas, info.replicas) == (0, 1)


async def test_health_follows_the_handler(checkpoint):
    async with running_gateway(checkpoint) as gw, grpc.aio.insecure_channel(gw.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "penstock.v1.Penstock"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await gw.replicas[0].kill()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_lists_the_services(checkpoint):
    async with running_gateway(checkpoint) as gw, grpc.aio.insecure_channel(gw.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {s.name for s in (await call.read()).list_services_response.service}
        call.cancel()
        assert {"penstock.v1.Penstock", "grpc.health.v1.Health"} <= names


async def test_stop_lets_running_streams_finish(checkpoint):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        stream = client.generate(MODEL, "ab", max_tokens=100)
        await anext(stream)
        stopping = asyncio.create_task(gw.front.stop(5.0))
        await asyncio.sleep(0.02)
        assert (await stream.result())[0].finish_reason is FinishReason.LENGTH
        await stopping


@pytest.mark.parametrize("text", ["hello world " * 80_000, "a" * 1_000_000, "\n" * 1_000_000])
async def test_a_huge_text_is_refused_without_stopping_the_others(checkpoint, text):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        stalls = []

        async def measure():
            while True:
                started = time.monotonic()
                await asyncio.sleep(0.001)
                stalls.append(time.monotonic() - started)

        meter = asyncio.create_task(measure())
        turns = [{"role": "user", "content": text}]
        for stream in (client.generate(MODEL, text), client.chat(MODEL, turns)):
            with pytest.raises(ContextTooLongError, match=r"first 10240 tokens.*1024"):
                await stream.result()
        meter.cancel()
        assert max(stalls) < 0.4
        assert gw.engine.requests == []
