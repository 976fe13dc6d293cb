"""Copies on a stream of their own, ordered with the computation by events; for accelerators."""

from __future__ import annotations

import torch


class DeviceCopier:
    """Implements `offload.device_link.Copier` on an accelerator.

    The computing thread only enqueues: `before_use` and `after_use` order streams, not the host.
    """

    def __init__(self, device: torch.device, num_slots: int) -> None:
        self._device = device
        self._stream = torch.Stream(device=device)
        self._copied = [torch.Event(device=device) for _ in range(num_slots)]
        self._left = [torch.Event(device=device) for _ in range(num_slots)]

    def copy(self, slot: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Copier.copy`."""
        with self._stream:
            self._stream.wait_event(self._left[slot])
            target.copy_(source, non_blocking=True)
            self._copied[slot].record(self._stream)

    def wait_copied(self, slot: int) -> None:
        """See `Copier.wait_copied`; an event that was never recorded is over."""
        self._copied[slot].synchronize()

    def before_use(self, slot: int) -> None:
        """See `Copier.before_use`."""
        torch.accelerator.current_stream(self._device).wait_event(self._copied[slot])

    def after_use(self, slot: int) -> None:
        """See `Copier.after_use`."""
        self._left[slot].record(torch.accelerator.current_stream(self._device))
