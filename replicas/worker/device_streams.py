"""What ordering copies and computation on a device takes: two queues of work, and events between.

A queue does its work in order and beside the other queue; whoever enqueues goes on at once. With
CUDA these are streams. Stated as a protocol so that the order can be proved without a device.
"""

from __future__ import annotations

from typing import Protocol

import torch

from cluster.base.errors import InternalError


class Event(Protocol):
    """A point in a queue; it has passed when all work before it is done."""

    def synchronize(self) -> None:
        """Let the calling thread wait until it has passed."""
        ...


class WorkQueue(Protocol):
    """Work of a device that is done in the order in which it was given."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between host memory and the device, either way.

        The source stays as it is until that is done, and nobody looks at the target before.
        """
        ...

    def fill(self, target: torch.Tensor, value: int) -> None:
        """Overwrite memory of the device."""
        ...

    def new(self, like: torch.Tensor, user: WorkQueue) -> torch.Tensor:
        """Memory of the device, of a tensor's shape and dtype, that this queue may write at once.

        Args:
            user: another queue that works with it, until it is let go.
        """
        ...

    def wait(self, event: Event) -> None:
        """What is given from now on begins after the event."""
        ...

    def record(self) -> Event:
        """An event after everything that was given so far."""
        ...


class DeviceStreams(Protocol):
    """The queues of a device."""

    def new_queue(self) -> WorkQueue:
        """One more, beside the others."""
        ...

    def computing(self) -> WorkQueue:
        """The one that the calling thread computes on."""
        ...


class TorchQueue:
    """Implements `WorkQueue` by a stream."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `WorkQueue.copy`; in the background where the host's memory is pinned."""
        with self._stream:
            target.copy_(source, non_blocking=True)

    def fill(self, target: torch.Tensor, value: int) -> None:
        """See `WorkQueue.fill`."""
        with self._stream:
            target.fill_(value)

    def new(self, like: torch.Tensor, user: WorkQueue) -> torch.Tensor:
        """See `WorkQueue.new`."""
        if not isinstance(user, TorchQueue):
            raise InternalError(f"{user} is none of this device.")
        # Taken from this stream's memory: else it might still be in use by what `user` was given.
        with self._stream:
            made = torch.empty(like.shape, dtype=like.dtype, device=self._stream.device)
        made.record_stream(user._stream)
        return made

    def wait(self, event: Event) -> None:
        """See `WorkQueue.wait`."""
        if not isinstance(event, torch.Event):
            raise InternalError(f"{event} is none of this device.")
        self._stream.wait_event(event)

    def record(self) -> Event:
        """See `WorkQueue.record`."""
        # Whoever waits for it sleeps: a spinning thread takes a core from the computation's.
        event = torch.Event(device=self._stream.device, blocking=True)
        event.record(self._stream)
        return event


class TorchStreams:
    """Implements `DeviceStreams` for an accelerator that torch knows."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_queue(self) -> WorkQueue:
        """See `DeviceStreams.new_queue`."""
        return TorchQueue(torch.Stream(device=self._device))

    def computing(self) -> WorkQueue:
        """See `DeviceStreams.computing`."""
        return TorchQueue(torch.accelerator.current_stream(self._device))
