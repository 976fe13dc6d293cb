"""Messages of the replica stream and their bytes: frames of typed MessagePack, never pickle.

Used by both ends of the hop (the gateway's `ReplicaStream` and the leader's server), so the two
cannot disagree. A frame is a length (4 bytes, little-endian) and one message. Decoders are bound to
the exact types, so malformed bytes raise here and nowhere deeper. Nothing here checks ranges (the
gateway's validator did) or touches a socket.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import msgspec

from cluster.base.errors import InternalError
from replicas.api import GenerationDelta, GenerationRequest, ReplicaStats

HOP_VERSION = 3
"""Both ends must be of one version; raised with every change of a message."""

MAX_HOP_MESSAGE_BYTES = 64 * 1024 * 1024
"""Cap of one hop message, both ways; the largest honest one is a long prompt's logprobs."""

_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A gateway's first message."""

    version: int
    gateway_id: str
    epoch: str
    """The leader's life that the gateway believes it talks to; the leader refuses another one."""


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Starts a request under a key of the gateway's; its public id is a matter of the gateway."""

    stream_key: int
    request: GenerationRequest


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """Stops one choice (its stop string matched), or all of them."""

    stream_key: int
    index: int | None = None


class CancelNamed(msgspec.Struct, frozen=True, array_like=True, tag="cancel-named"):
    """Ends a request by its public id, whichever gateway submitted it; answered by `Cancelled`.

    That gateway hears of it as its client does: each choice ends with finish reason ABORT.
    """

    question: int
    request_id: str


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """The gateway lives, even if it has nothing to ask."""


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What a step added to one choice; `whole` where that is more than tokens."""

    stream_key: int
    index: int
    token_ids: tuple[int, ...]
    whole: GenerationDelta | None = None


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """New deltas in order, and the load after them; sent without deltas once a second."""

    deltas: Sequence[Delta]
    load: ReplicaStats
    draining: bool


class Cancelled(msgspec.Struct, frozen=True, array_like=True, tag="cancelled"):
    """The answer to a `CancelNamed` of that number."""

    question: int
    found: bool


class Goodbye(msgspec.Struct, frozen=True, array_like=True, tag="goodbye"):
    """The leader's last message: `PenstockError.to_dict()` of why the stream ends."""

    error: dict[str, str | None]


ToReplica: TypeAlias = Hello | Submit | Cancel | CancelNamed | Beat
FromReplica: TypeAlias = Step | Cancelled | Goodbye

_encoder = msgspec.msgpack.Encoder()
_to_replica_decoder: msgspec.msgpack.Decoder[ToReplica] = msgspec.msgpack.Decoder(ToReplica)
_from_replica_decoder: msgspec.msgpack.Decoder[FromReplica] = msgspec.msgpack.Decoder(FromReplica)


def frame(message: ToReplica | FromReplica) -> bytes:
    """A message as it goes over the socket.

    Raises:
        InternalError: it is longer than the other end takes.
    """
    payload = _encoder.encode(message)
    if len(payload) > MAX_HOP_MESSAGE_BYTES:
        raise InternalError(
            f"A message of the replica stream has {len(payload)} bytes, "
            f"more than {MAX_HOP_MESSAGE_BYTES}.",
            "Ask for fewer logprobs or a shorter prompt.",
        )
    return _LENGTH.pack(len(payload)) + payload


def decode_to_replica(payload: bytes) -> ToReplica:
    """A gateway's message; raises InternalError on anything else."""
    try:
        return _to_replica_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise InternalError(f"A gateway sent a malformed message: {error}.") from error


def decode_from_replica(payload: bytes) -> FromReplica:
    """A leader's message; raises InternalError on anything else."""
    try:
        return _from_replica_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise InternalError(f"The replica sent a malformed message: {error}.") from error


class FrameReader:
    """Cuts what arrives into the payloads of frames."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self._wanted = _LENGTH.size

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add what arrived; the payloads that are whole now, in order.

        Raises:
            InternalError: a frame is announced that is longer than any honest one.
        """
        if self._unread:
            self._unread += data
            if len(self._unread) < self._wanted:
                return
            data = bytes(self._unread)
        at = 0
        while True:
            self._wanted = _LENGTH.size
            if len(data) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(data, at)
                if length > MAX_HOP_MESSAGE_BYTES:
                    raise InternalError(f"A frame of {length} bytes is no message of this stream.")
                self._wanted += length
            if len(data) - at < self._wanted:
                break
            end = at + self._wanted
            yield data[at + _LENGTH.size : end]
            at = end
        self._unread = bytearray(data[at:])


def delta_to_wire(stream_key: int, delta: GenerationDelta) -> Delta:
    """One choice's increment for the gateway that knows it as `stream_key`."""
    if (
        delta.finish_reason is None
        and not delta.num_cached_tokens
        and not delta.logprobs
        and not delta.prompt_logprobs
        and not delta.embedding
        and delta.stop_token_id is None
        and delta.error is None
    ):
        return Delta(stream_key, delta.index, delta.token_ids)
    return Delta(stream_key, delta.index, (), delta)


def delta_from_wire(message: Delta, request_id: str) -> GenerationDelta:
    """Inverse of `delta_to_wire`; `request_id` is what the gateway calls the request."""
    if message.whole is not None:
        return dataclasses.replace(message.whole, request_id=request_id)
    return GenerationDelta(request_id=request_id, index=message.index, token_ids=message.token_ids)
