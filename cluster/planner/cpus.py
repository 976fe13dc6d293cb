"""Logical CPUs that Ray reserves: ranks, leaders and gateways of a node must fit its cores.

A reservation is bookkeeping, not a limit: ranks still run as many threads as they were told. So
an automatic share may be a fraction, and a laptop with two cores can hold four ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.base.errors import ConfigError
from cluster.planner.decisions import Decision, floor_cpus, front_cpus
from cluster.planner.packing import NodeLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuDemand:
    """What one model asks for its ranks."""

    param: str
    wanted: float | str
    """CPUs per rank, or "auto"."""
    num_threads: int
    ranks: tuple[int, ...]
    """Ranks on each node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """A model's share of cores."""

    threads: Decision[int]
    cpus: Decision[float]
    leader_cpus: float


def front_share(loads: Sequence[NodeLoad]) -> float:
    """Logical CPUs of every gateway and leader: one figure that suits all nodes."""
    return min(front_cpus(load.cores, load.num_gateways + load.num_leaders) for load in loads)


def share_cpus(demands: Sequence[CpuDemand], loads: Sequence[NodeLoad]) -> list[Decision[float]]:
    """CPUs per rank of every model.

    Raises:
        ConfigError: what was asked for by number does not fit a node.
    """
    front = front_share(loads)
    shares = [_auto_share(demands, loads, node, front) for node in range(len(loads))]
    decisions = []
    for demand in demands:
        if not isinstance(demand.wanted, str):
            decisions.append(Decision(value=demand.wanted))
            continue
        share = min(shares[node] for node, ranks in enumerate(demand.ranks) if ranks)
        if share >= demand.num_threads:
            decision = Decision(value=float(demand.num_threads), reason="one CPU per thread")
        else:
            decision = Decision(
                value=share, reason="an equal share of what the node's cores leave to ranks"
            )
        decisions.append(decision)
    return decisions


def _auto_share(
    demands: Sequence[CpuDemand], loads: Sequence[NodeLoad], node: int, front: float
) -> float:
    """What one rank on `node` gets that left the choice to us."""
    load = loads[node]
    num_front = load.num_gateways + load.num_leaders
    left = load.cores - front * num_front
    num_auto = 0
    for demand in demands:
        if isinstance(demand.wanted, str):
            num_auto += demand.ranks[node]
            continue
        used = demand.wanted * demand.ranks[node]
        if used > left + 1e-9:
            most = floor_cpus(left / demand.ranks[node])
            raise ConfigError(
                f"{demand.ranks[node]} ranks x {demand.wanted:g} CPUs = {used:g}, but "
                f"{left:g} of {load.host}'s {load.cores} are left beside gateways, leaders and "
                "other models.",
                f"Lower it to {most:g}, or leave it to auto.",
                param=demand.param,
            )
        left -= used
    share = floor_cpus(left / num_auto) if num_auto else 0.0
    if num_auto and share <= 0:
        fixed = next(d for d in demands if not isinstance(d.wanted, str) and d.ranks[node])
        raise ConfigError(
            f"Nothing of {load.host}'s {load.cores} CPUs is left for the other models' ranks.",
            "Lower it, or leave it to auto.",
            param=fixed.param,
        )
    return share
