"""Experts that the host computes where they lie, in place of copying them to the device.

What a layer misses is divided between link and cores by `offload/expert_division.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from cluster.base.plan import HostExpertsPlan
from moe.experts import DOWN, UP
from offload.expert_division import ExpertWork, divide, row_bytes
from offload.host_link import view
from offload.layout import Store


class HostExperts:
    """The routed experts whose records lie in host memory.

    Args:
        records: of those units, whole.
        costs: what link and host were measured to do.
    """

    def __init__(
        self, store: Store, records: Mapping[str, torch.Tensor], costs: HostExpertsPlan
    ) -> None:
        self._costs = costs
        self._tensors: dict[str, Mapping[str, torch.Tensor]] = {}
        self._works: dict[str, ExpertWork] = {}
        for unit, memory in records.items():
            entries = {entry.name: entry for entry in store.by_name[unit].tensors}
            self._tensors[unit] = {name: view(memory, entry) for name, entry in entries.items()}
            up, down = entries[UP], entries[DOWN]
            self._works[unit] = ExpertWork(
                unit=unit,
                num_bytes=memory.numel(),
                num_weights=math.prod(up.shape) + math.prod(down.shape),
                row_bytes=row_bytes(up.shape[1], getattr(torch, up.dtype).itemsize),
            )

    def __contains__(self, unit: str) -> bool:
        return unit in self._works

    def tensors(self, unit: str) -> Mapping[str, torch.Tensor]:
        """The expert's tensors in host memory; they stay."""
        return self._tensors[unit]

    def chosen(self, rows: Mapping[str, int]) -> list[str]:
        """Which of these experts, each with its rows, the host computes."""
        here = {unit: count for unit, count in rows.items() if unit in self._works}
        return divide([replace(self._works[unit], rows=here[unit]) for unit in here], self._costs)
