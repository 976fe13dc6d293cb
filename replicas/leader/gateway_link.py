"""The leader's end of one gateway's stream: its requests and what waits to be sent to it.

Belongs to the asyncio thread alone. The outbox grows only while the gateway does not read; what
it can hold is bounded by the tokens its own running requests may still produce. A message takes
all that waits, up to `MAX_MESSAGE_WEIGHT`, so a gateway that lags is sent fewer, larger messages.
"""

from __future__ import annotations

import asyncio
from collections import deque

from replicas.api import GenerationDelta
from replicas.leader.stream_codec import delta_to_proto
from replicas.proto import replica_stream_pb2 as pb

MAX_MESSAGE_WEIGHT = 1 << 20
"""Rough bytes in one Step message; well under the hop's message cap."""

_LOGPROB_WEIGHT = 220
"""Bytes of one token's logprob with 20 alternatives."""


class GatewayLink:
    """Requests and pending messages of one connected gateway."""

    def __init__(self, gateway_id: str, serial: int) -> None:
        self.gateway_id = gateway_id
        self.serial = serial
        self.engine_ids: dict[int, str] = {}
        """stream_key -> the id the engine knows the request by."""
        self._pending: deque[tuple[int, GenerationDelta]] = deque()
        self._load: pb.Load | None = None
        self._goodbye: pb.Error | None = None
        self._wake = asyncio.Event()

    def engine_id(self, stream_key: int, request_id: str) -> str:
        """An id no other request of this leader has, whatever ids clients choose."""
        return f"{self.serial}-{stream_key}-{request_id}"

    def push(self, stream_key: int, delta: GenerationDelta) -> None:
        """Queue a delta without waking the writer (a step wakes it once, by `report`)."""
        self._pending.append((stream_key, delta))

    def report(self, load: pb.Load) -> None:
        """Set the newest load report and wake the writer."""
        self._load = load
        self._wake.set()

    def say_goodbye(self, error: pb.Error) -> None:
        """End the stream after what is queued, giving the gateway the reason."""
        self._goodbye = error
        self._wake.set()

    async def next_message(self, idle_s: float) -> pb.FromReplica | None:
        """The next message to send; None when `idle_s` passed without anything to say."""
        if not self._pending and self._goodbye is None:
            try:
                # Not wait_for: that makes a task, once per step.
                async with asyncio.timeout(idle_s):
                    await self._wake.wait()
            except TimeoutError:
                return None
        self._wake.clear()
        message = pb.FromReplica()
        if self._load is not None:
            message.load.CopyFrom(self._load)
            self._load = None
        weight = 0
        while self._pending and weight < MAX_MESSAGE_WEIGHT:
            stream_key, delta = self._pending.popleft()
            message.deltas.append(delta_to_proto(stream_key, delta))
            weight += _weight(delta)
        if not self._pending and self._goodbye is not None:
            message.goodbye.CopyFrom(self._goodbye)
        return message


def _weight(delta: GenerationDelta) -> int:
    scored = len(delta.logprobs) + len(delta.prompt_logprobs)
    return 16 + 4 * (len(delta.token_ids) + len(delta.embedding)) + _LOGPROB_WEIGHT * scored
