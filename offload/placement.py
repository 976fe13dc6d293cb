"""Which unit of a store is resident, which streams, and what that takes of the budget. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.base.errors import ConfigError
from cluster.base.plan import OffloadPlan
from offload.layout import Store

_ROUTED = re.compile(r"layer\.\d+\.expert\.\d+")


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
    ring_slots: int
    ring_slot_bytes: int
    expert_slots: int
    expert_slot_bytes: int
    resident_bytes: int

    @property
    def ring_bytes(self) -> int:
        """Of all slots of the ring."""
        return self.ring_slots * self.ring_slot_bytes

    @property
    def expert_bytes(self) -> int:
        """Of all slots of the expert cache."""
        return self.expert_slots * self.expert_slot_bytes


def place_units(store: Store, plan: OffloadPlan) -> Placement:
    """Where the plan puts each unit of the store.

    A unit that shares its record with a resident one is resident too. An expert cache has at least
    two slots, so that one expert is read while another computes.

    Raises:
        ConfigError: the plan names units that the model does not have.
    """
    named = (*plan.resident_units, *plan.host_units)
    if unknown := [unit for unit in named if unit not in store.by_name]:
        raise ConfigError(
            f"The model has no weight units {', '.join(unknown)}.",
            "Plan the model again.",
            param="resident_units",
        )
    kept = {store.by_name[unit].record for unit in plan.resident_units}
    streamed = [unit for unit in store.units if unit.record not in kept]
    ring = tuple(unit.name for unit in streamed if not _ROUTED.fullmatch(unit.name))
    experts = tuple(unit.name for unit in streamed if _ROUTED.fullmatch(unit.name))
    on_host = {store.by_name[unit].record for unit in plan.host_units} - kept
    return Placement(
        resident=tuple(unit.name for unit in store.units if unit.record in kept),
        ring=ring,
        experts=experts,
        host=tuple(unit.name for unit in streamed if unit.record in on_host),
        host_unit_bytes=sum(store.records[number].num_bytes for number in sorted(on_host)),
        ring_slots=min(plan.ring_slots, len(ring)),
        ring_slot_bytes=_largest(store, ring),
        expert_slots=min(max(2, plan.expert_slots), len(experts)),
        expert_slot_bytes=_largest(store, experts),
        resident_bytes=sum(store.records[number].num_bytes for number in sorted(kept)),
    )


def _largest(store: Store, units: Iterable[str]) -> int:
    return max((store.record_of(unit).num_bytes for unit in units), default=0)
