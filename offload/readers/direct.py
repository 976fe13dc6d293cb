"""Reads past the page cache with threads in C++: nothing of a read needs Python's lock."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from pathlib import Path

import torch

from cluster.base.errors import InternalError, WeightStreamError
from offload.host_memory import allocate_block
from offload.readers.engine import ReaderUnavailableError, ReadTimeoutError
from replicas.kernels.build import (
    BuildPlan,
    KernelsUnavailableError,
    build_library,
    find_compiler,
)

SOURCES = Path(__file__).parent / "native"
_ABI = 1
_THREADS = 16
_CHUNK_BYTES = 2**19
"""Many small requests: 2.4 GB/s where 2 threads with 2 MiB each had 2.0 (virtio), for as little
processor time."""
_CLOSE_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


def build_direct(cache_dir: Path) -> Path:
    """The compiled reader, from the cache or new.

    Raises:
        ReaderUnavailableError: there is no compiler, or it fails.
    """
    try:
        return build_library(BuildPlan(compiler=find_compiler(), sources=SOURCES), cache_dir)
    except KernelsUnavailableError as error:
        raise ReaderUnavailableError(str(error)) from error


class DirectEngine:
    """Implements `ReadEngine`.

    Raises:
        ReaderUnavailableError: it cannot be compiled, or the file system knows no O_DIRECT.
    """

    name = "direct"

    def __init__(self, path: Path, num_slots: int, cache_dir: Path) -> None:
        self._path = path
        try:
            library = ctypes.CDLL(str(build_direct(cache_dir)))
        except OSError as error:
            raise ReaderUnavailableError(f"it cannot be loaded ({error})") from error
        if library.pk_reader_abi() != _ABI:
            raise ReaderUnavailableError("it has another interface")
        library.pk_reader_open.restype = ctypes.c_void_p
        library.pk_reader_wait.restype = ctypes.c_long
        self._library = library
        error_number = ctypes.c_int(0)
        self._handle = library.pk_reader_open(
            os.fsencode(path),
            num_slots,
            _THREADS,
            ctypes.c_long(_CHUNK_BYTES),
            ctypes.byref(error_number),
        )
        if not self._handle:
            reason = os.strerror(error_number.value)
            raise ReaderUnavailableError(f"{path} cannot be opened with O_DIRECT ({reason})")
        self._wanted = [0] * num_slots

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """See `ReadEngine`."""
        return allocate_block(num_bytes).memory

    def submit(self, slot: int, buffer: torch.Tensor, offset: int) -> None:
        """See `ReadEngine`."""
        status = self._library.pk_reader_submit(
            ctypes.c_void_p(self._handle),
            slot,
            ctypes.c_void_p(buffer.data_ptr()),
            ctypes.c_long(offset),
            ctypes.c_long(buffer.numel()),
        )
        if status != 0:
            raise InternalError(f"Slot {slot} is still being read.")
        self._wanted[slot] = buffer.numel()

    def wait(self, slot: int, timeout_s: float) -> None:
        """See `ReadEngine`."""
        result = self._library.pk_reader_wait(
            ctypes.c_void_p(self._handle), slot, ctypes.c_long(int(timeout_s * 1000))
        )
        if result == -errno.ETIMEDOUT:
            raise ReadTimeoutError(
                f"A read of {self._path} has not ended after {timeout_s:g} s.",
                "Look at the disk, or raise the read timeout.",
            )
        if result < 0:
            raise WeightStreamError(f"{self._path} cannot be read ({os.strerror(-result)}).")
        if result != self._wanted[slot]:
            raise WeightStreamError(
                f"{self._path} ended early: {result} bytes came of {self._wanted[slot]}."
            )

    def close(self) -> None:
        """See `ReadEngine`."""
        if not self._handle:
            return
        handle, self._handle = self._handle, None
        timeout_ms = ctypes.c_long(int(_CLOSE_TIMEOUT_S * 1000))
        if self._library.pk_reader_close(ctypes.c_void_p(handle), timeout_ms):
            _log.error("a read of %s hangs; its memory stays in use", self._path)
