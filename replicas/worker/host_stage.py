"""Rows between a device and the exchanges of host memory, through pinned memory.

Copies have a queue of their own, so those to the device run beside what it computes; events put
them in order with it. Each direction owns one block of pinned memory that all tensors of a call
share and that grows with the largest, a quarter more than was asked for: torch's own pinned blocks
are powers of two, and kept by size.

    computing   ... routed |             shared experts ... | experts, from here on
                           v event                          ^ event
    copying                | rows to the host |  | arrived rows |
    host                        waits here ---'  '- goes on
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from moe.exchange.staged import StagedExperts
from moe.layout import ExpertLayout
from replicas.models.memory import PINNED_SPARE
from replicas.worker.device import pin_host_memory
from replicas.worker.device_streams import DeviceStreams, Event, TorchStreams

Unpin = Callable[[], object]
Pin = Callable[[torch.Tensor], Unpin]
"""Pins host memory; what undoes it."""
_ALIGN = 64


def seen_from(device: torch.device, experts: ExpertLayout) -> ExpertLayout:
    """A layout whose exchanges move host memory, as a model on `device` takes it."""
    if device.type == "cpu":
        return experts
    stage = HostStage(TorchStreams(device), lambda memory: pin_host_memory(memory, device))
    return StagedExperts(experts, stage)


class HostStage:
    """Implements `moe.exchange.staged.Stage`; for the thread that computes.

    Args:
        streams: of the device.
        pin: lets the device copy from host memory in the background.
    """

    def __init__(self, streams: DeviceStreams, pin: Pin) -> None:
        self._streams = streams
        self._copying = streams.new_queue()
        self._down, self._up = _PinnedBlock(pin), _PinnedBlock(pin)
        self._sent: Event | None = None

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Stage.to_host`."""
        whole = [tensor.contiguous() for tensor in tensors]
        views = self._down.views(whole)
        if not any(tensor.numel() for tensor in whole):
            return views
        self._copying.wait(self._streams.computing().record())
        for view, tensor in zip(views, whole, strict=True):
            self._copying.copy(view, tensor)
        self._copying.record().synchronize()
        return views

    def to_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Stage.to_device`."""
        if self._sent is not None:
            # The block may be overwritten, or given back, once the last copies from it have ended.
            self._sent.synchronize()
        views = self._up.views(tensors)
        computing, made = self._streams.computing(), []
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor)
            target = self._copying.new(view, computing)
            self._copying.copy(target, view)
            made.append(target)
        self._sent = self._copying.record()
        computing.wait(self._sent)
        return made


class _PinnedBlock:
    """Pinned memory that is as large as the largest call needed."""

    def __init__(self, pin: Pin) -> None:
        self._pin = pin
        self._block = torch.empty(0, dtype=torch.uint8)
        self._unpin: Unpin | None = None

    def views(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Room for each of the tensors, of its shape and dtype; no copy uses what was there."""
        sizes = [tensor.numel() * tensor.itemsize for tensor in tensors]
        places = [-(-size // _ALIGN) * _ALIGN for size in sizes]
        if sum(places) > self._block.numel():
            self._grow(math.ceil(PINNED_SPARE * sum(places)))
        firsts = itertools.accumulate(places[:-1], initial=0)
        return [
            self._block[first : first + size].view(tensor.dtype).view(tensor.shape)
            for first, size, tensor in zip(firsts, sizes, tensors, strict=True)
        ]

    def _grow(self, num_bytes: int) -> None:
        if self._unpin is not None:
            self._unpin()
        with torch.inference_mode(False):  # idle ranks write outside of it
            self._block = torch.empty(num_bytes, dtype=torch.uint8)
        self._unpin = self._pin(self._block)
