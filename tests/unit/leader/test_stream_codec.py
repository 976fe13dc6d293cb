"""Values survive the hop's wire form."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import InvalidRequestError, OverloadedError, WorkerDiedError
from replicas.api import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    Pooling,
    ReplicaStats,
    SamplingParams,
    TokenLogprob,
)
from replicas.leader import stream_codec as codec
from replicas.proto import replica_stream_pb2 as pb

ids = st.integers(0, 2**31 - 1)
float32 = st.floats(width=32, allow_nan=False)
double = st.floats(allow_nan=False, allow_infinity=False)
optional_k = st.none() | st.integers(0, 20)

params = st.builds(
    SamplingParams,
    temperature=double,
    top_k=ids,
    top_p=double,
    min_p=double,
    repetition_penalty=double,
    presence_penalty=double,
    frequency_penalty=double,
    no_repeat_ngram_size=ids,
    logit_bias=st.lists(st.tuples(ids, float32), max_size=4).map(tuple),
    min_tokens=ids,
    max_tokens=ids,
    stop_token_ids=st.lists(ids, max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
    n=st.integers(1, 8),
    logprobs=optional_k,
    prompt_logprobs=optional_k,
)
requests = st.builds(
    GenerationRequest,
    request_id=st.text("abc-._9", min_size=1),
    prompt_token_ids=st.lists(ids, min_size=1).map(tuple),
    params=params,
    pooling=st.none() | st.sampled_from(Pooling),
    priority=st.integers(-(2**31), 2**31 - 1),
    cache_salt=st.text(),
)
logprobs = st.builds(
    TokenLogprob,
    token_id=ids,
    logprob=float32,
    rank=st.integers(1, 2**31),
    top=st.lists(st.tuples(ids, float32), max_size=3).map(tuple),
)
scored = st.lists(logprobs, max_size=3).map(tuple)
prompt_scored = st.tuples(st.sampled_from([(), (None,)]), scored).map(
    lambda pair: pair[0] + pair[1]
)
deltas = st.builds(
    GenerationDelta,
    request_id=st.just("r"),
    index=st.integers(0, 7),
    token_ids=st.lists(ids, max_size=4).map(tuple),
    logprobs=scored,
    prompt_logprobs=prompt_scored,
    embedding=st.lists(float32, max_size=4).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_token_id=st.none() | ids,
    error=st.none() | st.just(WorkerDiedError("rank 1 died", "retry", param="x").to_dict()),
    num_cached_tokens=ids,
)


@given(requests, st.integers(0, 2**64 - 1))
def test_request_round_trip(request, key):
    wire = codec.submit_to_proto(key, request).SerializeToString()
    message = pb.Submit.FromString(wire)
    assert message.stream_key == key
    assert codec.submit_from_proto(message, request.request_id) == request


@given(deltas, st.integers(0, 2**64 - 1))
def test_delta_round_trip(delta, key):
    wire = codec.delta_to_proto(key, delta).SerializeToString()
    message = pb.Delta.FromString(wire)
    assert message.stream_key == key
    assert codec.delta_from_proto(message, "r") == delta


@given(st.builds(ReplicaStats, **dict.fromkeys(ReplicaStats.__slots__, st.integers(0, 2**32 - 1))))
def test_stats_round_trip(stats):
    message = codec.stats_to_proto(stats, draining=True)
    assert message.draining
    assert codec.stats_from_proto(message) == stats


def test_logprob_is_rounded_to_32_bit_and_no_further():
    entry = TokenLogprob(token_id=1, logprob=-0.1, rank=1)
    delta = GenerationDelta(request_id="r", logprobs=(entry,))
    back = codec.delta_from_proto(codec.delta_to_proto(1, delta), "r")
    assert back.logprobs[0].logprob == struct.unpack("f", struct.pack("f", -0.1))[0]


def test_error_keeps_its_class_and_fields():
    error = codec.error_from_proto(codec.error_to_proto(OverloadedError("full", "wait")))
    assert isinstance(error, OverloadedError)
    assert (error.cause, error.remedy, error.param) == ("full", "wait", None)


def test_unknown_pooling_is_refused():
    with pytest.raises(InvalidRequestError, match="'max'"):
        codec.submit_from_proto(pb.Submit(pooling="max"), "r")
