"""A lock among all processes of a node, held by way of a file."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.05


@contextmanager
def file_lock(path: Path, timeout_s: float) -> Iterator[bool]:
    """Hold the lock of a file, which is made if need be; the kernel frees it with its holder.

    Yields:
        Whether it is held: False when another process still had it after `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    with path.open("w") as file:
        is_held = False
        while not is_held:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_held = True
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    break
                time.sleep(_POLL_S)
        yield is_held
