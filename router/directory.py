"""Which replicas exist, which of them can take a request, and how loaded each one is now.

Membership comes from a `MembershipSource` (slow, may fail: the last answer stays in force), load
from the replica streams themselves (one step old). The directory owns one `ReplicaStream` per
listed (replica, epoch); a replica that is no longer listed finishes what it runs, one listed as
failed loses its requests at once, for the cause its leader gave.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.base.errors import UnavailableError, WorkerDiedError, error_from_dict
from replicas.leader.record import LoadRecord, ReplicaRecord, ReplicaState
from router.hop_settings import HopSettings
from router.policies.snapshot import ReplicaView
from router.replica_stream import ReplicaStream

log = logging.getLogger(__name__)

WATCH_TIMEOUT_S = 10.0
RETRY_S = 1.0


class MembershipSource(Protocol):
    """Where members come from."""

    async def watch(self, version: int, timeout_s: float) -> tuple[int, list[ReplicaRecord]]:
        """The version and all members, as soon as it differs from `version` or after the timeout.

        Any exception means that the source cannot tell now.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A replica as last described, with this gateway's stream to it if it has one."""

    record: ReplicaRecord
    stream: ReplicaStream | None

    @property
    def ready(self) -> bool:
        """Whether it can take a request from here now."""
        return (
            self.record.state is ReplicaState.READY
            and self.stream is not None
            and self.stream.ready
        )

    @property
    def load(self) -> LoadRecord:
        """The newest load known: from the stream while it is up, else from the record."""
        if self.stream is None or not self.stream.connected:
            return self.record.load
        return LoadRecord(**dataclasses.asdict(self.stream.stats))


class ReplicaDirectory:
    """Members per model; everything runs on one loop."""

    def __init__(
        self,
        source: MembershipSource,
        *,
        gateway_id: str,
        hop: HopSettings,
        on_gone: Callable[[str], None] = lambda replica_id: None,
    ) -> None:
        """`on_gone(replica_id)` is called when a replica's life has ended (its caches with it)."""
        self._source = source
        self._gateway_id = gateway_id
        self._hop = hop
        self._on_gone = on_gone
        self._version = 0
        self._records: dict[str, ReplicaRecord] = {}
        self._streams: dict[tuple[str, str], ReplicaStream] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    def start(self) -> None:
        """Begin following the source; returns at once."""
        self._watcher = asyncio.create_task(self._watch(), name="replica-directory")

    async def close(self) -> None:
        """Stop following and end every stream; requests on them end as unavailable."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        error = UnavailableError("The gateway is shutting down.", "Retry.")
        await asyncio.gather(*(stream.close(error) for stream in self._streams.values()))
        self._streams.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def members(self, model: str | None = None) -> list[Member]:
        """All listed replicas (of one model), in the order they were first listed."""
        return [
            Member(record=record, stream=self._streams.get((record.replica_id, record.epoch)))
            for record in self._records.values()
            if model is None or record.model == model
        ]

    def snapshot(self, model: str) -> dict[str, tuple[ReplicaView, ReplicaStream]]:
        """Replicas of `model` that can take a request now, by id."""
        views: dict[str, tuple[ReplicaView, ReplicaStream]] = {}
        for member in self.members(model):
            if member.ready and member.stream is not None:
                view = _view(member.record.replica_id, member.stream)
                views[member.record.replica_id] = (view, member.stream)
        return views

    async def changed(self) -> None:
        """Wait until a replica may have become ready that was not."""
        await self._news.wait()

    async def cancel_named(self, request_id: str) -> bool:
        """End a request of that public id on whichever replica has it; whether one had."""
        asked = (stream.cancel_named(request_id) for stream in self._streams.values())
        return any(await asyncio.gather(*asked))

    def _tell(self) -> None:
        """Wake those who wait for a replica now, and nobody who comes later."""
        self._news.set()
        self._news.clear()

    async def _watch(self) -> None:
        while True:
            try:
                version, records = await self._source.watch(self._version, WATCH_TIMEOUT_S)
                self._apply(records)
                self._version = version
            except Exception as error:
                log.warning("membership source failed, keeping the last members: %s", error)
                await asyncio.sleep(RETRY_S)

    def _apply(self, records: list[ReplicaRecord]) -> None:
        self._records = {record.replica_id: record for record in records}
        wanted = set()
        for record in records:
            key = (record.replica_id, record.epoch)
            if record.state is ReplicaState.FAILED:
                self._fail(key, record)
            elif record.endpoint and record.state is not ReplicaState.STARTING:
                wanted.add(key)
                if key not in self._streams or not self._streams[key].reinstate():
                    self._streams[key] = self._open(record)
        for key in [key for key in self._streams if key not in wanted]:
            stream = self._streams[key]
            stream.retire()
            if stream.ended:
                del self._streams[key]
                self._on_gone(key[0])
        self._tell()

    def _open(self, record: ReplicaRecord) -> ReplicaStream:
        stream = ReplicaStream(
            record.endpoint,
            record.epoch,
            gateway_id=self._gateway_id,
            settings=self._hop,
            version=record.version,
            on_ready=self._tell,
        )
        stream.start()
        return stream

    def _fail(self, key: tuple[str, str], record: ReplicaRecord) -> None:
        stream = self._streams.pop(key, None)
        if stream is None:
            return
        cause = (
            error_from_dict(record.error)
            if record.error is not None
            else WorkerDiedError(record.detail or "The replica failed.")
        )
        closing = asyncio.create_task(stream.lose(cause))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        self._on_gone(key[0])


def _view(replica_id: str, stream: ReplicaStream) -> ReplicaView:
    stats = stream.stats
    return ReplicaView(
        replica_id=replica_id,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_waiting_tokens=stats.num_waiting_tokens,
        kv_blocks_total=stats.kv_blocks_total,
        kv_blocks_free=stats.kv_blocks_free,
        num_in_flight=stream.num_in_flight,
        unstarted_tokens=stream.unstarted_tokens,
    )
