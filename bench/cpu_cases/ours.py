"""Penstock as one more engine: bare in this process, or served by `penstock up`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bench.offline_engine import OfflineEngine
from bench.peers.protocol import Batch, BatchTimes, Server
from bench.random_checkpoint import RandomCheckpoint
from bench.running_cluster import ClusterSpec, RunningCluster
from cluster.base.errors import ConfigError
from replicas.models.hf_config import arch_from_hf
from replicas.models.weight_units import weight_units

MAX_CONTEXT = 1024
MAX_STEP_TOKENS = 512
ONE_KERNEL = "the kernels of the engine alone are compared offline"


class Ours:
    """See `Engine`. Online means the whole stack: gateway, leader, link and worker."""

    def __init__(self, threads: int, kernels: str = "auto") -> None:
        self.name = "penstock" if kernels == "auto" else "penstock with torch kernels"
        self._threads = threads
        self._kernels = kernels

    def why_not(self, *, online: bool) -> str:
        """See `Engine`."""
        return ONE_KERNEL if online and self._kernels != "auto" else ""

    @contextmanager
    def offline(self, checkpoint: RandomCheckpoint) -> Iterator[OurBatches]:
        """See `Engine`."""
        yield OurBatches(OfflineEngine(checkpoint.path, kernels=self._kernels))

    @contextmanager
    def serve(self, checkpoint: RandomCheckpoint) -> Iterator[Server]:
        """See `Engine`."""
        spec = ClusterSpec(
            model=checkpoint.name,
            path=checkpoint.path,
            threads=self._threads,
            dtype="bfloat16",
            max_context=MAX_CONTEXT,
            max_step_tokens=MAX_STEP_TOKENS,
        )
        with RunningCluster(spec) as cluster:
            yield Server(target=cluster.http_target, model=checkpoint.name, start_s=cluster.ready_s)


class OurBatches:
    """See `Offline`."""

    def __init__(self, engine: OfflineEngine) -> None:
        self._engine = engine

    def run(self, batch: Batch) -> BatchTimes:
        """See `Offline`."""
        run = self._engine.run(batch.size, batch.prompt_tokens, batch.new_tokens)
        steps = max(1, run.num_steps)
        return BatchTimes(
            prefill_s=run.prefill_s,
            decode_s=run.decode_s,
            decode_tokens=batch.size * run.num_steps,
            ledger_ms={part: 1e3 * seconds / steps for part, seconds in run.ledger_s.items()},
        )


def why_not_serve(config: dict[str, object]) -> str:
    """Why this version cannot run a model of that configuration; empty when it can."""
    try:
        weight_units(arch_from_hf(config), 0, 1)
    except ConfigError as error:
        return error.cause
    return ""
