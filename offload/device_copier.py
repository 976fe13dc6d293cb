"""Copies into slots of a device, beside the computation and in order with it.

    copying    copy 0 | copy 1 | copy 2 |          copy 0 |
                      v        v        v          ^
    computing         | use 0  | use 1  | use 2    |
                              `- left 0 -----------'

A slot is used after its copy and copied into after its last use; both are events between queues,
so the thread that computes never waits for the device. Only who wants to overwrite the *source* of
a copy waits, in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from offload.link import POISON
from replicas.worker.device_streams import DeviceStreams, Event

Ended = Callable[[], None]
"""Returns when a copy has ended: its source may be overwritten."""


class DeviceCopier:
    """Copies to the slots of a device.

    `copy` from any thread, the others from the one that computes.

    Args:
        num_slots: of the device.
        poison: overwrite slots that were left with NaN, so that a use after release shows.
    """

    def __init__(self, streams: DeviceStreams, num_slots: int, *, poison: bool = False) -> None:
        self._streams = streams
        self._poison = poison
        self._copying = streams.new_queue()
        self._copied: list[Event | None] = [None] * num_slots
        self._left: list[Event | None] = [None] * num_slots

    def copy(self, slot: int, target: torch.Tensor, source: torch.Tensor) -> Ended:
        """Start a copy into the slot, after what was computed from it has ended."""
        left = self._left[slot]
        if left is not None:
            self._copying.wait(left)
        self._copying.copy(target, source)
        copied = self._copying.record()
        self._copied[slot] = copied
        return copied.synchronize

    def before_use(self, slot: int) -> None:
        """What is computed from now on comes after the slot's copy."""
        copied = self._copied[slot]
        if copied is not None:
            self._streams.computing().wait(copied)

    def after_use(self, slot: int, memory: torch.Tensor) -> None:
        """What was computed until now is all that needs the slot, which is `memory`."""
        computing = self._streams.computing()
        if self._poison:
            computing.fill(memory, POISON)
        self._left[slot] = computing.record()
