"""Units that stay and may still be on their way: a mapping whose look-ups wait.

How a record gets into memory is the affair of the subclass (`residents.py` reads it,
`shared_units.py` maps it); that a unit is handed out only when its record is whole, and made once,
is decided here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch

from offload.host_link import view
from offload.layout import Store

Tensors = Mapping[str, torch.Tensor]


class AwaitedUnits(Mapping[str, Tensors], ABC):
    """Tensors of `units`, by name; one thread looks them up."""

    def __init__(self, store: Store, units: Sequence[str]) -> None:
        self._store = store
        self._units = dict.fromkeys(units)
        self._arrived: dict[str, Tensors] = {}

    def __getitem__(self, unit: str) -> Tensors:
        if (tensors := self._arrived.get(unit)) is not None:
            return tensors
        if unit not in self._units:
            raise KeyError(unit)
        number = self._store.by_name[unit].record
        self._arrived |= tensors_of(self._store, [unit], {number: self._await(number, unit)})
        return self._arrived[unit]

    def __contains__(self, unit: object) -> bool:
        return unit in self._units

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    @abstractmethod
    def close(self) -> None:
        """Stop reading; safe to call twice."""

    @abstractmethod
    def _await(self, number: int, unit: str) -> torch.Tensor:
        """Bytes of record `number`, in which `unit` lies, once all of it is there and checked."""


def record_order(store: Store, units: Sequence[str]) -> list[int]:
    """The records that `units` lie in, each once, in the order in which they are needed."""
    return list(dict.fromkeys(store.by_name[unit].record for unit in units))


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
