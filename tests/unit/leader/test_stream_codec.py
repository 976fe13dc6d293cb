"""Values survive the hop's wire form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import InternalError, WorkerDiedError
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

ids = st.integers(0, 2**31 - 1)
floats = st.floats(allow_nan=False)
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
    logit_bias=st.lists(st.tuples(ids, floats), max_size=4).map(tuple),
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
    logprob=floats,
    rank=st.integers(1, 2**31),
    top=st.lists(st.tuples(ids, floats), max_size=3).map(tuple),
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
    embedding=st.lists(floats, max_size=4).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_token_id=st.none() | ids,
    error=st.none() | st.just(WorkerDiedError("rank 1 died", "retry", param="x").to_dict()),
    num_cached_tokens=ids,
)


keys = st.integers(0, 2**64 - 1)


def payloads(*chunks: bytes) -> list[bytes]:
    reader = codec.FrameReader()
    return [payload for chunk in chunks for payload in reader.feed(chunk)]


@given(requests, keys)
def test_request_round_trip(request, key):
    (payload,) = payloads(codec.frame(codec.Submit(key, request)))
    assert codec.decode_to_replica(payload) == codec.Submit(key, request)


@given(st.lists(st.tuples(keys, deltas), max_size=4), st.booleans())
def test_step_round_trip_keeps_order_and_every_bit(pairs, draining):
    load = ReplicaStats(step=2**33, kv_blocks_free=7)
    step = codec.Step([codec.delta_to_wire(key, delta) for key, delta in pairs], load, draining)
    (payload,) = payloads(codec.frame(step))
    back = codec.decode_from_replica(payload)
    assert (back.load, back.draining) == (load, draining)
    found = [(delta.stream_key, codec.delta_from_wire(delta, "r")) for delta in back.deltas]
    assert found == pairs


@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_frames_survive_any_cut(bodies, data):
    hellos = [codec.Hello(codec.HOP_VERSION, body.hex(), "e") for body in bodies]
    stream = b"".join(map(codec.frame, hellos))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [codec.decode_to_replica(payload) for payload in payloads(*chunks)] == hellos


def test_a_frame_longer_than_any_message_is_refused_before_it_arrives():
    with pytest.raises(InternalError, match="no message of this stream"):
        payloads((codec.MAX_HOP_MESSAGE_BYTES + 1).to_bytes(4, "little"))


def test_a_message_that_is_too_long_is_not_sent(monkeypatch):
    monkeypatch.setattr(codec, "MAX_HOP_MESSAGE_BYTES", 10)
    with pytest.raises(InternalError, match="more than 10"):
        codec.frame(codec.Hello(1, "gateway", "epoch"))


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x91\xa4nope", b"\x92\xa6submit\x01"])
def test_other_bytes_are_refused(payload):
    with pytest.raises(InternalError, match="malformed"):
        codec.decode_to_replica(payload)
    with pytest.raises(InternalError, match="malformed"):
        codec.decode_from_replica(payload)


def test_an_ordinary_token_is_small():
    stats = ReplicaStats(step=10**6, num_running=64, kv_blocks_total=10**5, kv_blocks_free=10**4)
    tokens = [
        codec.delta_to_wire(key, GenerationDelta(request_id="r", token_ids=(100_000,)))
        for key in range(1000, 1064)
    ]
    empty = len(codec.frame(codec.Step([], stats, False)))
    assert (len(codec.frame(codec.Step(tokens, stats, False))) - empty) / 64 < 16
