"""Disk -> host slots. On a CPU rank the kernels compute straight from them.

Nothing that was read is used before it is known to be whole (`offload/record_check.py`). Checksums
are computed and compressed records decoded by a thread of their own as records arrive, in the order
of their reads, so that the computation waits for one only where it caught up with the disk. A
compressed record is read to the end of its place in the slot and decoded there: it takes no memory
beside, but for the beginnings that stay (`offload/held_heads.py`) and are not read again. A read
that failed is tried once more. A slow disk makes a slow step; a wrong byte makes an error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from cluster.base.errors import CorruptWeightsError, InternalError, PenstockError
from offload.compression import RecordCodec
from offload.held_heads import HeldHeads
from offload.layout import PackedTensor, Record, Store
from offload.link import POISON, LinkStats
from offload.readers.engine import ReadEngine, ReadTimeoutError
from offload.record_check import RecordCheck

_MAX_CACHED_VIEWS = 4096
_POLL_S = 0.5
"""How long a wait may keep `close` waiting."""
_PACK_AGAIN = "Delete the file; it is packed again at the next start."
_log = logging.getLogger(__name__)


class HostLink:
    """Implements `Link` over a packed store.

    Args:
        slots: memory of each slot, from `engine.allocate`; a unit's image must fit its slot.
        check: of what was read; None: checksums at the first read of each record.
        codec: decodes compressed records; None: there are none.
        heads: beginnings of compressed records that stay; None: none do.
        poison: overwrite evicted slots with NaN, so that a use after release shows.
    """

    def __init__(  # noqa: PLR0913 - what stands between a file and whole records
        self,
        store: Store,
        engine: ReadEngine,
        slots: Sequence[torch.Tensor],
        *,
        check: RecordCheck | None = None,
        codec: RecordCodec | None = None,
        heads: HeldHeads | None = None,
        timeout_s: float = 30.0,
        poison: bool = False,
    ) -> None:
        self.stats = LinkStats()
        self._store = store
        self._engine = engine
        self._slots = list(slots)
        self._check = check or RecordCheck(store)
        self._codec = codec
        self._heads = heads
        self._timeout_s = timeout_s
        self._poison = poison
        self._reading: list[Record | None] = [None] * len(slots)
        self._checks: dict[int, Future[None]] = {}
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="weight-check")
        self._is_closing = threading.Event()
        self._views: dict[tuple[str, int], Mapping[str, torch.Tensor]] = {}

    def submit(self, unit: str, slot: int) -> None:
        """See `Link.submit`."""
        if self._reading[slot] is not None:
            self._drain(slot)
        self._start(self._store.record_of(unit), slot)

    def wait(self, unit: str, slot: int) -> None:
        """See `Link.wait`."""
        record = self._reading[slot]
        if record is None:
            return
        started_s = time.perf_counter()
        try:
            self._end(record, slot)
        except ReadTimeoutError:
            raise
        except PenstockError as error:
            _log.warning("%s is read once more: %s", unit, error)
            self.stats.num_retries += 1
            self._start(record, slot)
            self._end(record, slot)
        finally:
            self.stats.wait_s += time.perf_counter() - started_s

    def tensors(self, unit: str, slot: int) -> Mapping[str, torch.Tensor]:
        """See `Link.tensors`."""
        key = (unit, slot)
        if key not in self._views:
            if len(self._views) >= _MAX_CACHED_VIEWS:
                self._views.clear()
            entries = self._store.by_name[unit].tensors
            self._views[key] = {entry.name: view(self._slots[slot], entry) for entry in entries}
        return self._views[key]

    def record(self, unit: str, slot: int) -> torch.Tensor:
        """The unit's image in the slot as bytes, after `wait`: what a further stage copies."""
        return self._slots[slot][: self._store.record_of(unit).image_bytes]

    def evict(self, slot: int) -> None:
        """See `Link.evict`."""
        if self._poison and self._reading[slot] is None:
            self._slots[slot].fill_(POISON)

    def close(self) -> None:
        """See `Link.close`."""
        self._is_closing.set()
        self._checker.shutdown(wait=True, cancel_futures=True)
        self._engine.close()
        self._views.clear()

    def _start(self, record: Record, slot: int) -> None:
        head = self._head(record)
        if (tail := self._tail(record, slot, head)).numel():
            self._check.spoil(record, tail)
            self._engine.submit(slot, tail, record.offset + record.num_bytes - tail.numel())
            self.stats.num_reads += 1
            self.stats.num_bytes += tail.numel()
        self._reading[slot] = record
        if record.compressed_from or self._check.needs_checksum(record):
            self._checks[slot] = self._checker.submit(self._finish, record, slot, head)

    def _end(self, record: Record, slot: int) -> None:
        """Wait until the slot's read has ended and been checked, by this thread or the other."""
        check = self._checks.pop(slot, None)
        if check is None:
            self._finish(record, slot, None)
        else:
            check.result()
        self._reading[slot] = None

    def _finish(self, record: Record, slot: int, head: torch.Tensor | None) -> None:
        """Return when the slot holds the image; `head` is what was held when its read began."""
        try:
            self._bring(record, slot, head)
        except PenstockError:
            if self._heads is not None:
                self._heads.forget(record)  # the next read brings all of it
            raise

    def _bring(self, record: Record, slot: int, head: torch.Tensor | None) -> None:
        tail = self._tail(record, slot, head)
        try:
            if head is not None:
                self._decode(record, slot, head, is_here=False)
        finally:
            if tail.numel():
                self._wait_for_read(slot)
        self._check.check(record, tail, head)
        if record.compressed_from:
            if head is None and self._heads is not None:
                self._heads.keep(record, tail)
            self._decode(record, slot, head, is_here=True)

    def _decode(
        self, record: Record, slot: int, head: torch.Tensor | None, *, is_here: bool
    ) -> None:
        """What the record's head tells, or, once all of it `is_here`, the rest."""
        if self._codec is None:
            raise InternalError(f"{self._store.path} is compressed and there is no codec.")
        image = self._slots[slot][record.piece_at : record.piece_at + record.image_bytes]
        try:
            if is_here:
                self._codec.decode(image, record.num_bytes, head)
            elif head is not None:
                self._codec.begin(image, record.num_bytes, head)
        except CorruptWeightsError as error:
            raise CorruptWeightsError(
                f"{self._store.path}: at {record.offset}: {error}", _PACK_AGAIN
            ) from error

    def _head(self, record: Record) -> torch.Tensor | None:
        return None if self._heads is None else self._heads.of(record)

    def _tail(self, record: Record, slot: int, head: torch.Tensor | None) -> torch.Tensor:
        """Where in the slot what follows the head is read to: the end of the record's image, for
        the codec's sake."""
        end = record.piece_at + record.image_bytes
        held = 0 if head is None else head.numel()
        return self._slots[slot][end - record.num_bytes + held : end]

    def _wait_for_read(self, slot: int) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            left_s = deadline_s - time.monotonic()
            try:
                self._engine.wait(slot, max(0.0, min(left_s, _POLL_S)))
            except ReadTimeoutError as error:
                if left_s <= _POLL_S or self._is_closing.is_set():
                    raise ReadTimeoutError(
                        f"A read of {self._store.path} has not ended after {self._timeout_s:g} s.",
                        "Look at the disk, or raise the read timeout.",
                    ) from error
            else:
                return

    def _drain(self, slot: int) -> None:
        """Wait for a read that nobody wants; how it ended does not matter."""
        check = self._checks.pop(slot, None)
        try:
            if check is None:
                self._wait_for_read(slot)
            else:
                check.result()
        except ReadTimeoutError:
            raise
        except PenstockError as error:
            _log.info("a read that was not needed failed: %s", error)
        self._reading[slot] = None


def view(memory: torch.Tensor, entry: PackedTensor) -> torch.Tensor:
    """The tensor that `entry` describes, in `memory` (uint8) of its record; no copy."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    if entry.offset < 0:
        return torch.empty(entry.shape, dtype=dtype, device="meta")
    flat = memory[entry.offset : entry.offset + entry.num_bytes]
    return flat.view(dtype).view(entry.shape)
