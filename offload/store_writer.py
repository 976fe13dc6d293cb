"""Writes a packed store record by record; the file has its name only when it is complete.

Pages are handed to the disk as they are written, so packing a model never fills the memory with
pages that wait. A process that dies leaves a file with a temporary name, which the next one
removes. With a codec, or where only a piece of a record is stored, it is in memory until it is
finished.
"""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from offload.compression import RecordCodec
from offload.layout import (
    GUARD_BYTES,
    GUARD_STRIDE,
    PAGE_BYTES,
    TENSOR_ALIGN,
    Record,
    Store,
    aligned,
    encode_head,
    encode_index,
)
from offload.pieces import Piece

TEMPORARY_SUFFIX = ".part"
_FLUSH_BYTES = 64 * 2**20


class StoreWriter:
    """A store being written; leave the `with` block without `commit` and nothing remains.

    Args:
        codec: makes records smaller; None: they are stored as they are used.

    Raises:
        OSError: the disk is full, or the directory cannot be written.
    """

    def __init__(self, target: Path, codec: RecordCodec | None = None) -> None:
        self._target = target
        self._codec = codec
        self._part = target.with_name(f"{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        self._file = self._part.open("wb", buffering=2**20)
        self._records: list[Record] = []
        self._record: _OpenRecord | None = None
        self._length = 0
        self._piece: Piece | None = None
        self._image = bytearray()
        self._position = 0
        self._flushed = 0
        self._pad_to(PAGE_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)

    @property
    def records(self) -> tuple[Record, ...]:
        """The finished ones."""
        return tuple(self._records)

    def begin(self, piece: Piece | None = None) -> None:
        """Start a record, of which only a piece is stored where one is given."""
        self._record = _OpenRecord(start=self._position)
        self._piece = piece
        self._length = 0
        self._image = bytearray()

    def add(self, data: memoryview) -> int:
        """Append a tensor's bytes to the record; returns their offset in it."""
        self._open_record()
        self._fill(aligned(self._length, TENSOR_ALIGN))
        offset = self._length
        self._put(data)
        return offset

    def finish(self) -> int:
        """End the record; returns its number."""
        record = self._open_record()
        # A record has a page at least, so that it has a guard word.
        self._fill(max(aligned(self._length), PAGE_BYTES))
        start, stop = self._piece.span(self._length) if self._piece else (0, self._length)
        if self._image and stop > start:
            self._write(self._encoded(start, stop))
        finished = record.finished(stop - start)
        if self._piece is not None:
            finished = replace(finished, piece_of=self._length, piece_at=start)
        self._records.append(finished)
        self._record = None
        self._flush(_FLUSH_BYTES)
        return len(self._records) - 1

    def commit(self, store: Store) -> None:
        """Write the index and the head, wait for the disk, and give the file its name."""
        index = encode_index(store)
        offset = self._position
        self._file.write(index)
        self._file.seek(0)
        self._file.write(encode_head(index, offset))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._part.rename(self._target)
        folder = os.open(self._target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _open_record(self) -> _OpenRecord:
        if self._record is None:
            raise RuntimeError("begin() comes before add() and finish()")
        return self._record

    def _fill(self, length: int) -> None:
        self._put(memoryview(bytes(length - self._length)))

    def _put(self, data: memoryview) -> None:
        """Append to the record's image, which is what is stored but for a codec or a piece."""
        self._length += len(data)
        if self._codec is None and self._piece is None:
            self._write(data)
        else:
            self._image += data

    def _encoded(self, start: int, stop: int) -> memoryview:
        """That part of the image as it is stored."""
        image = torch.frombuffer(self._image, dtype=torch.uint8)[start:stop]
        record = None if self._codec is None else self._codec.encode(image)
        return (image if record is None else record).numpy().data

    def _write(self, data: memoryview) -> None:
        if self._record is not None:
            self._record.take(data)
        self._file.write(data)
        self._position += len(data)

    def _pad_to(self, position: int) -> None:
        self._file.write(bytes(position - self._position))
        self._position = position

    def _flush(self, at_least: int) -> None:
        if self._position - self._flushed < at_least:
            return
        self._file.flush()
        os.fdatasync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, self._position, os.POSIX_FADV_DONTNEED)
        self._flushed = self._position


class _OpenRecord:
    """CRC and guard words of a record while it grows."""

    def __init__(self, start: int) -> None:
        self.start = start
        self._crc = 0
        self._length = 0
        self._guards = bytearray()
        self._tail = b""

    def take(self, data: memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)
        at = 0
        while at < len(data):
            piece = data[at : at + GUARD_STRIDE - self._length % GUARD_STRIDE]
            self._tail = (self._tail + bytes(piece[-GUARD_BYTES:]))[-GUARD_BYTES:]
            self._length += len(piece)
            at += len(piece)
            if self._length % GUARD_STRIDE == 0:
                self._guards += self._tail

    def finished(self, image_bytes: int) -> Record:
        # One more word for the end, also where it is the end of a stride.
        return Record(
            offset=self.start,
            num_bytes=self._length,
            crc32=self._crc,
            guards=bytes(self._guards + self._tail),
            compressed_from=image_bytes if image_bytes != self._length else 0,
        )
