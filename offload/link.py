"""How a unit gets into a slot. A ring knows only this: submit, wait, use, evict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

POISON = 0xFF
"""What evicted slots are filled with to find uses after release: NaN in every floating format."""


@dataclass(slots=True, kw_only=True)
class LinkStats:
    """What a link has done since it was made."""

    num_reads: int = 0
    num_bytes: int = 0
    wait_s: float = 0.0
    """Time that `wait` took: what the computation lost to the link."""
    num_retries: int = 0


class Link(Protocol):
    """Fills slots in the background; one thread calls it."""

    @property
    def stats(self) -> LinkStats:
        """What it has done so far."""
        ...

    def submit(self, unit: str, slot: int) -> None:
        """Start to fill the slot, whatever it held; a fill under way there is waited for first.

        Raises:
            WeightStreamError: it cannot even begin.
        """
        ...

    def wait(self, unit: str, slot: int) -> None:
        """Return when the slot holds the unit, whole.

        Raises:
            WeightStreamError: it cannot be read, or not in time.
            CorruptWeightsError: what was read is not what was packed.
        """
        ...

    def tensors(self, unit: str, slot: int) -> Mapping[str, torch.Tensor]:
        """The unit's tensors in the slot, after `wait` and until `evict`."""
        ...

    def evict(self, slot: int) -> None:
        """The slot's tensors are not used any more."""
        ...

    def close(self) -> None:
        """End what is under way and give the memory back; safe to call twice."""
        ...
