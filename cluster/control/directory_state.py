"""The directory's memory: the last record of every replica and a version that counts changes.

Pure and synchronous with an injected clock; `directory_actor.py` is its Ray shell. A record that
was not renewed for `expiry_s` is dropped: its leader is gone without a word. Load reports do not
change the version; membership does, also that of ranks in a replica.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from replicas.leader.record import ReplicaRecord, ReplicaState


@dataclass(slots=True)
class _Entry:
    record: ReplicaRecord
    renewed_s: float


class DirectoryState:
    """Records by replica id."""

    def __init__(self, clock: Callable[[], float], expiry_s: float = 15.0) -> None:
        self._clock = clock
        self._expiry_s = expiry_s
        self._entries: dict[str, _Entry] = {}
        self.version = 1

    def report(self, record: ReplicaRecord) -> bool:
        """Store a record; True when membership changed."""
        entry = self._entries.get(record.replica_id)
        changed = entry is None or _identity(entry.record) != _identity(record)
        if entry is not None and entry.record.epoch != record.epoch and _is_late(entry, record):
            return False
        self._entries[record.replica_id] = _Entry(record, self._clock())
        self.version += changed
        return changed

    def remove(self, replica_id: str, epoch: str) -> bool:
        """Forget a replica that said goodbye; a stale epoch's goodbye changes nothing."""
        entry = self._entries.get(replica_id)
        if entry is None or entry.record.epoch != epoch:
            return False
        del self._entries[replica_id]
        self.version += 1
        return True

    def forget_model(self, model: str) -> bool:
        """Drop what is left of a model that was taken away; True when something was."""
        gone = [key for key, entry in self._entries.items() if entry.record.model == model]
        for replica_id in gone:
            del self._entries[replica_id]
        self.version += bool(gone)
        return bool(gone)

    def expire(self) -> bool:
        """Drop records nobody renews; True when one was dropped."""
        now_s = self._clock()
        stale = [
            replica_id
            for replica_id, entry in self._entries.items()
            if now_s - entry.renewed_s > self._expiry_s
        ]
        for replica_id in stale:
            del self._entries[replica_id]
        self.version += bool(stale)
        return bool(stale)

    def records(self) -> list[ReplicaRecord]:
        """All records, in order of first report."""
        return [entry.record for entry in self._entries.values()]


def _identity(record: ReplicaRecord) -> tuple[object, ...]:
    return record.epoch, record.endpoint, record.state, record.workers, record.loss


def _is_late(entry: _Entry, record: ReplicaRecord) -> bool:
    """Whether `record` is the last word of an epoch that a living one has already replaced."""
    return record.state is ReplicaState.FAILED and entry.record.state is not ReplicaState.FAILED
