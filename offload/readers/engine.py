"""What a reader of packed stores offers, and what it has to promise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cluster.base.errors import WeightStreamError

if TYPE_CHECKING:
    import torch


class ReaderUnavailableError(Exception):
    """Why a reader cannot work here; the caller takes another one."""


class ReadTimeoutError(WeightStreamError):
    """A read has not ended in time; it may still be writing to its buffer."""


class ReadEngine(Protocol):
    """Reads pieces of one file into slots, in the background.

    A slot has at most one read at a time. Offsets and lengths are whole pages. An engine may miss
    an error of the disk (one of them does); who uses it compares guard words.
    """

    name: str

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory that this engine reads into without a copy; uint8, page aligned."""
        ...

    def submit(self, slot: int, buffer: torch.Tensor, offset: int) -> None:
        """Start to fill `buffer` (part of what `allocate` gave) from `offset` of the file.

        Raises:
            WeightStreamError: the file is gone or too short.
        """
        ...

    def wait(self, slot: int, timeout_s: float) -> None:
        """Return when the slot's read has ended.

        Raises:
            ReadTimeoutError: it has not ended in time.
            WeightStreamError: it failed.
        """
        ...

    def close(self) -> None:
        """Wait for the reads under way and stop; safe to call twice."""
        ...
