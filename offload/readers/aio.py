"""Reads with DeepSpeed's asynchronous I/O: as fast as the disk, for the least processor time.

What its C++ does not forgive is kept from it here: it ends the process when a file is shorter than
a read, when a handle goes while it reads, or when memory cannot be locked, and it takes a failed
read for a good one (guard words find that). `wait` is per handle, so every read under way has its
own, and a thread of ours waits, because it knows no deadline. A handle has a thread and two kernel
contexts: there are as many as reads under way, not as slots (a cache has hundreds). Memory has to
come from its own allocator, else every read is copied; the pages are then made huge, which it does
not do and which matters most.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import queue
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cluster.base.errors import InternalError, WeightStreamError
from offload.host_memory import HUGE_BYTES, collapse_pages, why_not_lock
from offload.readers.aio_build import find_ops
from offload.readers.engine import ReaderUnavailableError, ReadTimeoutError

_BLOCK_BYTES = 2**19
_QUEUE_DEPTH = 32
_SINGLE_SUBMIT = True
"""Requests submitted together are merged by the kernel into few large ones, which a disk serves
less of at a time: 2.1 GB/s against 2.4 GB/s one by one (virtio)."""
_THREADS_PER_HANDLE = 1
_MAX_HANDLES = 16
"""Reads under way at a time; a further one waits for the oldest."""
_HANDLE_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 10.0
_AIO_LIMITS = (Path("/proc/sys/fs/aio-nr"), Path("/proc/sys/fs/aio-max-nr"))
_log = logging.getLogger(__name__)


class AioEngine:
    """Implements `ReadEngine`.

    Raises:
        ReaderUnavailableError: it is not built or cannot be loaded, or the system has no more
            asynchronous I/O to give.
    """

    name = "aio"

    def __init__(self, path: Path, num_slots: int, cache_dir: Path) -> None:
        self._path = path
        num_handles = min(num_slots, _MAX_HANDLES)
        _check_limits(num_handles)
        _check_direct(path)
        module = load_ops(cache_dir)
        self._handles: list[Any] = [
            module.aio_handle(_BLOCK_BYTES, _QUEUE_DEPTH, _SINGLE_SUBMIT, True, _THREADS_PER_HANDLE)
            for _ in range(num_handles)
        ]
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(num_handles):
            self._free.put(number)
        self._ended = [threading.Event() for _ in range(num_slots)]
        for event in self._ended:
            event.set()
        self._blocks: list[torch.Tensor] = []
        self._waiting: queue.SimpleQueue[_Read | None] = queue.SimpleQueue()
        # The thread keeps the handles: if it hangs in one, that one must never be destroyed.
        self._thread = threading.Thread(
            target=_wait_for_reads,
            args=(self._waiting, self._handles, self._free),
            name="weights",
            daemon=True,
        )
        self._thread.start()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """See `ReadEngine`; locked, in huge pages where it spans any.

        Raises:
            ReaderUnavailableError: so much memory cannot be locked.
        """
        asked = num_bytes + HUGE_BYTES
        if reason := why_not_lock(asked):
            raise ReaderUnavailableError(reason)
        block = self._handles[0].new_cpu_locked_tensor(asked, torch.empty(0, dtype=torch.uint8))
        self._blocks.append(block)
        start = -block.data_ptr() % HUGE_BYTES
        memory: torch.Tensor = block[start : start + num_bytes]
        collapse_pages(memory)
        return memory

    def submit(self, slot: int, buffer: torch.Tensor, offset: int) -> None:
        """See `ReadEngine`."""
        if not self._ended[slot].is_set():
            raise InternalError(f"Slot {slot} is still being read.")
        try:
            size = os.stat(self._path).st_size
        except OSError as error:
            raise WeightStreamError(f"{self._path} cannot be read ({error}).") from error
        if offset + buffer.numel() > size:
            raise WeightStreamError(f"{self._path} ends at byte {size}, before a record does.")
        try:
            number = self._free.get(timeout=_HANDLE_TIMEOUT_S)
        except queue.Empty:
            raise ReadTimeoutError(
                f"No read of {self._path} has ended for {_HANDLE_TIMEOUT_S:g} s.",
                "Look at the disk.",
            ) from None
        if self._handles[number].async_pread(buffer, str(self._path), offset) != 0:
            self._free.put(number)
            raise WeightStreamError(f"{self._path} cannot be opened for asynchronous reads.")
        self._ended[slot].clear()
        self._waiting.put(_Read(handle=number, ended=self._ended[slot]))

    def wait(self, slot: int, timeout_s: float) -> None:
        """See `ReadEngine`."""
        if not self._ended[slot].wait(timeout_s):
            raise ReadTimeoutError(
                f"A read of {self._path} has not ended after {timeout_s:g} s.",
                "Look at the disk, or raise the read timeout.",
            )

    def close(self) -> None:
        """See `ReadEngine`."""
        if not self._handles:
            return
        self._waiting.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            _log.error("a read of %s hangs; its memory stays in use", self._path)
            return
        for block in self._blocks:
            self._handles[0].free_cpu_locked_tensor(block)
        self._blocks = []
        self._handles.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """One under way: number of its handle, and what to set when it has ended."""

    handle: int
    ended: threading.Event


def _wait_for_reads(
    waiting: queue.SimpleQueue[_Read | None], handles: list[Any], free: queue.SimpleQueue[int]
) -> None:
    """Wait for reads in the order of their submission, until told to stop."""
    while (read := waiting.get()) is not None:
        handles[read.handle].wait()
        free.put(read.handle)
        read.ended.set()


def load_ops(cache_dir: Path) -> ModuleType:
    """The module with `aio_handle`; its pinned memory manager comes first, and is global.

    Raises:
        ReaderUnavailableError: it is not built, or cannot be loaded.
    """
    modules = find_ops(cache_dir)
    try:
        _import("pin_memory_op", modules["pin_memory_op"])
        ctypes.CDLL(str(modules["pin_memory_op"]), mode=ctypes.RTLD_GLOBAL)
        return _import("async_io_op", modules["async_io_op"])
    except (ImportError, OSError) as error:
        raise ReaderUnavailableError(f"it cannot be loaded ({error})") from error


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ReaderUnavailableError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_limits(num_handles: int) -> None:
    """Two contexts a handle; creating one beyond the system's limit ends the process."""
    try:
        used, limit = (int(path.read_text()) for path in _AIO_LIMITS)
    except (OSError, ValueError):
        return
    # The kernel counts requests per processor and doubles them.
    events = 2 * max(_QUEUE_DEPTH, 4 * (os.cpu_count() or 1))
    wanted = num_handles * (1 + _THREADS_PER_HANDLE) * events
    if used + wanted > limit:
        raise ReaderUnavailableError(
            f"fs.aio-max-nr is {limit}, {used} are in use and {wanted} more are needed"
        )


def _check_direct(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        raise ReaderUnavailableError(f"{path} cannot be opened with O_DIRECT ({error})") from error
