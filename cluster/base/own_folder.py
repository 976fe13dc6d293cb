"""Temporary directories that do not outlive their process by much, however it ends.

A process that is killed cleans nothing up. So each directory holds a locked file: the kernel frees
the lock with its holder, and whoever finds it free may take the directory away. Process ids would
not do: they are reused, and differ between containers that share a temporary directory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO

_PREFIX = "penstock-"
_LOCK = "alive"


class OwnFolder:
    """A new directory that only its owner can enter, under a short path, until `close`.

    It goes with this object or the interpreter at the latest.

    Args:
        kind: a word for its name.
    """

    def __init__(self, kind: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-"))
        # Locked under another name first: nobody may find it free.
        draft = self.path / f"{_LOCK}.new"
        lock = draft.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        draft.rename(self.path / _LOCK)
        self._end = weakref.finalize(self, _remove, self.path, lock)

    def close(self) -> None:
        """Take it away with all that is in it; harmless when it is gone."""
        self._end()


def remove_left_folders() -> int:
    """Take away this user's directories whose processes are gone; returns how many.

    Those that cannot be judged or removed are left alone.
    """
    locks = Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}")
    return sum(_remove_if_left(lock) for lock in locks)


def _remove(path: Path, lock: IO[str]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    lock.close()


def _remove_if_left(lock: Path) -> bool:
    try:
        if lock.parent.is_symlink() or lock.parent.stat().st_uid != os.getuid():
            return False
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    except OSError:  # BlockingIOError is one: somebody lives there
        return False
    return True
