"""Which unit of a store is resident, which streams, and what that takes of the budget. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.base.errors import ConfigError
from cluster.base.plan import OffloadPlan
from offload.homes import staging_slots
from offload.layout import GUARD_STRIDE, Record, Store

_ROUTED = re.compile(r"layer\.\d+\.expert\.\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRoom:
    """The slots of a ring or an expert cache."""

    num_slots: int
    slot_bytes: int
    num_staging: int
    """Host slots that records from disk pass through on their way to a device's; 0: none do."""
    num_sharing: int = 1
    """Ranks of a node that have the slots in common."""

    @property
    def device_bytes(self) -> int:
        """Of the slots themselves, for each rank that shares them."""
        return -(-self.num_slots * self.slot_bytes // self.num_sharing)

    @property
    def staging_bytes(self) -> int:
        """Of the host slots beside them."""
        return self.num_staging * self.slot_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Units of a store by what becomes of them, each in the model's order."""

    resident: tuple[str, ...]
    ring: tuple[str, ...]
    """Streamed pass after pass."""
    experts: tuple[str, ...]
    """Read when a token visits them."""
    host: tuple[str, ...]
    """Those of `ring` and `experts` whose records stay in host memory."""
    host_unit_bytes: int
    ring_room: SlotRoom
    expert_room: SlotRoom
    resident_bytes: int
    largest_resident_bytes: int
    """Of one record: what a device's residents pass through on their way."""
    head_bytes: Mapping[int, int] = field(default_factory=dict)
    """What stays in memory of each record of the ring, as it is stored, by its offset."""

    @property
    def held_bytes(self) -> int:
        """Of all such beginnings."""
        return sum(self.head_bytes.values())


def is_routed(unit: str) -> bool:
    """Whether a unit is a routed expert, which is asked for when a token visits it."""
    return _ROUTED.fullmatch(unit) is not None


def place_units(store: Store, plan: OffloadPlan) -> Placement:
    """Where the plan puts each unit of the store.

    A unit that shares its record with a resident one is resident too. An expert cache has at least
    two slots, so that one expert is read while another computes.

    Raises:
        ConfigError: the plan names units that the model does not have.
    """
    if unknown := _unknown(store, plan):
        raise ConfigError(
            f"The model has no weight units {', '.join(unknown)}.",
            "Plan the model again.",
            param="resident_units",
        )
    kept = {store.by_name[unit].record for unit in plan.resident_units if unit in store.by_name}
    streamed = [unit for unit in store.units if unit.record not in kept]
    ring = tuple(unit.name for unit in streamed if not is_routed(unit.name))
    experts = tuple(unit.name for unit in streamed if is_routed(unit.name))
    on_host = {store.by_name[unit].record for unit in plan.host_units} - kept
    return Placement(
        resident=tuple(unit.name for unit in store.units if unit.record in kept),
        ring=ring,
        experts=experts,
        host=tuple(unit.name for unit in streamed if unit.record in on_host),
        host_unit_bytes=sum(store.records[number].image_bytes for number in sorted(on_host)),
        ring_room=replace(
            _room(store, ring, plan.ring_slots, on_host), num_sharing=plan.num_sharing
        ),
        expert_room=_room(store, experts, max(2, plan.expert_slots), on_host),
        resident_bytes=sum(_held_bytes(store.records[n], plan) for n in sorted(kept)),
        largest_resident_bytes=max(
            (store.records[number].image_bytes for number in kept), default=0
        ),
        head_bytes=head_sizes([store.record_of(unit) for unit in ring], plan.held_bytes),
    )


def _unknown(store: Store, plan: OffloadPlan) -> list[str]:
    """Units that are named and that there are not, here or on a rank that shares the others."""
    named = (*plan.resident_units, *plan.host_units)
    unknown = [unit for unit in named if unit not in store.by_name]
    return [unit for unit in unknown if plan.num_sharing == 1 or not is_routed(unit)]


def _held_bytes(record: Record, plan: OffloadPlan) -> int:
    """A rank's part of the memory of a record that stays: all of it unless it is shared."""
    return -(-record.piece_of // plan.num_sharing) if record.piece_of else record.image_bytes


def _room(store: Store, units: Sequence[str], wanted: int, on_host: Collection[int]) -> SlotRoom:
    num_slots = min(wanted, len(units))
    from_disk = any(store.by_name[unit].record not in on_host for unit in units)
    return SlotRoom(
        num_slots=num_slots,
        slot_bytes=_largest(store, units),
        num_staging=staging_slots(num_slots) if from_disk else 0,
    )


def _largest(store: Store, units: Iterable[str]) -> int:
    return max((store.record_of(unit).used_bytes for unit in units), default=0)


def head_sizes(records: Sequence[Record], held_bytes: int) -> dict[int, int]:
    """Bytes that are held of each record, by its place in the file; together at most `held_bytes`.

    The same share of each, in whole strides of guard words; records that are not compressed have
    none.
    """
    shorter = {record.offset: record.num_bytes for record in records if record.compressed_from}
    total = sum(shorter.values())
    if held_bytes >= total:
        return shorter
    sizes = {
        offset: num_bytes * held_bytes // total // GUARD_STRIDE * GUARD_STRIDE
        for offset, num_bytes in shorter.items()
    }
    return {offset: size for offset, size in sizes.items() if size}
