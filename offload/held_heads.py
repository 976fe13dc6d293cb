"""Beginnings of compressed records that stay in memory as they are stored.

What memory is left beside ring and cache holds a part of every streamed record: so many bytes less
are read in each pass, the same of each layer, and the codec starts with them while the rest is on
its way. Held as stored they are two thirds of the weights that they stand for. They are kept when a
record has been read whole for the first time and checked, so they cost no read of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError
from offload.host_memory import block_on_demand, make_pages
from offload.layout import Record


class HeldHeads:
    """The memory of such beginnings; each record belongs to one thread at a time.

    Args:
        sizes: bytes of each, by the place of its record in the file (`placement.head_sizes`).

    Raises:
        OSError: there is no memory.
    """

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self._block = block_on_demand(sum(sizes.values()))
        self._memory = dict(zip(sizes, torch.split(self._block, list(sizes.values())), strict=True))
        self._kept: set[int] = set()
        self._pages: threading.Thread | None = None

    def of(self, record: Record) -> torch.Tensor | None:
        """The record's first bytes (uint8); None where none are held, or not yet."""
        return self._memory[record.offset] if record.offset in self._kept else None

    def keep(self, record: Record, stored: torch.Tensor) -> None:
        """Take the beginning of a record that was read whole and checked.

        The first time all pages begin to be made, beside the reads: a virtual machine's host takes
        longer to give them than the disk to fill them.
        """
        if self._pages is None:  # not before: the ring's own pages come first
            self._pages = threading.Thread(
                target=make_pages, args=(self._block,), name="held-pages", daemon=True
            )
            self._pages.start()
        if (memory := self._memory.get(record.offset)) is not None:
            memory.copy_(stored[: memory.numel()])
            self._kept.add(record.offset)

    def forget(self, record: Record) -> None:
        """What is held of the record may be damaged; it is kept anew at the next read."""
        self._kept.discard(record.offset)


def open_heads(sizes: Mapping[int, int]) -> HeldHeads | None:
    """Memory for the beginnings that a placement holds; None: it holds none.

    Raises:
        ConfigError: there is no memory for them.
    """
    if not sizes:
        return None
    try:
        return HeldHeads(sizes)
    except OSError as error:
        raise ConfigError(
            f"{size_text(sum(sizes.values()))} of memory for weights cannot be had: {error}.",
            "Lower device_memory.",
            param="device_memory",
        ) from error
