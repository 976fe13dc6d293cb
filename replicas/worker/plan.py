"""What one worker rank is built from; crosses Ray as JSON of plain values."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.base.plan import OffloadPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """A rank's slice of a model plan, plus the addresses of this epoch."""

    rank: int
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
    store_port: int
    link_path: str
    link_host: str
    link_port: int
    link_secret: str
    offload: OffloadPlan | None = None
