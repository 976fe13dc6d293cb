"""Host memory for what is read again and again: large pages for weights and caches, and scratch.

Packed weights and KV caches are read in long runs; with 4 KiB pages half of such a read can go into
walking page tables (measured: 26 GB/s against 31, and more on virtual machines). Both kinds are
plain torch tensors, whose memory lives as long as any view of it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading

import torch

_HUGE_BYTES = 1 << 21
_CHUNK_BYTES = 16 * _HUGE_BYTES
_ALIGNMENT = 4096


class HugePages:
    """Hands out tensors from large mappings; small ones share one. Contents are zero.

    Pages become large where the system gives them, and take up memory when they are first written.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own memory, aligned to a small page."""
        num_bytes = math.prod(shape) * dtype.itemsize
        taken = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        if taken > self._free.numel():
            chunk = _mapped(max(taken, _CHUNK_BYTES))
            if taken >= _CHUNK_BYTES:
                return chunk[:num_bytes].view(dtype).view(shape)
            self._free = chunk
        piece, self._free = self._free[:num_bytes], self._free[taken:]
        return piece.view(dtype).view(shape)


class ScratchMemory:
    """Memory that a kernel may scribble in during a call; one piece per thread, grown on demand."""

    def __init__(self) -> None:
        self._local = threading.local()

    def at_least(self, num_bytes: int) -> int:
        """The address of so many bytes, aligned; valid until this thread's next call."""
        size, address = getattr(self._local, "piece", (0, 0))
        if size < num_bytes:
            held = _mapped(num_bytes)
            self._local.held = held
            size, address = held.numel(), held.data_ptr()
            self._local.piece = size, address
        return address


def _mapped(num_bytes: int) -> torch.Tensor:
    """At least so many bytes that begin on a large page."""
    whole = -(-num_bytes // _HUGE_BYTES) * _HUGE_BYTES
    try:
        # Private: shared memory gets large pages only where the system allows it for shmem too.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        pages = mmap.mmap(-1, whole + _HUGE_BYTES, flags=flags)
    except OSError as error:  # in torch's own words, which callers know
        raise RuntimeError(f"can't allocate memory: {whole} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: small pages do as well
            pages.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(pages, dtype=torch.uint8)
    start = -raw.data_ptr() % _HUGE_BYTES
    return raw[start : start + whole]
