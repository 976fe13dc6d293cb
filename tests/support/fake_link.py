"""A link on a virtual clock: transfers take bytes / rate, one after another, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from offload.link import LinkStats


@dataclass
class VirtualClock:
    now_s: float = 0.0


@dataclass
class FakeLink:
    """Implements `Link`; asserts what every user of a link has to keep."""

    sizes: Mapping[str, int]
    bytes_per_s: float
    clock: VirtualClock = field(default_factory=VirtualClock)
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        self.stats = LinkStats()
        self._free_at_s = 0.0
        self.held: dict[int, str] = {}
        self._ready_s: dict[int, float] = {}
        self.log: list[tuple[str, str, int]] = []

    def submit(self, unit: str, slot: int) -> None:
        assert slot not in self.held, f"{unit} into slot {slot} over {self.held[slot]}"
        begin_s = max(self.clock.now_s, self._free_at_s)
        self._free_at_s = begin_s + self.sizes[unit] / self.bytes_per_s
        self._ready_s[slot] = self._free_at_s + self.latency_s
        self.held[slot] = unit
        self.stats.num_reads += 1
        self.stats.num_bytes += self.sizes[unit]
        self.log.append(("submit", unit, slot))

    def wait(self, unit: str, slot: int) -> None:
        assert self.held.get(slot) == unit
        waited_s = max(0.0, self._ready_s[slot] - self.clock.now_s)
        self.stats.wait_s += waited_s
        self.clock.now_s += waited_s
        self.log.append(("use", unit, slot))

    def tensors(self, unit: str, slot: int) -> Mapping[str, torch.Tensor]:
        assert self.held[slot] == unit
        return {"where": torch.tensor([slot])}

    def evict(self, slot: int) -> None:
        del self.held[slot]

    def close(self) -> None:
        self.held.clear()
