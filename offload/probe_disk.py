"""What the disk gives past the page cache, and what reading takes from computation on the host."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import WeightStreamError
from offload.readers.choose import PROBE_TIMEOUT_S, OpenEngine, choose_reader, measure, openers

FILE_BYTES = 256 << 20
PIECE_BYTES = 2 << 20
BESIDE_RUNS = 8
"""Runs of the work, with reads beside them and without, in turn."""
BESIDE_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Of the reader that a replica would choose."""

    bytes_per_s: float
    compute_lost: float
    """Share of the host's computation that is lost while the disk is read: memory and cores are
    the same. 0: none."""


def measure_disk(directory: Path, work: Callable[[], object] | None) -> DiskRates:
    """Writes a file into `directory`, reads it and removes it.

    Args:
        work: computes on the host as a streamed layer would; None: a device computes.

    Raises:
        OSError: the directory cannot be written or read.
        ConfigError: no reader works there.
    """
    with _probe_file(directory) as path:
        engines = openers(path, default_cache_dir())
        open_engine = engines[choose_reader("auto", path, engines)]
        rate = max(_read_rate(open_engine, path) for _ in range(3))
        if work is None:
            return DiskRates(bytes_per_s=rate, compute_lost=0.0)
        alone_s, beside_s = [], []
        for _ in range(BESIDE_ROUNDS):
            alone_s.append(_seconds(work))
            with _reading(open_engine, path):
                beside_s.append(_seconds(work))
    return DiskRates(bytes_per_s=rate, compute_lost=max(0.0, 1 - min(alone_s) / min(beside_s)))


@contextmanager
def _probe_file(directory: Path) -> Iterator[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix="probe-") as file:
        chunk = os.urandom(1 << 20)
        for _ in range(FILE_BYTES >> 20):
            file.write(chunk)
        file.flush()
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(file.name)


def _seconds(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    for _ in range(BESIDE_RUNS):
        work()
    return time.perf_counter() - started_s


@contextmanager
def _reading(open_engine: OpenEngine, path: Path) -> Iterator[None]:
    """The file is read over and over, two pieces at a time, until the block is left."""
    ends = threading.Event()
    engine = open_engine(2)
    pieces = torch.split(engine.allocate(2 * PIECE_BYTES), PIECE_BYTES)
    count = path.stat().st_size // PIECE_BYTES

    def read() -> None:
        for number in itertools.count():
            try:
                if number > 1:
                    engine.wait(number % 2, PROBE_TIMEOUT_S)
                if ends.is_set():
                    return
                engine.submit(number % 2, pieces[number % 2], number % count * PIECE_BYTES)
            except WeightStreamError:
                return

    thread = threading.Thread(target=read, name="probe-reads", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()
        engine.close()


def _read_rate(open_engine: OpenEngine, path: Path) -> float:
    engine = open_engine(2)
    try:
        return measure(engine, path)
    finally:
        engine.close()
