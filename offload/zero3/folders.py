"""A folder of one process on a shared disk: no other process touches it and none is left behind.

Its owner holds a lock on a file beside it for as long as it lives, however it ends. So whoever
comes later can tell the folders of the living from those that a killed process left, and removes
the latter.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from pathlib import Path

_SUFFIX = ".lock"


class OwnFolder:
    """A new, empty folder in `parent`; gone after `close`.

    Raises:
        OSError: `parent` cannot be made or written.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        self.path = parent / uuid.uuid4().hex
        self._lock_path = self.path.with_suffix(_SUFFIX)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._lock: int | None = os.open(self._lock_path, flags, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path.mkdir(mode=0o700)

    def close(self) -> None:
        """Remove it; safe to call twice."""
        if self._lock is not None:
            _remove(self._lock_path)
            os.close(self._lock)
            self._lock = None


def _sweep(parent: Path) -> None:
    """Remove the folders whose owners are dead."""
    for lock_path in parent.glob(f"*{_SUFFIX}"):
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # gone meanwhile, or another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock_path)
        except OSError:
            pass  # its owner lives
        finally:
            os.close(lock)


def _remove(lock_path: Path) -> None:
    # The lock goes last: a half-removed folder keeps the name by which it is found again.
    shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
    lock_path.unlink(missing_ok=True)
