"""What the disk gives to the same reader, with the same requests, when nothing is computed."""

from __future__ import annotations

import time

from cluster.base.env import default_cache_dir
from offload.layout import PAGE_BYTES, Store
from offload.readers.choose import openers

_BUFFERS = 3
_PIECE_BYTES = 32 * 2**20
_TIMEOUT_S = 60.0


def disk_bytes_per_s(store: Store, reader: str) -> float:
    """Bytes per second over the whole file, once, in order, as many reads ahead as the ring has."""
    engine = openers(store.path, default_cache_dir())[reader](_BUFFERS)
    try:
        memory = engine.allocate(_BUFFERS * _PIECE_BYTES)
        end = store.total_bytes // PAGE_BYTES * PAGE_BYTES
        pieces = [
            (offset, min(_PIECE_BYTES, end - offset))
            for offset in range(PAGE_BYTES, end, _PIECE_BYTES)
        ]
        started_s = time.perf_counter()
        for index, (offset, size) in enumerate(pieces):
            slot = index % _BUFFERS
            if index >= _BUFFERS:
                engine.wait(slot, _TIMEOUT_S)
            start = slot * _PIECE_BYTES
            engine.submit(slot, memory[start : start + size], offset)
        for index in range(max(0, len(pieces) - _BUFFERS), len(pieces)):
            engine.wait(index % _BUFFERS, _TIMEOUT_S)
        seconds = time.perf_counter() - started_s
    finally:
        engine.close()
    return sum(size for _, size in pieces) / seconds
