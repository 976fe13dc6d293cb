"""A rank of an expert-parallel replica: its groups, its experts, and its part of each lock-step.

The rank belongs to two kinds of groups: its tensor-parallel group, which shares a batch, and all
ranks of the replica, which share the experts. In every step it enters each mixture layer's
exchange, with zero rows when its group has nothing to compute; it never decides to stay away.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.base.errors import InternalError
from cluster.dist.communicator import Communicator
from cluster.dist.expert_peers import ExpertPeers, join_expert_peers
from cluster.dist.rank_topology import RankTopology
from cluster.dist.rendezvous import Rendezvous
from cluster.dist.watched_communicator import WatchedCommunicator
from moe.exchange.exchanges import Exchanges
from moe.exchange.wire import Combine, Dispatch, WireFormat
from moe.expert_table import starting_tables
from moe.spread_experts import SpreadExperts
from replicas.layers.weights import ResidentWeights
from replicas.models.checkpoint import load_unit
from replicas.models.context import torch_dtype
from replicas.models.hf_config import arch_from_hf
from replicas.models.mixture_weights import expert_unit
from replicas.worker import wire
from replicas.worker.expert_mover import ExpertMover, ReadExpert
from replicas.worker.expert_state import ExpertState
from replicas.worker.model_runner import ModelRunner
from replicas.worker.plan import ExpertRankPlan, WorkerPlan
from replicas.worker.scheme_table import SchemeRow, scheme_table
from replicas.worker.tensor_rank import join_tensor_group

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LockstepGroups:
    """What a rank has joined."""

    place: ExpertRankPlan
    topology: RankTopology
    peers: ExpertPeers
    communicator: Communicator
    """Over the tensor-parallel axis; its waits are watched like the exchanges'."""


def join_lockstep_groups(plan: WorkerPlan) -> LockstepGroups:
    """Meet the other ranks; all of them call it."""
    place = plan.experts
    if place is None:
        raise InternalError("This rank has no place in an expert-parallel replica.")
    topology = RankTopology(place.node_of_W)
    peers = join_expert_peers(
        rank=plan.rank,
        topology=topology,
        rendezvous=Rendezvous(
            host=place.peers_host, port=place.peers_port, group=f"ep/{plan.epoch}"
        ),
        timeout_s=plan.collective_timeout_s,
    )
    communicator = join_tensor_group(plan)
    if plan.tp_size > 1:
        communicator = WatchedCommunicator(communicator, peers.watch)
    return LockstepGroups(place=place, topology=topology, peers=peers, communicator=communicator)


def spread_experts(groups: LockstepGroups, model_path: str, dtype: str) -> SpreadExperts:
    """This rank's experts of a checkpoint and their exchanges; all ranks call it together.

    They lie as all replicas begin, see `starting_tables`.
    """
    arch = arch_from_hf(json.loads((Path(model_path) / "config.json").read_text()))
    mixtures = {index: layer.moe for index, layer in enumerate(arch.layers) if layer.moe}
    exchanges = Exchanges(
        groups.peers,
        groups.topology,
        WireFormat(
            dim=arch.model_dim,
            dtype=torch_dtype(dtype),
            top_k=max(moe.gate.top_k for moe in mixtures.values()),
            dispatch=Dispatch(groups.place.dispatch),
            combine=Combine(groups.place.combine),
        ),
    )
    tables = starting_tables(
        [(index, moe.gate.num_experts) for index, moe in mixtures.items()],
        groups.topology.num_ranks,
        groups.place.num_redundant,
    )
    return SpreadExperts(tables, exchanges, groups.peers.world.rank, groups.place.capacity_factor)


def measured_schemes(groups: LockstepGroups, experts: SpreadExperts) -> list[SchemeRow]:
    """The exchange for every size of step; all ranks call it together.

    Soon after they have met: the measurement has a step's deadline, and loading weights may take
    one rank far longer than another.
    """
    return scheme_table(groups.place.exchange, experts.exchanges, groups.place.max_rows)


class LockstepRank:
    """Executes its part of lock-steps.

    Args:
        experts: the layout that `runner`'s model was built with.
        schemes: see `measured_schemes`; for the leader.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        experts: SpreadExperts,
        schemes: list[SchemeRow],
        runner: ModelRunner,
    ) -> None:
        self._rank = plan.rank
        self._group = plan.rank // plan.tp_size
        self._answers = plan.tp_rank == 0
        self._exchanges = experts.exchanges
        self._counter = experts.counter
        self._mover = ExpertMover(experts, _resident(runner), _expert_reader(plan, runner))
        self._runner = runner
        self._scheme = ""
        self.facts: dict[str, object] = {
            "schemes": schemes,
            "experts": [dataclasses.asdict(table) for table in experts.tables],
        }

    def expert_state(self) -> ExpertState:
        """What this rank knows of its experts; from any thread, also while a step runs."""
        return ExpertState(
            layers=self._counter.layers,
            rows=self._counter.rows,
            num_dropped=self._counter.num_dropped,
            announced=self._mover.announced,
            prepared=self._mover.prepared,
            move_failure=self._mover.failure,
        )

    def execute(self, payload: bytearray, say_nearly_done: Callable[[], None]) -> bytes | None:
        """Run an encoded lock-step; the encoded answer on a group's first rank, None elsewhere.

        `say_nearly_done` goes unused: a step is done when the slowest group is, and no rank knows
        which that will be.
        """
        step = wire.decode_rank_step(payload)
        self._use(step.header.scheme, step.header.reason)
        self._mover.obey(step.header.experts)
        if step.header.is_idle(self._group):
            output = self._runner.stand_by(step.plan)
        else:
            output = self._runner.execute(step.plan)
        return wire.encode(output) if self._answers else None

    def settle(self) -> None:
        """See `ModelRunner.settle`."""
        self._runner.settle()

    def _use(self, scheme: str, reason: str) -> None:
        if scheme == self._scheme:
            return
        if self._rank == 0:
            log.info("exchange %s: %s", scheme, reason)
        self._exchanges.use(scheme)
        self._scheme = scheme


def _resident(runner: ModelRunner) -> ResidentWeights:
    if not isinstance(runner.weights, ResidentWeights):
        raise InternalError("Experts of a rank whose weights are streamed cannot move.")
    return runner.weights


def _expert_reader(plan: WorkerPlan, runner: ModelRunner) -> ReadExpert:
    """Reads an expert as the rank's own were loaded."""
    arch, kernels = runner.model.arch, runner.model.kernels

    def read(layer: int, expert: int) -> Mapping[str, torch.Tensor]:
        unit = expert_unit(arch, layer, expert)
        return load_unit(plan.model_path, unit, dtype=plan.dtype, kernels=kernels)

    return read
