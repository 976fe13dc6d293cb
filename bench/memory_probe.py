"""How fast this machine reads memory right now: the roofline that decoding is held against.

The probe reads as many bytes as a token of the model does, again and again, as decoding would: a
machine whose cache holds the model must be held against its cache. Several ways to walk the buffer
are tried and the fastest counts, for the rate drifts on shared machines and a roofline is what
could have been.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from cluster.base.env import default_cache_dir
from replicas.kernels.build import (
    BuildPlan,
    KernelsUnavailableError,
    build_library,
    find_compiler,
)

STREAMS = (1, 4, 8)
READS = 2
_SOURCES = Path(__file__).parent / "native"


class MemoryProbe:
    """Reads `num_bytes` with `threads` threads; holds that much memory until it is closed."""

    def __init__(self, num_bytes: int, threads: int) -> None:
        self._num_bytes = num_bytes
        self._close: Callable[[], object] = _nothing
        self.how = "plain loads in 1, 4 or 8 streams a thread, 2 MiB pages"
        try:
            self._open_compiled(threads)
        except KernelsUnavailableError:
            self.how = "torch.sum"
            self._ways: list[Callable[[], object]] = [torch.ones(num_bytes // 4).sum]

    def read(self) -> float:
        """GB/s of the fastest of a few reads."""
        best_s = min(_seconds(way) for way in self._ways for _ in range(READS))
        return self._num_bytes / best_s / 1e9

    def close(self) -> None:
        """Give the buffer back; the probe is of no use after this."""
        self._ways = []
        self._close()
        self._close = _nothing

    def _open_compiled(self, threads: int) -> None:
        plan = BuildPlan(compiler=find_compiler(), sources=_SOURCES)
        library = ctypes.CDLL(str(build_library(plan, default_cache_dir() / "kernels")))
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        library.probe_open.restype = pointer
        library.probe_open.argtypes = [size]
        library.probe_close.argtypes = [pointer, size]
        library.probe_read.restype = ctypes.c_uint64
        library.probe_read.argtypes = [pointer, size, ctypes.c_long, ctypes.c_int]
        data = library.probe_open(self._num_bytes)
        if not data:
            raise KernelsUnavailableError(f"there is no memory for {self._num_bytes} bytes")
        self._close = partial(library.probe_close, data, self._num_bytes)
        self._ways = [
            partial(library.probe_read, data, self._num_bytes, streams, threads)
            for streams in STREAMS
        ]


def _nothing() -> None:
    pass


def _seconds(way: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    way()
    return time.perf_counter() - started_s
