"""How the ranks of an expert-parallel replica meet, the first time or anew: who, where, as what.

A gathering has an epoch of its own, under which all groups of its members are made; what is late
of an earlier one finds nobody. Ranks keep their number in the replica for good; within a gathering
they are members 0, 1, 2 ... in the order given, node by node, and that is what exchanges and
placements of experts count by.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.expert_table import ExpertTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """What one member is told; only its tensor-parallel group's place differs between members."""

    epoch: str
    members: tuple[int, ...]
    """Ranks: whole tensor-parallel groups."""
    nodes: tuple[str, ...]
    """Node of each member; those of one node stand together."""
    peers_host: str
    """Address of the first member."""
    peers_port: int
    tensor_host: str
    """Address of the first rank of this member's tensor-parallel group."""
    tensor_port: int
    tables: tuple[ExpertTable, ...] = ()
    """Where the experts are, by member; none: as every replica begins."""
    table: int = 0
    """Version of that placement."""
    forgets_rows: bool = False
    """Steps were interrupted: the leader announces all requests anew."""
    costs: bytes = b""
    """`LinkCosts` as ranks of the replica measured them, see `to_bytes`; empty: nobody did."""
    probes: bool = False
    """The members measure them anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What a member answers once its groups stand."""

    rank: int
    epoch: str
    schemes: list[tuple[int, str, str]]
    """The exchange for every size of step, by what this rank knows of the links; empty: nothing."""
    num_fetched: int = 0
    """Experts read from the checkpoint for it."""
    costs: bytes = b""
    """Those that the schemes go by."""
