"""One worker rank: builds its shard of the model, then executes steps until told to stop.

No Ray, no scheduler: a plain object made from a `WorkerPlan`. Usable when the constructor
returns. An exception inside a step is this rank's end: the leader hears the root cause over the
link. But for the loss of a peer, where ranks survive it: then the rank halts and waits for the
leader to gather those that are left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from cluster.base.errors import (
    CollectiveTimeoutError,
    InternalError,
    PenstockError,
    UnavailableError,
    WorkerDiedError,
)
from cluster.dist.communicator import Communicator
from moe.exchange.link_costs import LinkCosts
from moe.spread_experts import SpreadExperts
from replicas.kernels.ops import Kernels
from replicas.worker import device as devices
from replicas.worker import wire
from replicas.worker.assembly import (
    ModelAdapter,
    RankSpec,
    RunnerFactory,
    WeightsFactory,
    build_runner,
    resident_weights,
)
from replicas.worker.expert_state import ExpertState
from replicas.worker.frames import FrameKind, LinkAddress
from replicas.worker.lockstep_groups import LockstepGroups, first_gathering
from replicas.worker.lockstep_rank import LockstepRank, spread_experts
from replicas.worker.plan import WorkerPlan
from replicas.worker.tensor_rank import TensorParallelRank, join_tensor_group
from replicas.worker.worker_link import WorkerLink

_KERNELS = {"auto": "auto", "native": "native", "torch": "off"}
"""The plan's word -> that of `select_kernels`."""
log = logging.getLogger(__name__)

OnProgress = Callable[[str, float], None]
_CONNECT_TIMEOUT_S = 60.0
# Longer than a leader takes to gather the ranks that are left, or to give the replica up.
_HALTED_TIMEOUT_S = 300.0
# How late an answer may be, or a plan be taken up, while the device has work.
_DEVICE_POLL_S = 50e-6


