"""Units that are read once and stay: in host memory, or on the device through one staging slot.

On a CPU rank they arrive while others are already in use: serving begins at once, and the first
pass waits for each unit only when it comes to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import torch

from offload.host_link import HostLink, view
from offload.host_memory import block_on_demand
from offload.layout import Store
from offload.readers.engine import ReadEngine
from offload.record_check import RecordCheck

Tensors = Mapping[str, torch.Tensor]


def record_numbers(store: Store, units: Sequence[str]) -> list[int]:
    """The records that `units` lie in, each once, in the order of the file."""
    return sorted({store.by_name[unit].record for unit in units})


class ArrivingUnits(Mapping[str, Tensors]):
    """Tensors of units that are being read into host memory, all at once and in their order.

    Looking one up waits for it; one thread does. Memory is of exactly the records' size.

    Args:
        engine: fills any page-aligned memory, tells of failed reads and has a slot for each record;
            closed when all are here.

    Raises:
        OSError: there is no memory.
        WeightStreamError: the file is gone or too short. Looking up: it cannot be read.
        CorruptWeightsError: looking up, what was read is not what was packed.
    """

    def __init__(
        self, store: Store, units: Sequence[str], engine: ReadEngine, timeout_s: float
    ) -> None:
        self._store = store
        self._units = tuple(units)
        numbers = list(dict.fromkeys(store.by_name[unit].record for unit in units))
        sizes = [store.records[number].num_bytes for number in numbers]
        slots = torch.split(block_on_demand(sum(sizes)), sizes)
        self._slot_of = {number: slot for slot, number in enumerate(numbers)}
        self._memory = dict(zip(numbers, slots, strict=True))
        self._arrived: dict[str, Tensors] = {}
        self._missing = set(numbers)
        check = RecordCheck(store, leaves_untouched=True)
        self._link = HostLink(store, engine, slots, check=check, timeout_s=timeout_s)
        unit_of = {store.by_name[unit].record: unit for unit in reversed(self._units)}
        for number, slot in self._slot_of.items():
            self._link.submit(unit_of[number], slot)

    def __getitem__(self, unit: str) -> Tensors:
        if (tensors := self._arrived.get(unit)) is not None:
            return tensors
        if unit not in self._units:
            raise KeyError(unit)
        number = self._store.by_name[unit].record
        self._link.wait(unit, self._slot_of[number])
        self._arrived |= tensors_of(self._store, [unit], self._memory)
        self._missing.discard(number)
        if not self._missing:
            self._link.close()
        return self._arrived[unit]

    def __contains__(self, unit: object) -> bool:
        return unit in self._arrived or unit in self._units

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    def close(self) -> None:
        """Stop reading; safe to call twice."""
        self._link.close()


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
