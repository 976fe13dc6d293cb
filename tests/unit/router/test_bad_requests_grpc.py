"""Hostile requests over real gRPC: the status each gets, the details it carries, no leaks."""

import asyncio
import random

import grpc
import grpc.aio
import pytest
from gateway_harness import MODEL, VOCAB, running_gateway, until
from google.rpc import error_details_pb2, status_pb2

from cluster.base.errors import InternalError, InvalidRequestError, PenstockError, UserError
from router.grpc.server import SERVICE_NAME
from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
IDS_ONLY = pb.TokenIds(ids=[1, 2])


def generate(**fields):
    return "Generate", pb.GenerateRequest(**{"model": MODEL, "text": "abc", **fields})


def sampled(**sampling):
    return generate(sampling=pb.SamplingOptions(**sampling))


def chat(*messages, **fields):
    turns = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    return "Chat", pb.ChatRequest(**{"model": MODEL, "messages": turns, **fields})


def embed(*inputs, **fields):
    return "Embed", pb.EmbedRequest(**{"model": MODEL, "inputs": inputs, **fields})


def score(prompt, *continuations):
    message = pb.ScoreRequest(model=MODEL, continuations=continuations, **prompt)
    return "Score", message


TEXT = pb.EmbedInput(text="a")

CASES = [
    (generate(model=""), INVALID, "model"),
    (generate(model="nope"), NOT_FOUND, "model"),
    (generate(model="../../../etc/passwd"), NOT_FOUND, "model"),
    (generate(model="a\r\nb"), NOT_FOUND, "model"),
    (generate(model="é" * 5000), NOT_FOUND, "model"),
    (generate(model="a\0b"), NOT_FOUND, "model"),
    (("Generate", pb.GenerateRequest(model=MODEL)), INVALID, "prompt"),
    (generate(text=""), INVALID, "prompt"),
    (generate(text="a" * 1025), INVALID, "prompt"),
    (("Generate", pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds())), INVALID, "prompt"),
    (generate(text=None, token_ids=pb.TokenIds(ids=[-1])), INVALID, "prompt"),
    (generate(text=None, token_ids=pb.TokenIds(ids=[VOCAB])), INVALID, "prompt"),
    (generate(text=None, token_ids=pb.TokenIds(ids=[1] * 2000)), INVALID, "prompt"),
    (generate(request_id="a b"), INVALID, "request_id"),
    (generate(request_id="a\r\nb"), INVALID, "request_id"),
    (generate(request_id="x" * 65), INVALID, "request_id"),
    (generate(request_id="é"), INVALID, "request_id"),
    (generate(timeout_s=-1), INVALID, "timeout_s"),
    (generate(timeout_s=float("nan")), INVALID, "timeout_s"),
    (generate(timeout_s=float("inf")), INVALID, "timeout_s"),
    (sampled(temperature=float("nan")), INVALID, "temperature"),
    (sampled(temperature=-0.1), INVALID, "temperature"),
    (sampled(temperature=2.1), INVALID, "temperature"),
    (sampled(temperature=float("-inf")), INVALID, "temperature"),
    (sampled(top_p=0), INVALID, "top_p"),
    (sampled(top_p=1.1), INVALID, "top_p"),
    (sampled(min_p=1.5), INVALID, "min_p"),
    (sampled(top_k=-1), INVALID, "top_k"),
    (sampled(repetition_penalty=0), INVALID, "repetition_penalty"),
    (sampled(presence_penalty=99), INVALID, "presence_penalty"),
    (sampled(frequency_penalty=-99), INVALID, "frequency_penalty"),
    (sampled(no_repeat_ngram_size=-1), INVALID, "no_repeat_ngram_size"),
    (sampled(max_tokens=0), INVALID, "max_tokens"),
    (sampled(max_tokens=-1), INVALID, "max_tokens"),
    (sampled(max_tokens=2**31 - 1), INVALID, "max_tokens"),
    (sampled(min_tokens=2**31 - 1), INVALID, "min_tokens"),
    (sampled(min_tokens=5, max_tokens=4), INVALID, "min_tokens"),
    (sampled(n=0), INVALID, "n"),
    (sampled(n=-1), INVALID, "n"),
    (sampled(n=9), INVALID, "n"),
    (sampled(n=2**31 - 1), INVALID, "n"),
    (sampled(logprobs=21), INVALID, "logprobs"),
    (sampled(logprobs=-7), INVALID, "logprobs"),
    (sampled(prompt_logprobs=10**6), INVALID, "prompt_logprobs"),
    (sampled(stop=[""]), INVALID, "stop"),
    (sampled(stop=["a"] * 5), INVALID, "stop"),
    (sampled(stop=["x" * 10_000] * 4), INVALID, "stop"),
    (sampled(stop_token_ids=[-1]), INVALID, "stop_token_ids"),
    (sampled(stop_token_ids=[VOCAB]), INVALID, "stop_token_ids"),
    (sampled(stop_token_ids=[1] * 129), INVALID, "stop_token_ids"),
    (sampled(logit_bias={-5: 1}), INVALID, "logit_bias"),
    (sampled(logit_bias={VOCAB: 1}), INVALID, "logit_bias"),
    (sampled(logit_bias={1: 101}), INVALID, "logit_bias"),
    (sampled(logit_bias={1: float("nan")}), INVALID, "logit_bias"),
    (sampled(logit_bias=dict.fromkeys(range(-1, 300), 0)), INVALID, "logit_bias"),
    (chat(), INVALID, "messages"),
    (chat(("robot", "x")), INVALID, "messages[0].role"),
    (chat(("user", "a"), ("", "x")), INVALID, "messages[1].role"),
    (chat(*[("user", "x")] * 1025), INVALID, "messages"),
    (chat(("user", "x" * 2000)), INVALID, "messages"),
    (chat(("user", "x"), model="nope"), NOT_FOUND, "model"),
    (embed(), INVALID, "inputs"),
    (embed(*[TEXT] * 65), INVALID, "inputs"),
    (embed(TEXT, pb.EmbedInput()), INVALID, "inputs[1]"),
    (embed(pb.EmbedInput(text="a" * 1025)), INVALID, "inputs[0]"),
    (embed(TEXT, pooling="max"), INVALID, "pooling"),
    (embed(TEXT, dimensions=-1), INVALID, "dimensions"),
    (embed(TEXT, dimensions=2**30), INVALID, "dimensions"),
    (score({"text": "a"}), INVALID, "continuations"),
    (score({}, TEXT), INVALID, "prompt"),
    (score({"text": "a"}, pb.EmbedInput()), INVALID, "continuations[0]"),
    (score({"text": "a" * 1024}, TEXT), INVALID, "continuations[0]"),
    (("Tokenize", pb.TokenizeRequest(model="nope", text="a")), NOT_FOUND, "model"),
    (("Detokenize", pb.DetokenizeRequest(model=MODEL, token_ids=[-1])), INVALID, "token_ids"),
    (("Detokenize", pb.DetokenizeRequest(model=MODEL, token_ids=[VOCAB])), INVALID, "token_ids"),
]


