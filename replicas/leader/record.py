"""What a leader tells the cluster about itself: membership, start-up progress, load.

A record is JSON-ready (`to_json`/`from_json` of `cluster.base.plan` apply), so that it crosses Ray
without our classes and the status page shows exactly what the router routes by.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class ReplicaState(enum.StrEnum):
    """Life of a replica; only READY ones get requests."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """One rank's process."""

    rank: int
    pid: int
    node: str
    device: str
    actor_name: str
    group: int = 0
    """Data-parallel group of the rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRecord:
    """The load part of a record; fields as in `replicas.api.ReplicaStats`."""

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    num_preemptions: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayerRecord:
    """The load of one mixture layer's experts."""

    layer: int
    """Index of the decoder layer."""
    rows: tuple[int, ...] = ()
    """Rows routed to each logical expert since the replica started."""
    imbalance: float = 1.0
    """Rows of the busiest rank over the mean of all ranks, lately; 1 is perfect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRecord:
    """What the experts of an expert-parallel replica have to do, and where they are."""

    layers: tuple[ExpertLayerRecord, ...] = ()
    num_dropped: int = 0
    """Rows that skipped an expert for want of capacity."""
    table: int = 0
    """Version of the placement in use; grows with every rebalance."""
    num_moves: int = 0
    """Experts that ranks have fetched since the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRecord:
    """The ranks that an expert-parallel replica serves without."""

    ranks: tuple[int, ...]
    """Lost ones, and tensor-parallel peers that are of no use without them."""
    nodes: tuple[str, ...]
    """Node of each."""
    cause: str
    """What was noticed of the loss."""
    num_groups: int
    """Data-parallel groups that serve, each with a cache of its own."""
    num_groups_whole: int
    """Groups of the whole replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRecord:
    """One replica as its leader last described it."""

    replica_id: str
    model: str
    epoch: str
    """Changes with every start, so a late report of a dead predecessor matches nothing."""
    state: ReplicaState
    version: str = ""
    """What it was built from, see `cluster.base.replica_version`."""
    detail: str = ""
    """What it is doing (starting) or the root cause (failed)."""
    progress: float = 0.0
    """0..1 while weights load."""
    endpoint: str = ""
    """host:port of the replica stream, once READY."""
    pid: int = 0
    node: str = ""
    workers: tuple[WorkerRecord, ...] = ()
    startup_s: dict[str, float] = field(default_factory=dict)
    """Start-up ledger: phase -> seconds."""
    load: LoadRecord = field(default_factory=LoadRecord)
    experts: ExpertRecord | None = None
    """Only of an expert-parallel replica; a few seconds old."""
    loss: LossRecord | None = None
    """What is missing while it serves."""
    error: dict[str, str | None] | None = None
    """`PenstockError.to_dict()` of what ended it."""
