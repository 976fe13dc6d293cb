"""Disk -> host slots. On a CPU rank the kernels compute straight from them.

Nothing that was read is used before it is known to be whole: the guard words are spoilt before a
read and compared after it, each time; the checksum is computed on a record's first read, or always.
A read that failed is tried once more. A slow disk makes a slow step; a wrong byte makes an error.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Mapping, Sequence

import torch

from cluster.base.errors import CorruptWeightsError, PenstockError, WeightStreamError
from offload.layout import GUARD_BYTES, GUARD_STRIDE, PackedTensor, Record, Store
from offload.link import LinkStats
from offload.readers.engine import ReadEngine, ReadTimeoutError

VERIFY = ("first", "always")
# As float32, bfloat16 and float16 alike: not a number.
_POISON = 0xFF
_MAX_CACHED_VIEWS = 4096
_log = logging.getLogger(__name__)


class HostLink:
    """Implements `Link` over a packed store.

    Args:
        slots: memory of each slot, from `engine.allocate`; a unit's record must fit its slot.
        verify: one of `VERIFY`.
        poison: overwrite evicted slots with NaN, so that a use after release shows.
    """

    def __init__(
        self,
        store: Store,
        engine: ReadEngine,
        slots: Sequence[torch.Tensor],
        *,
        verify: str = "first",
        timeout_s: float = 30.0,
        poison: bool = False,
    ) -> None:
        self.stats = LinkStats()
        self._store = store
        self._engine = engine
        self._slots = list(slots)
        self._always = verify == "always"
        self._timeout_s = timeout_s
        self._poison = poison
        self._reading: list[Record | None] = [None] * len(slots)
        self._verified: set[int] = set()
        self._guards: dict[int, torch.Tensor] = {}
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
            self._finish(record, slot)
        except ReadTimeoutError:
            raise
        except PenstockError as error:
            _log.warning("%s is read once more: %s", unit, error)
            self.stats.num_retries += 1
            self._start(record, slot)
            self._finish(record, slot)
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
        """The unit's record in the slot as bytes, after `wait`: what a further stage copies."""
        return self._slots[slot][: self._store.record_of(unit).num_bytes]

    def evict(self, slot: int) -> None:
        """See `Link.evict`."""
        if self._poison and self._reading[slot] is None:
            self._slots[slot].fill_(_POISON)

    def close(self) -> None:
        """See `Link.close`."""
        self._engine.close()
        self._views.clear()

    def _start(self, record: Record, slot: int) -> None:
        buffer = self._slots[slot][: record.num_bytes]
        words, at = self._guard_words(record), record.num_bytes // GUARD_STRIDE
        strided, last = _guard_places(buffer)
        strided.copy_(~words[:at])
        last.copy_(~words[at:])
        self._engine.submit(slot, buffer, record.offset)
        self._reading[slot] = record
        self.stats.num_reads += 1
        self.stats.num_bytes += record.num_bytes

    def _finish(self, record: Record, slot: int) -> None:
        self._engine.wait(slot, self._timeout_s)
        self._reading[slot] = None
        buffer = self._slots[slot][: record.num_bytes]
        words, at = self._guard_words(record), record.num_bytes // GUARD_STRIDE
        strided, last = _guard_places(buffer)
        if not (torch.equal(strided, words[:at]) and torch.equal(last, words[at:])):
            raise WeightStreamError(
                f"{self._store.path}: {record.num_bytes} bytes at {record.offset} were not read "
                "whole.",
                "Look at the disk.",
            )
        if not self._always and record.offset in self._verified:
            return
        if zlib.crc32(buffer.numpy().data) != record.crc32:
            raise CorruptWeightsError(
                f"{self._store.path}: {record.num_bytes} bytes at {record.offset} are not what was "
                "packed.",
                "Delete the file; it is packed again at the next start.",
            )
        self._verified.add(record.offset)

    def _drain(self, slot: int) -> None:
        """Wait for a read that nobody wants; how it ended does not matter."""
        try:
            self._engine.wait(slot, self._timeout_s)
        except ReadTimeoutError:
            raise
        except WeightStreamError as error:
            _log.info("a read that was not needed failed: %s", error)
        self._reading[slot] = None

    def _guard_words(self, record: Record) -> torch.Tensor:
        if record.offset not in self._guards:
            words = torch.frombuffer(bytearray(record.guards), dtype=torch.int64)
            self._guards[record.offset] = words
        return self._guards[record.offset]


def view(memory: torch.Tensor, entry: PackedTensor) -> torch.Tensor:
    """The tensor that `entry` describes, in `memory` (uint8) of its record; no copy."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    if entry.offset < 0:
        return torch.empty(entry.shape, dtype=dtype, device="meta")
    flat = memory[entry.offset : entry.offset + entry.num_bytes]
    return flat.view(dtype).view(entry.shape)


def _guard_places(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The words at the ends of whole strides, and the last one (which may be one of them)."""
    words = buffer.view(torch.int64)
    every = GUARD_STRIDE // GUARD_BYTES
    return words[every - 1 :: every], words[-1:]
