"""One packer of a store at a time, among all processes of a node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.base.errors import ConfigError
from cluster.base.file_lock import file_lock

# Ranks and replicas that start together wait for the one that packs.
_TIMEOUT_S = 3600.0


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds the file lock of a store.

    Raises:
        ConfigError: another process has held it for an hour.
    """
    with file_lock(path, _TIMEOUT_S) as is_held:
        if not is_held:
            raise ConfigError(
                f"Another process has been packing {path.with_suffix('.weights')} for "
                f"{_TIMEOUT_S:.0f} s.",
                "Look for a process that hangs.",
                param="disk_path",
            )
        yield
