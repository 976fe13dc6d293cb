"""Codec of the leader-worker link: plans and results as typed MessagePack, never pickle.

Encoders and decoders are made once per process and are bound to the exact dataclasses of the step
contract, so malformed bytes raise here and nowhere deeper.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cluster.base.errors import InternalError
from replicas.engine.lockstep import RankStep
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
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


def encode(value: Message) -> bytes:
    """Bytes of one link message."""
    return _encoder.encode(value)


def decode_plan(payload: bytes | bytearray | memoryview) -> SchedulerOutput:
    """Inverse of `encode` for a plan.

    Raises:
        InternalError: the bytes are not a plan.
    """
    try:
        return _plan_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise InternalError(f"A step plan could not be read: {error}.") from error


def decode_rank_step(payload: bytes | bytearray | memoryview) -> RankStep:
    """Inverse of `encode` for a rank's part of a lock-step; raises InternalError on bad bytes."""
    try:
        return _rank_step_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise InternalError(f"A lock-step could not be read: {error}.") from error


def decode_result(payload: bytes | bytearray | memoryview) -> StepOutput:
    """Inverse of `encode` for a result; raises InternalError on bad bytes."""
    try:
        return _result_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise InternalError(f"A step result could not be read: {error}.") from error


def decode_hello(payload: bytes | bytearray | memoryview) -> Hello:
    """Inverse of `encode` for a hello; raises InternalError on bad bytes."""
    try:
        return _hello_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise InternalError(f"A worker's hello could not be read: {error}.") from error


def decode_fault(payload: bytes | bytearray | memoryview) -> Fault:
    """Inverse of `encode` for a fault; raises InternalError on bad bytes."""
    try:
        return _fault_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise InternalError(f"A worker's fault report could not be read: {error}.") from error


def decode_gathering(payload: bytes | bytearray | memoryview) -> Gathering:
    """Inverse of `encode` for a gathering; raises InternalError on bad bytes."""
    try:
        return _gathering_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise InternalError(f"A call to gather could not be read: {error}.") from error


def decode_gathered(payload: bytes | bytearray | memoryview) -> Gathered:
    """Inverse of `encode` for the answer to a gathering; raises InternalError on bad bytes."""
    try:
        return _gathered_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise InternalError(f"An answer of a gathering could not be read: {error}.") from error
