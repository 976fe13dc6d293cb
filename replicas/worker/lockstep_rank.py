"""A rank of an expert-parallel replica: its groups, its experts, and its part of each lock-step.

The rank belongs to two kinds of groups: its tensor-parallel group, which shares a batch, and all
ranks of the replica, which share the experts. In every step it enters each mixture layer's
exchange, with zero rows when its group has nothing to compute; it never decides to stay away.
When peers are lost it keeps its model, weights and cache and joins the groups of those left.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from cluster.base.errors import InternalError
from moe.exchange.exchanges import Exchanges
from moe.exchange.link_costs import LinkCosts
from moe.exchange.wire import WireFormat
from moe.expert_table import ExpertTable
from moe.spread_experts import SpreadExperts
from replicas.engine.lockstep import ExpertOrders
from replicas.layers.weights import StepwiseWeights
from replicas.worker import wire
from replicas.worker.decode_graphs import GraphedModel
from replicas.worker.expert_mover import ExpertMover, expert_name
from replicas.worker.expert_state import ExpertState
from replicas.worker.frames import Payload
from replicas.worker.gathering import Gathered, Gathering
from replicas.worker.lockstep_groups import JoinedGroups, LockstepGroups
from replicas.worker.model_runner import ModelRunner
from replicas.worker.plan import WorkerPlan
from replicas.worker.rank_experts import expert_reader, mover_of, resident_weights_of
from replicas.worker.scheme_table import SchemeRow, scheme_table

log = logging.getLogger(__name__)


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
        self._read_expert = expert_reader(plan, runner)
        self._mover = mover_of(experts, runner, self._read_expert)
        self._scheme = ""
        self.settles = isinstance(runner.model, GraphedModel)
        """Whether `settle` ever has something to do."""
        self.facts: dict[str, object] = {
            "schemes": [] if groups.place.joins_later else self._schemes(),
            "experts": [dataclasses.asdict(table) for table in experts.tables],
            "costs": costs.to_bytes() if costs is not None else b"",
        }

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
        self._mover = ExpertMover(
            self._experts, resident_weights_of(self._runner), self._read_expert, gathering.table
        )
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
        counter, mover = self._experts.counter, self._mover
        return ExpertState(
            layers=counter.layers,
            rows=counter.rows,
            num_dropped=counter.num_dropped,
            announced=0 if mover is None else mover.announced,
            prepared=0 if mover is None else mover.prepared,
            move_failure="" if mover is None else mover.failure,
        )

    def execute(
        self, payload: Payload, say_nearly_done: Callable[[], None], waited_s: float
    ) -> bytes | None:
        """Run an encoded lock-step to its end; the encoded answer on a group's first rank.

        `say_nearly_done` goes unused: a step is done when the slowest group is, and no rank knows
        which that will be. So does `waited_s`: ranks wait for each other as well.
        """
        step = wire.decode_rank_step(payload)
        self._use(step.header.scheme, step.header.reason)
        self._obey(step.header.experts)
        if step.header.is_idle(self._group):
            output = self._runner.stand_by(step.plan)
        else:
            output = self._runner.execute(step.plan)
        if isinstance(self._runner.weights, StepwiseWeights):
            self._runner.weights.end_step()
        return wire.encode(output) if self._answers else None

    def settle(self) -> None:
        """See `ModelRunner.settle`."""
        self._runner.settle()

    def _obey(self, orders: ExpertOrders) -> None:
        if self._mover is not None:
            self._mover.obey(orders)
        elif orders.table or orders.rebalance is not None:
            raise InternalError("Experts of a rank whose weights are streamed cannot move.")

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
        weights = resident_weights_of(self._runner)
        layer, everyone = table.layer, range(table.slots.num_experts)
        held = {e for e in everyone if weights.holds(expert_name(layer, e))}
        dropped = [expert_name(layer, expert) for expert in sorted(held - set(wanted))]
        missing = sorted(set(wanted) - held)
        if dropped:
            weights.exchange({}, dropped)
        for expert in missing:
            check()
            tensors = self._read_expert(layer, expert)
            weights.exchange({expert_name(layer, expert): tensors}, ())
        return len(missing)
