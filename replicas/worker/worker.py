"""One worker rank: builds its shard of the model, then executes steps until told to stop.

No Ray, no scheduler: a plain object made from a `WorkerPlan`. Usable when the constructor
returns. An exception inside a step is this rank's end: the leader hears the root cause over the
link and replaces the whole group, because its peers may be waiting in a collective.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from cluster.base.errors import InternalError, PenstockError
from cluster.dist.communicator import Communicator, SingleRank
from cluster.dist.rendezvous import Rendezvous
from cluster.dist.torch_communicator import TorchCommunicator
from replicas.kernels.ops import Kernels
from replicas.worker import device as devices
from replicas.worker import wire
from replicas.worker.assembly import RankSpec, WeightsFactory, build_runner, resident_weights
from replicas.worker.frames import LinkAddress
from replicas.worker.model_runner import ModelRunner
from replicas.worker.plan import WorkerPlan
from replicas.worker.worker_link import WorkerLink

log = logging.getLogger(__name__)

OnProgress = Callable[[str, float], None]
_CONNECT_TIMEOUT_S = 60.0
# A leader needs about this long to plan: a sign that comes later only costs two system calls.
_SIGN_WORTH_S = 0.5e-3
_TAIL_GAIN = 1 / 8


class Worker:
    """A rank of a replica.

    Args:
        plan: this rank's slice of the model plan.
        on_progress: told (phase, fraction done) while the constructor works.
        weights_factory: where this rank's weights come from.
        adapt_kernels: as in `build_model`.

    Raises:
        PenstockError: what kept this rank from starting.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        on_progress: OnProgress,
        weights_factory: WeightsFactory = resident_weights,
        adapt_kernels: Callable[[Kernels], Kernels] | None = None,
    ) -> None:
        self._plan = plan
        self._adapt_kernels = adapt_kernels
        self._weights_factory = weights_factory
        self.startup_s: dict[str, float] = {}
        started_s = time.monotonic()
        device = devices.open_device(plan.device, plan.num_threads)
        self.device = str(device)
        on_progress("joining group", 0.0)
        self._communicator = _join(plan)
        started_s = self._mark("group", started_s)
        self._runner = self._build(device, on_progress)
        started_s = self._mark("weights_and_kv", started_s)
        self._link = WorkerLink.connect(
            LinkAddress(path=plan.link_path, host=plan.link_host, port=plan.link_port),
            rank=plan.rank,
            epoch=plan.epoch,
            secret=plan.link_secret,
            timeout_s=_CONNECT_TIMEOUT_S,
        )
        on_progress("ready", 1.0)

    def run(self) -> None:
        """Execute plans in order of arrival until the leader stops or goes.

        Raises:
            PenstockError: a step failed; the leader has been told.
        """
        # A device's layers are only launched by then: the sign would come far too early.
        may_say = self._plan.rank == 0 and self._plan.device == "cpu"
        tail_s = 0.0
        try:
            while (payload := self._link.receive_plan()) is not None:
                says = may_say and tail_s >= _SIGN_WORTH_S
                on_nearly_done = self._link.send_nearly_done if says else None
                output = self._runner.execute(wire.decode_plan(payload), on_nearly_done)
                tail_s += _TAIL_GAIN * (output.timings_s.get("sample", 0.0) - tail_s)
                if self._plan.rank == 0:
                    self._link.send_result(wire.encode(output))
                self._runner.settle()
        except Exception as error:
            fault = _as_fault(error)
            log.exception("rank %d failed", self._plan.rank)
            self._link.send_fault(fault.to_dict())
            raise fault from error
        finally:
            self._link.close()

    def _mark(self, phase: str, started_s: float) -> float:
        now_s = time.monotonic()
        self.startup_s[phase] = round(now_s - started_s, 3)
        return now_s

    def _build(self, device: torch.device, on_progress: OnProgress) -> ModelRunner:
        """This rank's model, weights and cache."""
        plan = self._plan
        spec = RankSpec(
            model_path=plan.model_path,
            dtype=plan.dtype,
            kv_dtype=plan.kv_dtype,
            block_size=plan.block_size,
            num_blocks=plan.num_blocks,
            max_context=plan.max_context,
        )
        return build_runner(
            spec,
            self._communicator,
            device,
            lambda done, total: on_progress("loading weights", done / max(1, total)),
            self._weights_factory,
            self._adapt_kernels,
        )


def _join(plan: WorkerPlan) -> Communicator:
    """This rank's communicator over the tensor-parallel axis."""
    if plan.tp_size == 1:
        return SingleRank()
    place = Rendezvous(host=plan.store_host, port=plan.store_port, group=f"tp/{plan.epoch}")
    return TorchCommunicator(
        rank=plan.rank,
        size=plan.tp_size,
        backend="nccl" if plan.device == "cuda" else "gloo",
        rendezvous=place,
        timeout_s=plan.collective_timeout_s,
    )


def _as_fault(error: Exception) -> PenstockError:
    """The error to report for whatever ended a step."""
    if isinstance(error, PenstockError):
        return error
    return InternalError(f"{type(error).__name__}: {error}")
