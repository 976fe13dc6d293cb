"""A memory cgroup for child processes: a bound, the peak, how often it was met (v1 and v2)."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """Made on entry, removed on exit; needs root.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        self._v1 = (V1 / "memory.limit_in_bytes").exists()
        self.path = (V1 if self._v1 else V2) / name
        self._limit_bytes = limit_bytes

    @property
    def procs(self) -> Path:
        """A process that writes its id here is in."""
        return self.path / "cgroup.procs"

    def __enter__(self) -> Self:
        self.path.mkdir(exist_ok=True)
        self.limit(self._limit_bytes)
        if not self._v1:
            (self.path / "memory.swap.max").write_text("0", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _ in range(50):
            with suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)

    def limit(self, limit_bytes: int) -> None:
        """Another bound from now on."""
        name = "memory.limit_in_bytes" if self._v1 else "memory.max"
        (self.path / name).write_text(str(limit_bytes), encoding="utf-8")

    def reset(self) -> None:
        """Forget the peak, and give back pages that nobody uses any more."""
        if self._v1:
            with suppress(OSError):
                (self.path / "memory.force_empty").write_text("0", encoding="utf-8")
            (self.path / "memory.max_usage_in_bytes").write_text("0", encoding="utf-8")
            (self.path / "memory.failcnt").write_text("0", encoding="utf-8")

    def peak_bytes(self) -> int:
        """Most that was charged since `reset` (v2: since it was made)."""
        name = "memory.max_usage_in_bytes" if self._v1 else "memory.peak"
        return int((self.path / name).read_text(encoding="utf-8"))

    def num_hits(self) -> int:
        """How often an allocation met the bound and something had to go first."""
        if self._v1:
            return int((self.path / "memory.failcnt").read_text(encoding="utf-8"))
        events = (self.path / "memory.events").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in events.splitlines() if line.startswith("max "))
