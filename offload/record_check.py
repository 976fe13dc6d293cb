"""Whether a record that was read is whole: guard words at every read, the checksum at the first.

The guard words are spoilt before a read and compared after it, which finds a read that failed or
ended early in silence, without looking at each byte. Safe to call from two threads as long as each
buffer belongs to one of them.
"""

from __future__ import annotations

import zlib

import torch

from cluster.base.errors import CorruptWeightsError, WeightStreamError
from offload.layout import GUARD_BYTES, GUARD_STRIDE, Record, Store

VERIFY = ("first", "always")


class RecordCheck:
    """Checks the records of one store.

    Args:
        verify: one of `VERIFY`: when the checksum is computed.
        leaves_untouched: `spoil` does nothing, as reads are to make the pages; for engines that
            tell of failed reads.
    """

    def __init__(
        self, store: Store, verify: str = "first", *, leaves_untouched: bool = False
    ) -> None:
        self._path = store.path
        self._always = verify == "always"
        self._leaves_untouched = leaves_untouched
        self._verified: set[int] = set()
        self._guards: dict[int, torch.Tensor] = {}

    def needs_checksum(self, record: Record) -> bool:
        """Whether `check` will look at every byte: too long for who has something else to do."""
        if not record.guards:
            return False
        return self._always or record.offset not in self._verified

    def spoil(self, record: Record, buffer: torch.Tensor) -> None:
        """Make `buffer` differ from the record's end, or all of it, in every guard word."""
        if self._leaves_untouched or not record.guards:
            return
        strided, last = _guard_places(buffer)
        strided_words, last_words = self._guard_words(record, buffer)
        strided.copy_(~strided_words)
        last.copy_(~last_words)

    def check(self, record: Record, buffer: torch.Tensor, head: torch.Tensor | None = None) -> None:
        """Return when `buffer` holds the record.

        Args:
            head: its first bytes, whole strides or all of it, where `buffer` has only the others.

        Raises:
            WeightStreamError: it was not read whole.
            CorruptWeightsError: it is not what was packed.
        """
        if not record.guards:
            return  # made from checked tensors, not read
        if buffer.numel():
            places, words = _guard_places(buffer), self._guard_words(record, buffer)
            if not all(torch.equal(*each) for each in zip(places, words, strict=True)):
                raise WeightStreamError(
                    f"{self._path}: {record.num_bytes} bytes at {record.offset} were not read "
                    "whole.",
                    "Look at the disk.",
                )
        if not self.needs_checksum(record):
            return
        before = 0 if head is None else zlib.crc32(head.numpy().data)
        if zlib.crc32(buffer.numpy().data, before) != record.crc32:
            raise CorruptWeightsError(
                f"{self._path}: {record.num_bytes} bytes at {record.offset} are not what was "
                "packed.",
                "Delete the file; it is packed again at the next start.",
            )
        self._verified.add(record.offset)

    def _guard_words(
        self, record: Record, buffer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the record's end that `buffer` is: as `_guard_places` has them."""
        if record.offset not in self._guards:
            words = torch.frombuffer(bytearray(record.guards), dtype=torch.int64)
            self._guards[record.offset] = words
        words, strides = self._guards[record.offset], record.num_bytes // GUARD_STRIDE
        missing = (record.num_bytes - buffer.numel()) // GUARD_STRIDE
        return words[missing:strides], words[strides:]


def _guard_places(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The words at the ends of whole strides, and the last one (which may be one of them)."""
    words = buffer.view(torch.int64)
    every = GUARD_STRIDE // GUARD_BYTES
    return words[every - 1 :: every], words[-1:]
