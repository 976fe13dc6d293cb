"""Host memory at exact size: anonymous pages, huge where possible, locked where permitted.

torch's pinned allocator rounds every block up to a power of two, and a gigabyte of ring is no place
for that. Also says what this process may have: container limit, locked memory.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

HUGE_BYTES = 2 * 2**20
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1: make the pages huge now
_MADV_POPULATE_WRITE = 23  # Linux 5.14: make the pages now, whatever they hold
_PIECE_BYTES = 16 * HUGE_BYTES
_CGROUP_V2 = Path("/sys/fs/cgroup")
_CGROUP_V1 = Path("/sys/fs/cgroup/memory")
_MLOCK_ONFAULT = 1
_NO_LIMIT_BYTES = 2**60  # version 1 writes "none" as a huge number


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBlock:
    """Memory, and how far it is what was asked for."""

    memory: torch.Tensor
    """uint8, page aligned, zero; freed with its last view."""
    is_locked: bool
    is_huge: bool


def allocate_block(num_bytes: int) -> HostBlock:
    """`num_bytes` of host memory; it is not an error when it cannot be locked or made huge.

    Raises:
        OSError: there is no memory.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    memory = _mapped(libc, num_bytes)
    is_locked = libc.mlock(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(num_bytes)) == 0
    if not is_locked:
        memory.zero_()  # touched now, so that a budget that does not hold is noticed at start
    return HostBlock(memory=memory, is_locked=is_locked, is_huge=collapse_pages(memory))


def block_on_demand(num_bytes: int) -> torch.Tensor:
    """As `allocate_block`, but a page is there, and then locked, only once something touches it.

    For what arrives piece by piece: making pages can take as long as reading into them (a virtual
    machine asks its host for each), and whoever reads makes them beside the others' work.

    Raises:
        OSError: there is no memory.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    memory = _mapped(libc, num_bytes)
    size = ctypes.c_size_t(num_bytes)
    libc.mlock2(ctypes.c_void_p(memory.data_ptr()), size, _MLOCK_ONFAULT)
    return memory


def make_pages(memory: torch.Tensor) -> None:
    """Make the pages of `memory` (page aligned), whose contents stay; for a thread of its own.

    Where the kernel cannot, whoever touches a page makes it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for piece in torch.split(memory, _PIECE_BYTES):
        if not _advise(libc, piece, _MADV_POPULATE_WRITE):
            return


def collapse_pages(memory: torch.Tensor) -> bool:
    """Make the pages of `memory` huge ones, where it spans any; whether that worked."""
    start = -memory.data_ptr() % HUGE_BYTES
    num_bytes = (memory.numel() - start) // HUGE_BYTES * HUGE_BYTES
    if num_bytes <= 0:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return _advise(libc, memory[start : start + num_bytes], _MADV_COLLAPSE)


def why_not_lock(num_bytes: int) -> str:
    """Why this process may not lock so much memory; empty when it may. Touches none of it."""
    if num_bytes == 0:
        return ""
    room = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = torch.frombuffer(room, dtype=torch.uint8).data_ptr()
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t(num_bytes)
    if libc.mlock2(ctypes.c_void_p(address), size, _MLOCK_ONFAULT) == 0:
        return ""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    return f"{num_bytes} bytes cannot be locked (RLIMIT_MEMLOCK is {limit})"


def container_limit_bytes(root: Path | None = None) -> int | None:
    """What the container may hold in memory, by cgroup version 2 or 1; None: no limit."""
    candidates = [_CGROUP_V2 / "memory.max", _CGROUP_V1 / "memory.limit_in_bytes"]
    if root is not None:
        candidates = [root / path.name for path in candidates]
    for path in candidates:
        if path.exists():
            text = path.read_text().strip()
            limit = None if text == "max" else int(text)
            return limit if limit is not None and limit < _NO_LIMIT_BYTES else None
    return None


def _mapped(libc: ctypes.CDLL, num_bytes: int) -> torch.Tensor:
    """Anonymous memory that begins at a huge page; its pages are not there yet."""
    # Room to align; pages that are never touched cost nothing.
    room = mmap.mmap(-1, num_bytes + HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(room, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_BYTES
    memory = whole[start : start + num_bytes]
    if num_bytes >= HUGE_BYTES:
        _advise(libc, memory, _MADV_HUGEPAGE)
    return memory


def _advise(libc: ctypes.CDLL, memory: torch.Tensor, advice: int) -> bool:
    address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel())
    return bool(libc.madvise(address, size, ctypes.c_int(advice)) == 0)
