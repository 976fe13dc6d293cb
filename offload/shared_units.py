"""Units that stay, as pages of the store's file that all replicas of a node have in common.

The file is mapped, so the kernel keeps one copy of a page whoever maps it, counts its users and
lets go of it when the last has gone, however that one ended. Pages are locked where that is
permitted; without it the kernel may drop them when memory is short and read them again.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import torch

from cluster.base.amount_text import size_text
from cluster.base.errors import WeightStreamError
from offload.awaited_units import AwaitedUnits, record_order
from offload.layout import Record, Store
from offload.record_check import RecordCheck
from offload.residents import record_numbers

_log = logging.getLogger(__name__)
_MADV_POPULATE_READ = 22  # Linux 5.14: read the pages now, and say so when that fails


class SharedUnits(AwaitedUnits):
    """Tensors of units in the mapped file; read only.

    They are read in their order by a thread; looking one up waits for it.

    Args:
        timeout_s: longest wait for one record.

    Raises:
        WeightStreamError: the file cannot be mapped. Looking up: it cannot be read.
        CorruptWeightsError: looking up, what was read is not what was packed.
    """

    def __init__(self, store: Store, units: Sequence[str], timeout_s: float) -> None:
        super().__init__(store, units)
        self._timeout_s = timeout_s
        self._file = _mapped(store.path)
        self._check = RecordCheck(store, leaves_untouched=True)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shared-weights")
        self._reads = {
            number: self._thread.submit(self._read, number) for number in record_order(store, units)
        }
        self._locking = self._thread.submit(self._lock, record_numbers(store, units))

    def close(self) -> None:
        """Stop reading; the pages go with the last tensor. Safe to call twice."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _await(self, number: int, unit: str) -> torch.Tensor:
        try:
            return self._reads[number].result(self._timeout_s)
        except FutureTimeoutError as error:
            raise WeightStreamError(
                f"Pages of {unit} in {self._store.path} are not there after {self._timeout_s:g} s.",
                "Look at the disk.",
            ) from error

    def _read(self, number: int) -> torch.Tensor:
        """The record, all of its pages read and checked."""
        record = self._store.records[number]
        memory = self._pages(record)
        address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel())
        if self._libc.madvise(address, size, ctypes.c_int(_MADV_POPULATE_READ)):
            error = ctypes.get_errno()
            # An older kernel does not know the advice: the check reads every page.
            if error != errno.EINVAL:
                raise WeightStreamError(
                    f"{self._store.path}: {record.num_bytes} bytes at {record.offset} cannot be "
                    f"read (error {error}).",
                    "Look at the disk.",
                )
        self._check.check(record, memory)
        return memory

    def _lock(self, numbers: Sequence[int]) -> None:
        """Keep the pages in memory, where this process may."""
        blocks = [self._pages(self._store.records[number]) for number in numbers]
        total = size_text(sum(block.numel() for block in blocks))
        for block in blocks:
            if self._libc.mlock(ctypes.c_void_p(block.data_ptr()), ctypes.c_size_t(block.numel())):
                _log.info("%s of shared weights are not locked: RLIMIT_MEMLOCK", total)
                return
        _log.info("%s of shared weights locked", total)

    def _pages(self, record: Record) -> torch.Tensor:
        return self._file[record.offset : record.offset + record.num_bytes]


def _mapped(path: Path) -> torch.Tensor:
    """The whole file as bytes; unmapped with the last view."""
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise WeightStreamError(f"{path} cannot be mapped ({error}).") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nobody may write; nobody does
        return torch.frombuffer(pages, dtype=torch.uint8)