async def failure_of(call) -> grpc.aio.AioRpcError:
    """The error a call ends with, streaming or not."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer_of(call)
    return caught.value


async def answer_of(call):
    if isinstance(call, grpc.aio.UnaryStreamCall):
        return [message async for message in call]
    return await call


def details_of(error) -> status_pb2.Status:
    trailing = dict(error.trailing_metadata())
    return status_pb2.Status.FromString(trailing["grpc-status-details-bin"])


async def test_every_bad_request_is_answered_with_its_status_and_field(checkpoint):
    async with running_gateway(checkpoint) as gw, grpc.aio.insecure_channel(gw.target) as channel:
        stub = pb_grpc.PenstockStub(channel)
        wrong = []
        for (method, message), status, param in CASES:
            error = await failure_of(getattr(stub, method)(message))
            field = error_details_pb2.BadRequest()
            details = details_of(error)
            found = [d for d in details.details if d.Unpack(field)]
            trailing = dict(error.trailing_metadata())
            answered = (error.code(), field.field_violations[0].field if found else None)
            if answered != (status, param):
                wrong.append((method, str(message)[:80], answered, (status, param)))
            assert trailing["penstock-error-code"] in {
                "invalid_request", "context_too_long", "unknown_model",
            }  # fmt: skip
            assert trailing["penstock-request-id"].startswith("req-")
            assert error.details().isprintable()
            assert len(error.details()) < 400
        assert not wrong
        assert len(CASES) >= 60
        assert gw.engine.requests == []
        assert len(gw.handler._running) == 0


async def test_bytes_that_are_no_message_are_invalid_arguments(checkpoint):
    source = random.Random(7)
    samples = [
        b"\xff",
        b"\x0a\xff",
        b"\x0a\x02\xff\xfe",
        b"\x0b" * 2000,
        b"\x12\x80\x80\x80\x80\x08",
    ]
    samples += [b"\x0a\x05abc" + source.randbytes(source.randrange(1, 60)) for _ in range(60)]
    methods = [method.name for method in pb.DESCRIPTOR.services_by_name["Penstock"].methods]
    async with running_gateway(checkpoint) as gw, grpc.aio.insecure_channel(gw.target) as channel:
        for raw in samples:
            call = channel.unary_stream(f"/{SERVICE_NAME}/Generate")(raw)
            error = await failure_of(call)
            assert error.code() in (INVALID, NOT_FOUND), (raw, error)
            assert "Exception" not in error.details()
        for method in methods:
            kind = channel.unary_stream if method in ("Generate", "Chat") else channel.unary_unary
            error = await failure_of(kind(f"/{SERVICE_NAME}/{method}")(b"\xff\xff"))
            assert error.code() is INVALID
            assert dict(error.trailing_metadata())["penstock-error-code"] == "invalid_request"
        assert gw.engine.requests == []


async def test_oversized_and_unknown_calls(checkpoint):
    async with (
        running_gateway(checkpoint, max_message_bytes=1 << 16) as gw,
        grpc.aio.insecure_channel(gw.target) as channel,
    ):
        stub = pb_grpc.PenstockStub(channel)
        error = await failure_of(stub.Generate(generate(text="x" * (1 << 17))[1]))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        packed = stub.Tokenize(
            pb.TokenizeRequest(model=MODEL, text="x" * (1 << 20)),
            compression=grpc.Compression.Gzip,
        )
        assert (await failure_of(packed)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = await failure_of(channel.unary_unary(f"/{SERVICE_NAME}/Nothing")(b""))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        big = (("x-big", "v" * 40_000),)
        error = await failure_of(stub.ListModels(pb.ListModelsRequest(), metadata=big))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.ListModels(pb.ListModelsRequest())).models


async def test_unknown_fields_are_let_through(checkpoint):
    async with running_gateway(checkpoint) as gw, grpc.aio.insecure_channel(gw.target) as channel:
        raw = generate(sampling=pb.SamplingOptions(max_tokens=1))[1].SerializeToString()
        call = channel.unary_stream(f"/{SERVICE_NAME}/Generate")(raw + b"\xfa\x3e\x01a")
        answer = pb.GenerateResponse.FromString(await call.read())
        assert answer.finish_reason == "length"


async def test_handler_faults_show_no_text(checkpoint, monkeypatch, caplog):
    async with running_gateway(checkpoint) as gw, grpc.aio.insecure_channel(gw.target) as channel:

        async def explode(*_):
            raise ZeroDivisionError("secret detail")

        monkeypatch.setattr(gw.handler, "embed", explode)
        monkeypatch.setattr(gw.handler, "generate", explode)
        stub = pb_grpc.PenstockStub(channel)
        for method, message in (embed(TEXT), generate()):
            error = await failure_of(getattr(stub, method)(message))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in str(error) + repr(error.trailing_metadata())
            assert dict(error.trailing_metadata())["penstock-request-id"].startswith("req-")
        assert "secret detail" in caplog.text


async def test_a_burst_of_bad_requests_leaves_others_unharmed(checkpoint):
    async with running_gateway(checkpoint) as gw, grpc.aio.insecure_channel(gw.target) as channel:
        stub = pb_grpc.PenstockStub(channel)
        good = stub.Generate(sampled(max_tokens=200)[1])
        bad = [getattr(stub, method)(message) for (method, message), _, _ in CASES]
        errors = await asyncio.gather(*map(failure_of, bad))
        assert {error.code() for error in errors} == {INVALID, NOT_FOUND}
        text = ""
        while (message := await good.read()) is not grpc.aio.EOF:
            text += message.text
        assert len(text) == 200
        await until(lambda: len(gw.handler._running) == 0)


def test_user_errors_are_never_internal():
    assert not issubclass(InternalError, UserError)
    assert issubclass(InvalidRequestError, PenstockError)
