"""The weights that data-parallel ranks of a node hold together: those that stay, and a ring.

    memory of the node   | slot 0 | slot 1 | slot 2 | record that stays | record that stays | ...

Both are filled piece by piece by all ranks (`offload/gathered_link.py`); what stays is in slots
that nothing is ever loaded into again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from cluster.base.errors import ConfigError
from cluster.base.plan import OffloadPlan
from offload.awaited_units import AwaitedUnits, Tensors, record_order
from offload.gathered_link import GatheredLink
from offload.layout import Store
from offload.lockstep_ring import LockstepRing
from offload.opening import Opening
from offload.pieces import Piece
from offload.placement import Placement
from offload.schedule import build_schedule
from replicas.worker.assembly import WeightSharers, WeightsRequest

_SLOTS_TO_RUN_AHEAD = 3
"""With so many slots one of them is left to the slowest rank, so that nobody waits for it as soon
as a unit has been computed with."""


class GatheredUnits(AwaitedUnits):
    """Units that stay in memory which several ranks fill; looking one up waits for all of them.

    Args:
        slots: slot of each record that the units lie in.
    """

    def __init__(
        self, store: Store, units: Sequence[str], link: GatheredLink, slots: Mapping[int, int]
    ) -> None:
        super().__init__(store, units)
        self._link = link
        self._slots = slots
        self._unit_of = {store.by_name[unit].record: unit for unit in reversed(units)}
        for number, slot in slots.items():
            link.submit(self._unit_of[number], slot)

    def close(self) -> None:
        """Nothing: the link is closed by who opened it."""

    def _await(self, number: int, unit: str) -> torch.Tensor:
        self._link.gather(self._unit_of[number], self._slots[number])
        return self._link.memory(self._slots[number])


class Residents(Mapping[str, Tensors]):
    """What several ranks hold together, and what is one rank's alone."""

    def __init__(self, shared: Mapping[str, Tensors], own: Mapping[str, Tensors]) -> None:
        self._shared = shared
        self._own = own

    def __getitem__(self, unit: str) -> Tensors:
        return self._shared[unit] if unit in self._shared else self._own[unit]

    def __contains__(self, unit: object) -> bool:
        return unit in self._shared or unit in self._own

    def __iter__(self) -> Iterator[str]:
        yield from self._shared
        yield from self._own

    def __len__(self) -> int:
        return len(self._shared) + len(self._own)


def piece_of(plan: OffloadPlan, request: WeightsRequest) -> Piece | None:
    """Which piece of the records that it has in common with others a rank reads.

    Raises:
        ConfigError: there are not as many others on its node as the plan says.
    """
    if plan.num_sharing == 1:
        return None
    sharers = request.sharers
    if sharers is None or sharers.count != plan.num_sharing:
        raise ConfigError(
            f"The plan has {plan.num_sharing} ranks of a node read the weights together, and there "
            f"are {1 if sharers is None else sharers.count}.",
            "Plan the model again.",
            param="parallel.dp",
        )
    return Piece(sharers.index, sharers.count)


def open_gathered(
    opening: Opening, store: Store, placement: Placement, plan: OffloadPlan, sharers: WeightSharers
) -> tuple[GatheredUnits, LockstepRing | None]:
    """The units that stay and the ring, in memory that the ranks share; both begin to be read.

    Raises:
        As `join_node_segment`.
    """
    stay = [unit for unit in placement.resident if store.record_of(unit).piece_of]
    records, room = record_order(store, stay), placement.ring_room
    sizes = [room.slot_bytes] * room.num_slots
    link = opening.gathered([*sizes, *(store.records[n].used_bytes for n in records)], sharers)
    slots = {number: room.num_slots + index for index, number in enumerate(records)}
    units = GatheredUnits(store, stay, link, slots)
    if not placement.ring:
        return units, None
    depth = min(plan.prefetch_depth, room.num_slots)
    if room.num_slots >= _SLOTS_TO_RUN_AHEAD:
        depth = min(depth, room.num_slots - 1)
    schedule = build_schedule(placement.ring, room.num_slots, depth, gathers=True)
    return units, LockstepRing(schedule, link)
