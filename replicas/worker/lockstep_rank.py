"""A rank of an expert-parallel replica: its groups, its experts, and its part of each lock-step.

The rank belongs to two kinds of groups: its tensor-parallel group, which shares a batch, and all
ranks of the replica, which share the experts. In every step it enters each mixture layer's
exchange, with zero rows when its group has nothing to compute; it never decides to stay away.
When peers are lost it keeps its model, weights and cache and joins the groups of those left.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from cluster.base.errors import InternalError
from moe.exchange.exchanges import Exchanges
from moe.exchange.link_costs import LinkCosts
from moe.exchange.wire import Combine, Dispatch, WireFormat
from moe.expert_table import ExpertTable, starting_tables
from moe.spread_experts import SpreadExperts
from replicas.engine.scheduler_output import StepOutput
from replicas.layers.weights import ResidentWeights
from replicas.models.checkpoint import load_unit
from replicas.models.context import torch_dtype
from replicas.models.hf_config import arch_from_hf
from replicas.models.mixture_weights import expert_unit
from replicas.worker import wire
from replicas.worker.expert_mover import ExpertMover, ReadExpert, expert_name
from replicas.worker.expert_state import ExpertState
from replicas.worker.frames import Payload
from replicas.worker.gathering import Gathered, Gathering
from replicas.worker.lockstep_groups import JoinedGroups, LockstepGroups
from replicas.worker.model_runner import ModelRunner
from replicas.worker.plan import WorkerPlan
from replicas.worker.scheme_table import SchemeRow, scheme_table

log = logging.getLogger(__name__)


def spread_experts(groups: LockstepGroups, plan: WorkerPlan) -> tuple[SpreadExperts, WireFormat]:
    """This rank's experts of a checkpoint and, if it is in a group, their exchanges.

    All members of a group call it together. Experts lie as the plan says, or as all replicas begin
    (see `starting_tables`).
    """
    place = groups.place
    arch = arch_from_hf(json.loads((Path(plan.model_path) / "config.json").read_text()))
    mixtures = {index: layer.moe for index, layer in enumerate(arch.layers) if layer.moe}
    format = WireFormat(
        dim=arch.model_dim,
        dtype=torch_dtype(plan.dtype),
        top_k=max(moe.gate.top_k for moe in mixtures.values()),
        dispatch=Dispatch(place.dispatch),
        combine=Combine(place.combine),
    )
    tables = place.tables or starting_tables(
        [(index, moe.gate.num_experts) for index, moe in mixtures.items()],
        len(place.node_of_W),
        place.num_redundant,
    )
    exchanges = None
    if not place.joins_later:
        exchanges = Exchanges(groups.peers, groups.peers.topology, format, row_work=groups.row_work)
    return SpreadExperts(tables, exchanges, plan.rank, place.capacity_factor), format


class LockstepRank:
    """Executes its part of lock-steps.

    Args:
        experts: the layout that `runner`'s model was built with.
        format: of rows on the wire.
        costs: of the links, as all ranks measured them together; None: not measured.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        groups: LockstepGroups,
        experts: SpreadExperts,
        format: WireFormat,
        costs: LinkCosts | None,
        runner: ModelRunner,
    ) -> None:
        self._rank = plan.rank
        self._group = plan.rank // plan.tp_size
        self._answers = plan.tp_rank == 0
        self._groups = groups
        self._experts = experts
        self._format = format
        self._costs = costs
        self._runner = runner
        self._weights = _resident(runner)
        self._read_expert = _expert_reader(plan, runner)
        self._mover = ExpertMover(experts, self._weights, self._read_expert)
        self._scheme = ""
        self._outputs: deque[StepOutput] = deque()
        self.facts: dict[str, object] = {
            "schemes": [] if groups.place.joins_later else self._schemes(),
            "experts": [dataclasses.asdict(table) for table in experts.tables],
            "costs": costs.to_bytes() if costs is not None else b"",
        }

    @property
    def may_run_ahead(self) -> bool:
        """A lock-step ends when all ranks have ended it."""
        return False

    @property
    def num_in_flight(self) -> int:
        """Steps run and not answered."""
        return len(self._outputs)

    @property
    def answer_is_ready(self) -> bool:
        """Always: `begin` has seen the step to its end."""
        return True

    def leave(self) -> None:
        """Leave all groups; what peers wait for from this rank fails at once. May be repeated."""
        self._groups.leave()

    def meet(self, gathering: Gathering) -> JoinedGroups:
        """See `LockstepGroups.meet`; from any thread."""
        return self._groups.meet(gathering)

    def gather(
        self, gathering: Gathering, groups: JoinedGroups, check: Callable[[], None]
    ) -> Gathered:
        """Be in the groups of a gathering and hold the experts that it says.

        Experts are given up before others are read, so that the rank never holds more than either
        placement and the one being read.

        Args:
            groups: those it has met in.
            check: called before each expert that is read; what it raises ends the gathering, and
                the rank may be told of another one.

        Raises:
            CollectiveTimeoutError, WorkerDiedError: a member is lost.
            PenstockError: an expert could not be read.
        """
        self._groups.use(groups)
        exchanges = Exchanges(
            groups.peers, groups.peers.topology, self._format, row_work=self._groups.row_work
        )
        self._costs = LinkCosts.from_bytes(gathering.costs) if gathering.costs else None
        if gathering.probes:
            # Before any reading, which takes one member longer than another.
            self._costs = exchanges.calibrate(self._groups.place.probe_s)
        member = gathering.members.index(self._rank)
        num_fetched = sum(
            self._hold(table, table.logical_by_rank[member], check) for table in gathering.tables
        )
        self._experts.rejoin(gathering.tables, exchanges, member)
        # A fetch of the former epoch ends in the former mover, where nobody looks.
        self._mover = ExpertMover(self._experts, self._weights, self._read_expert, gathering.table)
        self._scheme = ""
        if gathering.forgets_rows:
            self._runner.forget_rows()
        return Gathered(
            rank=self._rank,
            epoch=gathering.epoch,
            schemes=self._schemes(),
            num_fetched=num_fetched,
            costs=self._costs.to_bytes() if self._costs is not None else b"",
        )

    def expert_state(self) -> ExpertState:
        """What this rank knows of its experts; from any thread, also while a step runs."""
        counter = self._experts.counter
        return ExpertState(
            layers=counter.layers,
            rows=counter.rows,
            num_dropped=counter.num_dropped,
            announced=self._mover.announced,
            prepared=self._mover.prepared,
            move_failure=self._mover.failure,
        )

    def begin(self, payload: Payload, say_nearly_done: Callable[[], None], waited_s: float) -> None:
        """Run an encoded lock-step, to its end.

        `say_nearly_done` goes unused: a step is done when the slowest group is, and no rank knows
        which that will be. So does `waited_s`: ranks wait for each other as well.
        """
        step = wire.decode_rank_step(payload)
        self._use(step.header.scheme, step.header.reason)
        self._mover.obey(step.header.experts)
        if step.header.is_idle(self._group):
            output = self._runner.stand_by(step.plan)
        else:
            output = self._runner.execute(step.plan)
        self._outputs.append(output)

    def answer(self) -> bytes | None:
        """The encoded answer to the oldest step on a group's first rank, None elsewhere."""
        output = self._outputs.popleft()
        return wire.encode(output) if self._answers else None

    def settle(self) -> None:
        """See `ModelRunner.settle`."""
        self._runner.settle()

    def _use(self, scheme: str, reason: str) -> None:
        if scheme == self._scheme:
            return
        if self._rank == 0:
            log.info("exchange %s: %s", scheme, reason)
        self._experts.exchanges.use(scheme)
        self._scheme = scheme

    def _schemes(self) -> list[SchemeRow]:
        place = self._groups.place
        return scheme_table(place.exchange, self._experts.exchanges, place.max_rows, self._costs)

    def _hold(self, table: ExpertTable, wanted: Sequence[int], check: Callable[[], None]) -> int:
        """Hold exactly these experts of a layer; how many had to be read.

        Goes by the weights that are there: a gathering may have ended half-way through this.
        """
        layer, everyone = table.layer, range(table.slots.num_experts)
        held = {e for e in everyone if self._weights.holds(expert_name(layer, e))}
        dropped = [expert_name(layer, expert) for expert in sorted(held - set(wanted))]
        missing = sorted(set(wanted) - held)
        if dropped:
            self._weights.exchange({}, dropped)
        for expert in missing:
            check()
            tensors = self._read_expert(layer, expert)
            self._weights.exchange({expert_name(layer, expert): tensors}, ())
        return len(missing)


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
