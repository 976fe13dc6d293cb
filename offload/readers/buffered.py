"""Reads through the page cache, for file systems without O_DIRECT and machines without a compiler.

One thread; a read is one long system call, during which Python's lock is free. What was read is
dropped from the page cache, which would otherwise hold the whole model a second time.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import torch

from cluster.base.errors import InternalError, WeightStreamError
from offload.host_memory import allocate_block
from offload.readers.engine import ReaderUnavailableError, ReadTimeoutError

_PIECE_BYTES = 16 * 2**20
_CLOSE_TIMEOUT_S = 10.0


class BufferedEngine:
    """Implements `ReadEngine`.

    Raises:
        ReaderUnavailableError: the file cannot be opened.
    """

    name = "buffered"

    def __init__(self, path: Path, num_slots: int) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ReaderUnavailableError(f"{path} cannot be opened ({error})") from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._reads: list[Future[None] | None] = [None] * num_slots
        self._closed = False

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """See `ReadEngine`."""
        return allocate_block(num_bytes).memory

    def submit(self, slot: int, buffer: torch.Tensor, offset: int) -> None:
        """See `ReadEngine`."""
        before = self._reads[slot]
        if before is not None and not before.done():
            raise InternalError(f"Slot {slot} is still being read.")
        self._reads[slot] = self._thread.submit(self._read, buffer.numpy().data, offset)

    def wait(self, slot: int, timeout_s: float) -> None:
        """See `ReadEngine`."""
        read = self._reads[slot]
        if read is None:
            raise InternalError(f"Slot {slot} is not being read.")
        try:
            read.result(timeout_s)
        except FutureTimeoutError:
            raise ReadTimeoutError(
                f"A read of {self._path} has not ended after {timeout_s:g} s.",
                "Look at the disk, or raise the read timeout.",
            ) from None
        except OSError as error:
            raise WeightStreamError(f"{self._path} cannot be read ({error}).") from error

    def close(self) -> None:
        """See `ReadEngine`."""
        if self._closed:
            return
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        pending = [read for read in self._reads if read is not None and not read.done()]
        _, hung = wait(pending, _CLOSE_TIMEOUT_S)
        # A read that hangs keeps its descriptor: its number must not come to mean another file.
        if not hung:
            os.close(self._file)

    def _read(self, memory: memoryview, offset: int) -> None:
        done = 0
        while done < len(memory):
            piece = memory[done : done + _PIECE_BYTES]
            got = os.preadv(self._file, [piece], offset + done)
            if got == 0:
                raise OSError(f"it ended early: {done} bytes came of {len(memory)}")
            os.posix_fadvise(self._file, offset + done, got, os.POSIX_FADV_DONTNEED)
            done += got
