"""What a rank takes of its budgets before anything of it is allocated. Arithmetic only."""

from __future__ import annotations

from cluster.base.plan import OffloadPlan
from offload.budget import Budget
from offload.homes import KvHome
from offload.placement import Placement
from replicas.worker.assembly import WeightsRequest


def reserve_all(
    plan: OffloadPlan, placement: Placement, request: WeightsRequest, *, has_stages: bool
) -> None:
    """Take everything from the budgets of device and host.

    Args:
        has_stages: weights pass through host memory on their way to a device.

    Raises:
        BudgetError: one of them cannot hold it; the error shows the sum.
    """
    device = Budget("device_memory", plan.device_bytes)
    host = Budget("host_memory", plan.host_bytes)
    match KvHome(plan.kv_home):
        case KvHome.DEVICE:
            device.reserve("key/value cache", request.kv_bytes)
        case KvHome.HOST:
            host.reserve("key/value cache", request.kv_bytes)
        case KvHome.STREAMED:
            host.reserve("key/value cache", request.kv_bytes)
            layer_blocks = request.spec.num_blocks * request.model.arch.num_layers
            window_bytes = request.kv_bytes // layer_blocks * plan.kv_window_blocks
            device.reserve(f"{plan.kv_windows} cache windows", plan.kv_windows * window_bytes)
    reserve(device, placement, plan)
    if has_stages:
        reserve_host(host, placement)


def reserve(budget: Budget, placement: Placement, plan: OffloadPlan) -> None:
    """Take weights, slots and workspace of a rank from its device's budget.

    Raises:
        BudgetError: it does not fit; the error shows the sum.
    """
    budget.reserve("workspace", plan.workspace_bytes)
    ring, experts = placement.ring_room, placement.expert_room
    budget.reserve(f"ring of {ring.num_slots} slots", ring.device_bytes)
    if placement.held_bytes:
        budget.reserve("beginnings of compressed records", placement.held_bytes)
    if placement.experts:
        budget.reserve(f"{experts.num_slots} expert slots", experts.device_bytes)
    budget.reserve("resident weights", placement.resident_bytes)


def reserve_host(budget: Budget, placement: Placement) -> None:
    """Take what stands beside a device from the host's budget: host units and staging slots.

    Resident units are loaded before, through room for one record at a time.

    Raises:
        BudgetError: it does not fit; the error shows the sum.
    """
    budget.reserve("weights in host memory", placement.host_unit_bytes)
    for kind, room in (("layers", placement.ring_room), ("experts", placement.expert_room)):
        if room.num_staging:
            budget.reserve(f"{room.num_staging} staging slots for {kind}", room.staging_bytes)
    if (more := placement.largest_resident_bytes - budget.reserved_bytes) > 0:
        budget.reserve("loading resident weights", more)
