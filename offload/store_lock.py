"""One packer of a store at a time, among all processes of a node."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.base.errors import ConfigError

_POLL_S = 0.1
# Ranks and replicas that start together wait for the one that packs.
_TIMEOUT_S = 3600.0


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds the file lock of a store; the kernel frees it with its holder."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise ConfigError(
                        f"Another process has been packing {path.with_suffix('.weights')} for "
                        f"{_TIMEOUT_S:.0f} s.",
                        "Look for a process that hangs.",
                        param="disk_path",
                    ) from None
                time.sleep(_POLL_S)
        yield
