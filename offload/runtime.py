"""What a replica's streaming gets from its machine, and from tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from offload.readers.engine import ReadEngine
from replicas.worker.device_streams import DeviceStreams, TorchStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a plan leaves to the machine, and what tests want to see."""

    cache_dir: Path
    """Where compiled readers and the codec are kept."""
    poison: bool = False
    """Overwrite what was released with NaN."""
    wrap_engine: Callable[[ReadEngine], ReadEngine] = lambda engine: engine
    streams: Callable[[torch.device], DeviceStreams] | None = None
    """What orders a second stage's copies with the computation; None: the device's own, and no
    second stage on a CPU."""

    def streams_of(self, device: torch.device) -> DeviceStreams | None:
        """The queues of a second stage, from host to device slots; None: there is one memory."""
        if self.streams is not None:
            return self.streams(device)
        return None if device.type == "cpu" else TorchStreams(device)
