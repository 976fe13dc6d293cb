"""What one worker rank is built from; crosses Ray as JSON of plain values."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.base.plan import OffloadPlan
from cluster.base.zero3_plan import Zero3Plan
from moe.expert_table import ExpertTable


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRankPlan:
    """A rank's place in an expert-parallel replica, and where its ranks meet."""

    node_of_W: tuple[str, ...]
    """Node of each rank of the replica; ranks of one node stand together."""
    peers_host: str
    """Address of rank 0."""
    peers_port: int
    max_rows: int
    """Most rows that a rank dispatches in a step."""
    exchange: str
    dispatch: str
    combine: str
    probe_s: float = 1.0
    """What measuring the links may take, where `exchange` is auto."""
    capacity_factor: float | None = None
    num_redundant: int = 0
    survives: bool = False
    """When a peer is lost it waits for its leader to gather those that are left."""
    joins_later: bool = False
    """It takes a lost rank's place: the groups work already, and it is called when it is ready."""
    tables: tuple[ExpertTable, ...] = ()
    """Where the experts are, by rank; none: as every replica begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """A rank's slice of a model plan, plus the addresses of this epoch."""

    rank: int
    """In the replica; ranks of one data-parallel group stand together."""
    tp_size: int
    epoch: str
    model_path: str
    device: str
    dtype: str
    kv_dtype: str
    block_size: int
    num_blocks: int
    max_context: int
    num_threads: int
    collective_timeout_s: float
    store_host: str
    """Where the ranks of this rank's tensor-parallel group meet: at the first of them."""
    store_port: int
    link_path: str
    link_host: str
    link_port: int
    link_secret: str
    quantization: str = "none"
    """Number format of resident linear weights: none (`dtype`) or fp8."""
    kernels: str = "auto"
    """auto, native or torch."""
    attention_backend: str = "auto"
    """auto or a backend's name."""
    draft_tokens: int = 0
    """Most drafted tokens of a request in a step."""
    offload: OffloadPlan | None = None
    zero3: Zero3Plan | None = None
    experts: ExpertRankPlan | None = None
    """Only in an expert-parallel replica."""

    @property
    def tp_rank(self) -> int:
        """This rank's index in its tensor-parallel group."""
        return self.rank % self.tp_size
