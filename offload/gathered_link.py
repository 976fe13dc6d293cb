"""Disk -> slots that the data-parallel ranks of a node share: each rank reads its piece.

The memory is one for all (`cluster/dist/node_segment.py`), so a gathered unit is copied by nobody:
ranks tell each other what they have read and what they have done with.

    rank 0   read its piece of load 7 ── loaded 7 ─▶ others      gather 7: own read, others' notes
    rank 1   compute with load 4, evict ── done 4 ─▶ others      load 8 over 4: all are done with 4

Loads have numbers, the same on all ranks because all carry out one schedule. A thread reads, checks
and decodes the pieces in that order and tells of each at once, however long its rank computes. A
piece that cannot be read is told as well, so that all ranks end the step with an error.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch

from cluster.base.errors import CorruptWeightsError, InternalError, WeightStreamError
from cluster.dist.peer_group import Note
from offload.host_link import HostLink
from offload.layout import Store
from offload.link import POISON, LinkStats

_LOADED, _DONE, _FAILED = 0, 1, 2
_CLOSE_TIMEOUT_S = 10.0


class Sharers(Protocol):
    """The ranks that share the slots, as `NodeSegment` offers them."""

    @property
    def rank(self) -> int:
        """This rank's index among them."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """What errors call each of them."""
        ...

    def tell(self, note: Note) -> None:
        """Say something to all others."""
        ...

    def hear(self, peer: int, what: str) -> Note:
        """Wait for another one's next note."""
        ...


@dataclass(slots=True, kw_only=True)
class _Load:
    unit: str
    slot: int
    number: int
    own: Future[None] = field(default_factory=Future)
    """This rank's piece is there, or why it cannot be."""
    is_gathered: bool = False


class GatheredLink:
    """Implements `GatheringLink`; one thread calls it.

    Args:
        store: this rank's, with its pieces.
        pieces: reads them into `slots`; used by this link's thread alone.
        slots: what the ranks share, the same on each; a unit's whole image must fit its slot.
        poison: overwrite this rank's part of a slot with NaN when nobody uses it any more.
    """

    def __init__(
        self,
        store: Store,
        pieces: HostLink,
        slots: Sequence[torch.Tensor],
        sharers: Sharers,
        *,
        poison: bool = False,
    ) -> None:
        self._store = store
        self._pieces = pieces
        self._slots = slots
        self._sharers = sharers
        self._poison = poison
        self._in_slot: dict[int, _Load] = {}
        self._num_loads = 0
        self._heard = {
            peer: {_LOADED: -1, _DONE: -1}
            for peer in range(len(sharers.names))
            if peer != sharers.rank
        }
        self._wait_s = 0.0
        self._queue: queue.SimpleQueue[_Load | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="weight-pieces", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> LinkStats:
        """What this rank has read, and how long it waited for all pieces together."""
        read = self._pieces.stats
        return LinkStats(
            num_reads=read.num_reads,
            num_bytes=read.num_bytes,
            wait_s=self._wait_s,
            num_retries=read.num_retries,
        )

    def submit(self, unit: str, slot: int) -> None:
        """See `Link.submit`; waits until all ranks have done with what was in the slot."""
        before = self._in_slot.get(slot)
        if before is not None:
            self._hear_all(_DONE, before, f"the slot of {before.unit}")
        load = _Load(unit=unit, slot=slot, number=self._num_loads)
        self._num_loads += 1
        self._in_slot[slot] = load
        self._queue.put(load)

    def gather(self, unit: str, slot: int) -> None:
        """See `GatheringLink.gather`."""
        load = self._in_slot[slot]
        if load.unit != unit:
            raise InternalError(f"{unit} is gathered in a slot of {load.unit}.")
        if load.is_gathered:
            return
        started_s = time.perf_counter()
        try:
            load.own.result()
            self._hear_all(_LOADED, load, f"the pieces of {unit}")
        finally:
            self._wait_s += time.perf_counter() - started_s
        load.is_gathered = True

    def wait(self, unit: str, slot: int) -> None:
        """See `Link.wait`: it has been gathered.

        Raises:
            InternalError: it has not.
        """
        load = self._in_slot.get(slot)
        if load is None or load.unit != unit or not load.is_gathered:
            raise InternalError(f"{unit} is used before its pieces were gathered.")

    def tensors(self, unit: str, slot: int) -> Mapping[str, torch.Tensor]:
        """See `Link.tensors`."""
        return self._pieces.tensors(unit, slot)

    def memory(self, slot: int) -> torch.Tensor:
        """The whole slot."""
        return self._slots[slot]

    def evict(self, slot: int) -> None:
        """See `Link.evict`; others may still compute with it."""
        self._sharers.tell((_DONE, self._in_slot[slot].number, 0))

    def close(self) -> None:
        """See `Link.close`."""
        self._queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._pieces.close()

    def _hear_all(self, kind: int, load: _Load, what: str) -> None:
        """Wait until every other rank has told this of the load, or of a later one."""
        for peer, heard in self._heard.items():
            while heard[kind] < load.number:
                told, number, is_corrupt = self._sharers.hear(peer, what)
                if told == _FAILED:
                    raise self._failure(peer, is_corrupt)
                heard[told] = number

    def _failure(self, peer: int, is_corrupt: int) -> WeightStreamError | CorruptWeightsError:
        cause = f"{self._sharers.names[peer]} could not read its piece of the weights."
        remedy = "Its own log holds the reason."
        if is_corrupt:
            return CorruptWeightsError(cause, remedy)
        return WeightStreamError(cause, remedy)

    def _run(self) -> None:
        """The thread: reads under way in as many slots as are asked for, told of in their order."""
        reading: deque[_Load] = deque()
        while True:
            try:
                load = self._queue.get(block=not reading)
            except queue.Empty:
                self._end(reading.popleft())
                continue
            if load is None:
                return
            if self._begin(load):
                reading.append(load)

    def _begin(self, load: _Load) -> bool:
        record = self._store.record_of(load.unit)
        try:
            if self._poison:
                end = record.piece_at + record.image_bytes
                self._slots[load.slot][record.piece_at : end].fill_(POISON)
            if record.num_bytes:
                self._pieces.submit(load.unit, load.slot)
        except Exception as error:
            self._fail(load, error)
            return False
        return True

    def _end(self, load: _Load) -> None:
        try:
            if self._store.record_of(load.unit).num_bytes:
                self._pieces.wait(load.unit, load.slot)
            self._sharers.tell((_LOADED, load.number, 0))
        except Exception as error:
            self._fail(load, error)
        else:
            load.own.set_result(None)

    def _fail(self, load: _Load, error: Exception) -> None:
        load.own.set_exception(error)
        self._sharers.tell((_FAILED, load.number, int(isinstance(error, CorruptWeightsError))))
