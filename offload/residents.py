"""Units that are read once and stay: in host memory, or on the device through one staging slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch

from offload.host_link import HostLink, view
from offload.layout import Store
from offload.readers.engine import ReadEngine

Tensors = Mapping[str, torch.Tensor]


def record_numbers(store: Store, units: Sequence[str]) -> list[int]:
    """The records that `units` lie in, each once, in the order of the file."""
    return sorted({store.by_name[unit].record for unit in units})


def read_records(
    store: Store, units: Sequence[str], engine: ReadEngine, timeout_s: float
) -> Mapping[int, torch.Tensor]:
    """The records of `units` by number, in one block of host memory of exactly their size.

    Args:
        engine: has a slot for each record, and its memory outlives it; closed afterwards.

    Raises:
        CorruptWeightsError, WeightStreamError: they cannot be read.
    """
    numbers = record_numbers(store, units)
    sizes = [store.records[number].num_bytes for number in numbers]
    slots = list(torch.split(engine.allocate(sum(sizes)), sizes))
    link = HostLink(store, engine, slots, timeout_s=timeout_s)
    unit_of = {store.by_name[unit].record: unit for unit in units}
    with closing(link):
        for slot, number in enumerate(numbers):
            link.submit(unit_of[number], slot)
        for slot, number in enumerate(numbers):
            link.wait(unit_of[number], slot)
    return dict(zip(numbers, slots, strict=True))


def copy_records(
    store: Store,
    units: Sequence[str],
    engine: ReadEngine,
    device: torch.device,
    timeout_s: float,
) -> Mapping[int, torch.Tensor]:
    """As `read_records`, on `device`; the host holds one record at a time.

    Args:
        engine: has one slot; closed afterwards.
    """
    numbers = record_numbers(store, units)
    sizes = [store.records[number].num_bytes for number in numbers]
    blocks = torch.split(torch.empty(sum(sizes), dtype=torch.uint8, device=device), sizes)
    link = HostLink(store, engine, [engine.allocate(max(sizes))], timeout_s=timeout_s)
    unit_of = {store.by_name[unit].record: unit for unit in units}
    with closing(link):
        for number, block in zip(numbers, blocks, strict=True):
            link.submit(unit_of[number], 0)
            link.wait(unit_of[number], 0)
            block.copy_(link.record(unit_of[number], 0))
    return dict(zip(numbers, blocks, strict=True))


def tensors_of(
    store: Store, units: Sequence[str], records: Mapping[int, torch.Tensor]
) -> dict[str, Tensors]:
    """Each unit's tensors in the records; no copy."""
    found: dict[str, Tensors] = {}
    for name in units:
        unit = store.by_name[name]
        memory = records[unit.record]
        found[name] = {entry.name: view(memory, entry) for entry in unit.tensors}
    return found
