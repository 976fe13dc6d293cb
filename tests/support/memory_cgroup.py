"""A memory cgroup for one child process, of either version; needs the right to make one."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCgroup:
    """A group with a limit; `close` when nothing runs in it any more."""

    folder: Path
    limit_name: str
    peak_name: str

    @classmethod
    def create(cls, name: str, limit_bytes: int) -> MemoryCgroup:
        """Raises OSError when this is not permitted here."""
        if (_ROOT / "memory").is_dir():
            group = cls(
                folder=_ROOT / "memory" / name,
                limit_name="memory.limit_in_bytes",
                peak_name="memory.max_usage_in_bytes",
            )
        else:
            group = cls(folder=_ROOT / name, limit_name="memory.max", peak_name="memory.peak")
        group.folder.mkdir()
        try:
            (group.folder / group.limit_name).write_text(str(limit_bytes))
        except OSError:
            group.folder.rmdir()
            raise
        return group

    def run(self, command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run a command that is in the group from its first instruction on."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return subprocess.run(
            ["sh", "-c", enter, "sh", *command],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "MALLOC_ARENA_MAX": "2"},
        )

    @property
    def peak_bytes(self) -> int:
        return int((self.folder / self.peak_name).read_text())

    @property
    def times_at_limit(self) -> int:
        """How often the kernel had to reclaim because of the limit."""
        if self.limit_name == "memory.limit_in_bytes":
            return int((self.folder / "memory.failcnt").read_text())
        events = dict(
            line.split() for line in (self.folder / "memory.events").read_text().splitlines()
        )
        return int(events["max"])

    def close(self) -> None:
        self.folder.rmdir()
