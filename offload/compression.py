"""How the bytes of a record lie on disk, whatever they mean. Torch-free: planning reads it.

Lossless: what comes out of a read is bit for bit what was packed. Half of a bf16 weight, its sign
and mantissa, is noise; its exponent is mostly one of a few (`offload/lossless/block.h`).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

DTYPE = "bfloat16"
"""The dtype whose records get smaller: others have few exponent bits or noise in other places."""


class Compression(enum.StrEnum):
    """Of the records of a store."""

    NONE = "none"
    LOSSLESS = "lossless"


class RecordCodec(Protocol):
    """Makes records smaller, and whole again in the memory that they are used in."""

    name: str
    """Changes with the bytes that `encode` makes."""

    def encode(self, image: torch.Tensor) -> torch.Tensor | None:
        """A shorter record for `image` (uint8, whole pages); None when there is none."""
        ...

    def begin(self, memory: torch.Tensor, record_bytes: int, head: torch.Tensor) -> None:
        """Make of the image what the record's beginning alone tells, while the rest may still be
        arriving at the end of `memory`.

        Args:
            head: the first bytes of the record, wherever they lie.

        Raises:
            CorruptWeightsError: as `decode`.
        """
        ...

    def decode(
        self, memory: torch.Tensor, record_bytes: int, head: torch.Tensor | None = None
    ) -> None:
        """Make the image of the record that lies at the end of `memory` (uint8); fills all of it.

        Args:
            head: its first bytes, if they lie elsewhere; `begin` has then made what they tell.

        Raises:
            CorruptWeightsError: the record is damaged; `memory` then holds neither.
        """
        ...
