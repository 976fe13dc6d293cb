"""Units that are read once and stay: in host memory, or on the device through one staging slot.

On a CPU rank they arrive while others are already in use: serving begins at once, and the first
pass waits for each unit only when it comes to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch

from offload.awaited_units import AwaitedUnits, record_order
from offload.compression import RecordCodec
from offload.host_link import HostLink
from offload.host_memory import block_on_demand
from offload.layout import Store
from offload.readers.engine import ReadEngine
from offload.record_check import RecordCheck


def record_numbers(store: Store, units: Sequence[str]) -> list[int]:
    """The records that `units` lie in, each once, in the order of the file."""
    return sorted({store.by_name[unit].record for unit in units})


class ArrivingUnits(AwaitedUnits):
    """Tensors of units that are being read into host memory, all at once and in their order.

    Looking one up waits for it; one thread does. Memory is of exactly the images' size.

    Args:
        engine: fills any page-aligned memory, tells of failed reads and has a slot for each record;
            closed when all are here.

    Raises:
        OSError: there is no memory.
        WeightStreamError: the file is gone or too short. Looking up: it cannot be read.
        CorruptWeightsError: looking up, what was read is not what was packed.
    """

    def __init__(
        self,
        store: Store,
        units: Sequence[str],
        engine: ReadEngine,
        timeout_s: float,
        codec: RecordCodec | None = None,
    ) -> None:
        super().__init__(store, units)
        numbers = record_order(store, units)
        sizes = [store.records[number].image_bytes for number in numbers]
        slots = torch.split(block_on_demand(sum(sizes)), sizes)
        self._slot_of = {number: slot for slot, number in enumerate(numbers)}
        self._memory = dict(zip(numbers, slots, strict=True))
        self._missing = set(numbers)
        check = RecordCheck(store, leaves_untouched=True)
        self._link = HostLink(store, engine, slots, check=check, codec=codec, timeout_s=timeout_s)
        unit_of = {store.by_name[unit].record: unit for unit in reversed(units)}
        for number, slot in self._slot_of.items():
            self._link.submit(unit_of[number], slot)

    def close(self) -> None:
        """Stop reading; safe to call twice."""
        self._link.close()

    def _await(self, number: int, unit: str) -> torch.Tensor:
        self._link.wait(unit, self._slot_of[number])
        self._missing.discard(number)
        if not self._missing:
            self._link.close()
        return self._memory[number]


def read_records(
    store: Store,
    units: Sequence[str],
    engine: ReadEngine,
    timeout_s: float,
    codec: RecordCodec | None = None,
) -> Mapping[int, torch.Tensor]:
    """The images of `units`' records by number, in one block of host memory of exactly their size.

    Args:
        engine: has a slot for each record, and its memory outlives it; closed afterwards.

    Raises:
        CorruptWeightsError, WeightStreamError: they cannot be read.
    """
    numbers = record_numbers(store, units)
    sizes = [store.records[number].image_bytes for number in numbers]
    slots = list(torch.split(engine.allocate(sum(sizes)), sizes))
    link = HostLink(store, engine, slots, codec=codec, timeout_s=timeout_s)
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
    codec: RecordCodec | None = None,
) -> Mapping[int, torch.Tensor]:
    """As `read_records`, on `device`; the host holds one record at a time.

    Args:
        engine: has one slot; closed afterwards.
    """
    numbers = record_numbers(store, units)
    sizes = [store.records[number].image_bytes for number in numbers]
    blocks = torch.split(torch.empty(sum(sizes), dtype=torch.uint8, device=device), sizes)
    link = HostLink(store, engine, [engine.allocate(max(sizes))], codec=codec, timeout_s=timeout_s)
    unit_of = {store.by_name[unit].record: unit for unit in units}
    with closing(link):
        for number, block in zip(numbers, blocks, strict=True):
            link.submit(unit_of[number], 0)
            link.wait(unit_of[number], 0)
            block.copy_(link.record(unit_of[number], 0))
    return dict(zip(numbers, blocks, strict=True))
