"""Host arrays on their way to the device, without making the host wait."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def on_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`; on the CPU it shares the array's memory.

    An accelerator gets it through pinned memory: a copy from plain memory waits until the device
    has caught up with everything it was given. torch hands a pinned block out again only when the
    copies from it have ended, so nobody has to keep it.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    if device.type == "cuda" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
