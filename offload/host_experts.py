"""Experts that the host computes where they lie, in place of copying them to the device.

An expert that few rows visit is read once either way: over the link to the device, or by the host's
cores out of its own memory, which is closer; then only the rows travel (Kamahori et al., Fiddler,
arXiv 2402.07033). Link and cores work side by side, so the experts of a layer that are in no slot
are divided between them such that the later of the two is done as early as possible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from cluster.base.plan import HostExpertsPlan
from moe.experts import DOWN, UP
from offload.host_link import view
from offload.layout import Store

_WIDE_BYTES = 4
"""An expert's output is fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWork:
    """One expert of a layer, and the rows that visit it."""

    unit: str
    num_bytes: int
    """Of its record."""
    num_weights: int
    """That are multiplied with every row."""
    row_bytes: int
    """That travel for one row, to the host and back."""
    rows: int = 0


def fetch_s(work: ExpertWork, costs: HostExpertsPlan) -> float:
    """Seconds until the device has the expert."""
    return work.num_bytes / costs.link_bytes_per_s


def compute_s(work: ExpertWork, costs: HostExpertsPlan) -> float:
    """Seconds until the device has what the host made of the expert's rows."""
    multiply = 2 * work.num_weights * work.rows / costs.host_flops_per_s
    read = work.num_bytes / costs.host_bytes_per_s
    return multiply + read + work.rows * work.row_bytes / costs.link_bytes_per_s + costs.call_s


def divide(works: list[ExpertWork], costs: HostExpertsPlan) -> list[str]:
    """The units for the host to compute; the others are fetched meanwhile.

    Of experts of equal size those with fewest rows, as many as end soonest: exact, as all fetches
    take the same and only the sums count.
    """
    order = sorted(works, key=lambda work: compute_s(work, costs))
    fetching_s, computing_s = sum(fetch_s(work, costs) for work in order), 0.0
    best, best_s = 0, fetching_s
    for count, work in enumerate(order, start=1):
        computing_s += compute_s(work, costs)
        fetching_s -= fetch_s(work, costs)
        if max(computing_s, fetching_s) < best_s:
            best, best_s = count, max(computing_s, fetching_s)
    return [work.unit for work in order[:best]]


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
                row_bytes=up.shape[1] * (getattr(torch, up.dtype).itemsize + _WIDE_BYTES),
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