class Worker:
    """A rank of a replica.

    Args:
        plan: this rank's slice of the model plan.
        on_progress: told (phase, fraction done) while the constructor works.
        weights_factory: where this rank's weights come from.
        adapt_kernels, adapt_model: as in `build_runner`.
        make_runner: makes the whole rank instead, of a model that the registry does not have.

    Raises:
        PenstockError: what kept this rank from starting.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        on_progress: OnProgress,
        weights_factory: WeightsFactory = resident_weights,
        adapt_kernels: Callable[[Kernels], Kernels] | None = None,
        make_runner: RunnerFactory | None = None,
        adapt_model: ModelAdapter | None = None,
    ) -> None:
        self._plan = plan
        self._make_runner = make_runner
        self._adapt_kernels = adapt_kernels
        self._adapt_model = adapt_model
        self._weights_factory = weights_factory
        self.startup_s: dict[str, float] = {}
        started_s = time.monotonic()
        device = devices.open_device(plan.device, plan.num_threads)
        self.device = str(device)
        on_progress("joining group", 0.0)
        groups = LockstepGroups(plan) if plan.experts else None
        if groups is not None and not groups.place.joins_later:
            groups.join(first_gathering(plan))
        communicator = groups.communicator if groups else join_tensor_group(plan)
        started_s = self._mark("group", started_s)
        self._rank = self._build(device, communicator, groups, on_progress)
        started_s = self._mark("weights_and_kv", started_s)
        self._link = WorkerLink.connect(
            LinkAddress(path=plan.link_path, host=plan.link_host, port=plan.link_port),
            rank=plan.rank,
            epoch=plan.epoch,
            secret=plan.link_secret,
            timeout_s=_CONNECT_TIMEOUT_S,
        )
        if groups is not None:
            groups.tell_failures(lambda error, lost: self._link.send_fault(error.to_dict(), lost))
        # Between two groups: what the leader planned for the one that ended is not run.
        self._halted = groups is not None and groups.place.joins_later
        self._patience_s = None if self._halted else _HALTED_TIMEOUT_S
        on_progress("ready", 1.0)

    @property
    def facts(self) -> dict[str, object]:
        """What the leader needs to know of a rank that it cannot know by itself; plain values."""
        return self._rank.facts

    def expert_state(self) -> ExpertState:
        """What this rank knows of its experts; from any thread.

        Raises:
            InternalError: the replica is not expert-parallel.
        """
        if not isinstance(self._rank, LockstepRank):
            raise InternalError("Only ranks of an expert-parallel replica share experts.")
        return self._rank.expert_state()

    def run(self) -> None:
        """Execute plans in order of arrival until the leader stops or goes.

        Raises:
            PenstockError: a step failed and this rank cannot go on; the leader has been told.
        """
        try:
            while (order := self._next_order()) is not None:
                self._obey(*order)
        except Exception as error:
            fault = _as_fault(error)
            log.exception("rank %d failed", self._plan.rank)
            self._link.send_fault(fault.to_dict())
            raise fault from error
        finally:
            self._link.close()

    def _next_order(self) -> tuple[FrameKind, bytearray] | None:
        # The device and the leader cannot be waited for together: each is asked in turn.
        while self._rank.num_in_flight and not self._link.has_order():
            if self._rank.answer_is_ready:
                self._answer()
            else:
                time.sleep(_DEVICE_POLL_S)
        try:
            return self._link.receive_order(self._patience_s if self._halted else None)
        except TimeoutError:
            raise UnavailableError(
                f"The leader made no new group within {_HALTED_TIMEOUT_S:.0f} s."
            ) from None

    def _obey(self, kind: FrameKind, payload: bytearray) -> None:
        if kind is FrameKind.PLAN and not self._halted:
            self._step(payload)
            return
        self._answer()
        if kind is FrameKind.HALT:
            self._halt()
            self._link.send_halted()
        elif kind is FrameKind.GATHER:
            self._gather(payload)

    def _step(self, payload: bytearray) -> None:
        try:
            self._rank.begin(payload, self._link.send_nearly_done, self._link.waited_s)
            self._answer(all_but=1 if self._rank.may_run_ahead else 0)
        except (WorkerDiedError, CollectiveTimeoutError) as error:
            if not (self._plan.experts and self._plan.experts.survives):
                raise
            log.warning("rank %d waits for a new group: %s", self._plan.rank, error)
            self._halt()
            self._link.send_fault(error.to_dict())

    def _answer(self, *, all_but: int = 0) -> None:
        """Answer steps in flight, oldest first, until so many are left."""
        while self._rank.num_in_flight > all_but:
            answer = self._rank.answer()
            if answer is not None:
                self._link.send_result(answer)
        if not self._rank.num_in_flight:
            self._rank.settle()

    def _halt(self) -> None:
        """Leave all groups: peers that wait for this rank hear of it by that."""
        self._halted = True
        if isinstance(self._rank, LockstepRank):
            self._rank.leave()

    def _gather(self, payload: bytearray) -> None:
        if not isinstance(self._rank, LockstepRank):
            raise InternalError("Only ranks of an expert-parallel replica gather anew.")
        self._halt()
        try:
            gathered = self._rank.gather(wire.decode_gathering(payload))
        except (WorkerDiedError, CollectiveTimeoutError) as error:
            log.warning("rank %d found no group: %s", self._plan.rank, error)
            self._halt()
            self._link.send_fault(error.to_dict())
            return
        self._halted, self._patience_s = False, _HALTED_TIMEOUT_S
        self._link.send_gathered(gathered)

    def _mark(self, phase: str, started_s: float) -> float:
        now_s = time.monotonic()
        self.startup_s[phase] = round(now_s - started_s, 3)
        return now_s

    def _build(
        self,
        device: torch.device,
        communicator: Communicator,
        groups: LockstepGroups | None,
        on_progress: OnProgress,
    ) -> TensorParallelRank | LockstepRank:
        """This rank's model, weights and cache, and what runs its plans on them."""
        plan = self._plan
        spec = RankSpec(
            model_path=plan.model_path,
            dtype=plan.dtype,
            kv_dtype=plan.kv_dtype,
            block_size=plan.block_size,
            num_blocks=plan.num_blocks,
            max_context=plan.max_context,
            kernels="fp8" if plan.quantization == "fp8" else _KERNELS[plan.kernels],
            attention_backend=plan.attention_backend,
        )
        experts: SpreadExperts | None = None
        costs: LinkCosts | None = None
        if groups is not None:
            experts, format = spread_experts(groups, plan)
            if groups.place.exchange == "auto" and not groups.place.joins_later:
                on_progress("measuring links", 0.0)
                # Soon after the ranks have met: it has a step's deadline, and loading weights
                # may take one rank far longer than another.
                costs = experts.exchanges.calibrate()

        def on_loaded(done: int, total: int) -> None:
            on_progress("loading weights", done / max(1, total))

        if self._make_runner is not None:
            runner = self._make_runner(spec, communicator, device, on_loaded)
            return TensorParallelRank(runner, answers=True, signs=True)
        runner = build_runner(
            spec,
            communicator,
            device,
            on_loaded,
            self._weights_factory,
            self._adapt_kernels,
            expert_layout=experts,
            adapt_model=self._adapt_model,
        )
        if groups is None or experts is None:
            # A device's layers are only launched by then: the sign would come far too early.
            return TensorParallelRank(
                runner, answers=plan.rank == 0, signs=plan.rank == 0 and plan.device == "cpu"
            )
        return LockstepRank(plan, groups, experts, format, costs, runner)


def _as_fault(error: Exception) -> PenstockError:
    """The error to report for whatever ended a step."""
    if isinstance(error, PenstockError):
        return error
    return InternalError(f"{type(error).__name__}: {error}")
