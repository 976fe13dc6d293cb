"""Codec of the leader-worker link: plans and results as typed MessagePack, never pickle.

Encoders and decoders are made once per process and are bound to the exact dataclasses of the step
contract, so malformed bytes raise here and nowhere deeper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from cluster.base.errors import InternalError
from replicas.engine.lockstep import RankStep
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.worker.frames import Payload
from replicas.worker.gathering import Gathered, Gathering


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First frame of a worker; proves that it belongs to this leader's epoch."""

    rank: int
    epoch: str
    secret: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What ended a worker or its group: `PenstockError.to_dict()` of the root cause."""

    rank: int
    error: dict[str, str | None]
    lost: tuple[int, ...] = ()
    """Ranks that it holds to be gone or stopped."""


_encoder = msgspec.msgpack.Encoder()
_plan_decoder = msgspec.msgpack.Decoder(SchedulerOutput)
_rank_step_decoder = msgspec.msgpack.Decoder(RankStep)
_result_decoder = msgspec.msgpack.Decoder(StepOutput)
_hello_decoder = msgspec.msgpack.Decoder(Hello)
_fault_decoder = msgspec.msgpack.Decoder(Fault)
_gathering_decoder = msgspec.msgpack.Decoder(Gathering)
_gathered_decoder = msgspec.msgpack.Decoder(Gathered)

Message = SchedulerOutput | RankStep | StepOutput | Hello | Fault | Gathering | Gathered
_Message = TypeVar("_Message")


def encode(value: Message) -> bytes:
    """Bytes of one link message."""
    return _encoder.encode(value)


def decode_plan(payload: Payload) -> SchedulerOutput:
    """Inverse of `encode` for a plan.

    Raises:
        InternalError: the bytes are not a plan.
    """
    return _decoded(_plan_decoder, payload, "A step plan")


def decode_rank_step(payload: Payload) -> RankStep:
    """Inverse of `encode` for a rank's part of a lock-step; raises InternalError on bad bytes."""
    return _decoded(_rank_step_decoder, payload, "A lock-step")


def decode_result(payload: Payload) -> StepOutput:
    """Inverse of `encode` for a result; raises InternalError on bad bytes."""
    return _decoded(_result_decoder, payload, "A step result")


def decode_hello(payload: Payload) -> Hello:
    """Inverse of `encode` for a hello; raises InternalError on bad bytes."""
    return _decoded(_hello_decoder, payload, "A worker's hello")


def decode_fault(payload: Payload) -> Fault:
    """Inverse of `encode` for a fault; raises InternalError on bad bytes."""
    return _decoded(_fault_decoder, payload, "A worker's fault report")


def decode_gathering(payload: Payload) -> Gathering:
    """Inverse of `encode` for a gathering; raises InternalError on bad bytes."""
    return _decoded(_gathering_decoder, payload, "A call to gather")


def decode_gathered(payload: Payload) -> Gathered:
    """Inverse of `encode` for the answer to a gathering; raises InternalError on bad bytes."""
    return _decoded(_gathered_decoder, payload, "An answer of a gathering")


def _decoded(decoder: msgspec.msgpack.Decoder[_Message], payload: Payload, what: str) -> _Message:
    try:
        return decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise InternalError(f"{what} could not be read: {error}.") from error
