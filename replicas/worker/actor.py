"""Ray shell of one worker rank: an actor whose `run` call stays parked for the rank's life.

Only set-up passes through Ray; steps come over the link. `run` blocks in one thread, so the actor
has more than one: `progress` answers while weights load and while steps run. The leader imports
this class to create the actors, and a leader stays free of torch: so the rank's own code
is imported where it runs, when the actor is constructed.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from typing import TYPE_CHECKING, Any

import ray

from cluster.base.errors import InternalError
from cluster.base.log import log_under_ray
from cluster.base.plan import from_json
from cluster.dist.rendezvous import pick_port
from replicas.worker.plan import WorkerPlan

if TYPE_CHECKING:
    from replicas.worker.worker import Worker


class WorkerActor:
    """One rank."""

    def __init__(self) -> None:
        log_under_ray()
        self._rank_code = importlib.import_module("replicas.worker.worker")
        self._worker: Worker | None = None
        self._progress: tuple[str, float] = ("starting", 0.0)

    def pick_port(self, host: str) -> tuple[str, int]:
        """An address of this rank's machine and a port free there; empty `host`: its own address.

        Raises:
            OSError: `host` is not an address of this machine.
        """
        host = host or ray.util.get_node_ip_address()
        return host, pick_port(host)

    def load(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Join the group, load this rank's weights, allocate its cache, connect to the leader.

        Returns:
            pid, node, device, the start-up ledger in seconds, and the rank's `facts`.
        """
        worker_plan = from_json(WorkerPlan, plan)
        worker: Worker = self._rank_code.Worker(
            worker_plan, self._report, **self.worker_options(worker_plan)
        )
        self._worker = worker
        return {
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "device": worker.device,
            "startup_s": worker.startup_s,
            "facts": worker.facts,
        }

    def worker_options(self, plan: WorkerPlan) -> dict[str, Any]:
        """Further arguments of `Worker`; what other kinds of replica override.

        Raises:
            InternalError: the plan streams weights, which this kind of rank does not.
        """
        if plan.offload is not None or plan.zero3 is not None:
            raise InternalError("A plan that streams weights reached a rank that holds them all.")
        return {}

    def run(self) -> None:
        """Serve steps until the leader says stop; the parked call whose end means death."""
        if self._worker is None:
            raise RuntimeError("load() comes before run()")
        self._worker.run()

    def expert_state(self) -> dict[str, Any]:
        """The fields of this rank's `ExpertState`; answered beside `run`."""
        if self._worker is None:
            raise RuntimeError("load() comes before expert_state()")
        return dataclasses.asdict(self._worker.expert_state())

    def progress(self) -> tuple[str, float]:
        """What the rank is doing, and how far it is (0..1)."""
        return self._progress

    def _report(self, phase: str, fraction: float) -> None:
        self._progress = (phase, fraction)
