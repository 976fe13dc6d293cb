"""One worker rank: builds its shard of the model, then executes steps until told to stop.

No Ray, no scheduler: a plain object made from a `WorkerPlan`. Usable when the constructor
returns; how it obeys its leader is `order_loop.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cluster.base.errors import InternalError
from cluster.dist.communicator import Communicator
from moe.exchange.link_costs import LinkCosts
from moe.spread_experts import SpreadExperts
from replicas.kernels.ops import Kernels
from replicas.worker import device as devices
from replicas.worker.assembly import (
    ModelAdapter,
    RankSpec,
    RunnerFactory,
    WeightsFactory,
    build_runner,
    resident_weights,
)
from replicas.worker.expert_state import ExpertState
from replicas.worker.frames import LinkAddress
from replicas.worker.host_stage import seen_from
from replicas.worker.lockstep_groups import LockstepGroups, first_gathering
from replicas.worker.lockstep_rank import LockstepRank
from replicas.worker.order_loop import OrderLoop
from replicas.worker.plan import WorkerPlan
from replicas.worker.rank_experts import spread_experts
from replicas.worker.tensor_rank import TensorParallelRank, join_tensor_group
from replicas.worker.worker_link import WorkerLink

_KERNELS = {"auto": "auto", "native": "native", "torch": "off"}
"""The plan's word -> that of `select_kernels`."""

OnProgress = Callable[[str, float], None]
_CONNECT_TIMEOUT_S = 60.0


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
        """Execute plans in order of arrival until the leader stops or goes; see `OrderLoop.run`."""
        OrderLoop(self._plan, self._rank, self._link).run()

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
            draft_tokens=plan.draft_tokens,
        )
        experts: SpreadExperts | None = None
        costs: LinkCosts | None = None
        if groups is not None:
            experts, format = spread_experts(groups, plan)
            if groups.place.exchange == "auto" and not groups.place.joins_later:
                on_progress("measuring links", 0.0)
                # Soon after the ranks have met: it has a step's deadline, and loading weights
                # may take one rank far longer than another.
                costs = experts.exchanges.calibrate(groups.place.probe_s)

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
            expert_layout=seen_from(device, experts) if experts is not None else None,
            adapt_model=self._adapt_model,
            sharers=groups.weight_sharers() if groups is not None and plan.offload else None,
        )
        if groups is None or experts is None:
            # A device's layers are only launched by then: the sign would come far too early.
            return TensorParallelRank(
                runner, answers=plan.rank == 0, signs=plan.rank == 0 and plan.device == "cpu"
            )
        return LockstepRank(plan, groups, experts, format, costs, runner)
