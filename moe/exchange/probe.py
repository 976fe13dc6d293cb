"""Times what all ranks of a group do at once: exchanges, work on rows and whole layers.

Collective. A layer is timed as a model meets it: weights have swept the caches, everybody rests,
and all begin together, so that what is measured ends with the last rank and not with one that was
ahead. Ranks know of nothing but their own clocks; after each timing between nodes they agree on
the longest of their times and of what the probe has taken so far, so all decide alike what to time
next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cluster.dist.peer_group import PeerGroup
from cluster.dist.rank_topology import RankTopology
from moe.exchange.base import Exchange
from moe.exchange.calibrate import ROW_WORK_BYTES, SMALL_BYTES
from moe.exchange.layer_costs import MANY_ROWS
from moe.exchange.peers import Peers
from moe.exchange.preposted import SlotHop
from moe.exchange.probe_meeting import Meeting
from moe.exchange.schemes import Scheme, Way
from moe.exchange.shared_hop import SharedHop
from moe.exchange.wire import WireFormat
from moe.expert_slots import ExpertSlots
from moe.plan import RowPlan
from moe.row_sums import RowSums

_REST_S = 0.01
"""Ranks that share cores need some of it to come back from their meeting."""
_SWEPT_BYTES = 4 * 2**20
"""More than a core's own cache."""
_SLOTS_PER_RANK = 4
_LEAST_S = 1e-7
_WHAT = "calibration"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What is timed.

    Args:
        peers: the rank's groups.
        inside: the hop inside the node, without counts.
        exchange: of a layer whose experts lie as `slots_of` says.
        use: switches it to another scheme.
        sums: what packs and adds partial sums.
        format: of rows on the wire.
    """

    peers: Peers
    inside: SlotHop | SharedHop
    exchange: Exchange
    use: Callable[[Scheme], None]
    sums: RowSums
    format: WireFormat


def slots_of(topology: RankTopology, format: WireFormat) -> ExpertSlots:
    """The placement of the layer that is probed."""
    count = max(_SLOTS_PER_RANK * topology.num_ranks, format.top_k)
    return ExpertSlots.even(count, topology.num_ranks)


class Probe:
    """Implements `Stopwatch` for one rank; all ranks construct theirs and call it together.

    Args:
        probed: what is timed.
        num_slots: of the layer.
        budget_s: what all timings together should take.
    """

    def __init__(self, probed: Probed, num_slots: int, budget_s: float) -> None:
        self._begun_s = time.perf_counter()
        self.budget_s = budget_s
        self.spent_s, self.overhead_s = 0.0, 0.0
        self._probed = probed
        self._meeting = Meeting(probed.peers)
        self._weights = torch.ones(_SWEPT_BYTES // 4)
        self._row_work = _RowWork(probed.sums)
        self._rows = _Rows.most(probed.format, num_slots, probed.peers.world)
        # The first use of anything is slower; what goes between nodes is too dear for that.
        self._row_work.run()
        self._trip()
        self._agree_on_time(0.0)

    @property
    def left_s(self) -> float:
        """See `Stopwatch.left_s`."""
        return self.budget_s - self.spent_s

    def row_work(self, times: int) -> float:
        """See `Stopwatch.row_work`."""
        return self._inside(self._row_work.run, times)

    def exchange(self, way: Way, num_bytes: int, times: int) -> float:
        """See `Stopwatch.exchange`."""
        peers = self._probed.peers
        if way is Way.NODE:
            return self._inside(self._exchange(peers.node, num_bytes), times)
        action = self._exchange(peers.rail if way is Way.RAIL else peers.world, num_bytes)
        return self._agree_on_time(_one_of(action, times))

    def trip(self, times: int) -> float:
        """See `Stopwatch.trip`."""
        return self._inside(self._trip, times)

    def layer(self, scheme: Scheme, rows: int) -> float:
        """See `Stopwatch.layer`.

        All begin a rest after they have met, which was to agree on the timing before.
        """
        exchange, (hidden, chosen, weights) = self._probed.exchange, self._rows.first(rows)
        self._probed.use(scheme)
        self._weights.sum()
        begin_s = max(self._meeting.ended_s + _REST_S, time.perf_counter())
        time.sleep(max(0.0, begin_s - time.perf_counter()))
        arrivals = exchange.dispatch(hidden, chosen, weights).wait()
        exchange.combine(self._rows.answers(arrivals.hidden_AD.shape[0]), arrivals)
        return self._agree_on_time(time.perf_counter() - begin_s)

    def agree(self, values: Sequence[float]) -> list[float]:
        """See `Stopwatch.agree`."""
        *values, meeting_s = self._meeting.largest([*values, self._meeting.took_s])
        self.overhead_s = meeting_s + _REST_S
        return values

    def worked_out(self, compute: Callable[[], list[float]], count: int) -> list[float]:
        """See `Stopwatch.worked_out`."""
        is_first = self._probed.peers.node.rank == 0
        return self._meeting.largest_of_node(compute() if is_first else [0.0] * count)

    def _inside(self, action: Callable[[], None], times: int) -> float:
        """Of the ranks of a node, which begin together."""
        if self._probed.peers.node.size > 1:
            self._exchange(self._probed.peers.node, SMALL_BYTES)()
        return _one_of(action, times)

    def _agree_on_time(self, own_s: float) -> float:
        """The longest of all ranks' times; keeps account of the budget."""
        meeting = self._meeting
        spent_s = time.perf_counter() - self._begun_s
        took_s, spent_s, meeting_s = meeting.largest([own_s, spent_s, meeting.took_s])
        # How long this meeting took all of them the next will say.
        self.spent_s, self.overhead_s = spent_s + meeting_s, meeting_s + _REST_S
        return max(_LEAST_S, took_s)

    @staticmethod
    def _exchange(group: PeerGroup, num_bytes: int) -> Callable[[], None]:
        sent = torch.ones(group.size * num_bytes, dtype=torch.uint8)
        received = torch.ones_like(sent)
        splits = [num_bytes] * group.size
        return lambda: group.all_to_all(received, sent, splits, splits).wait(_WHAT)

    def _trip(self) -> None:
        """Empty, inside the node; answers to nothing are not sent."""
        hop = self._probed.inside
        empty = torch.empty((0, hop.row_bytes), dtype=torch.uint8)
        nobody = RowPlan.build(torch.empty((0, 1), dtype=torch.int64), hop.group.size)
        trip = hop.open([empty], nobody, hop.row_bytes)
        trip.arrive(_WHAT)
        trip.room()
        trip.give_back(_WHAT)


def _one_of(action: Callable[[], None], times: int) -> float:
    """Seconds of one of several in a row; the first of them wakes everybody up and is not in it."""
    if times > 1:
        action()
    begun_s = time.perf_counter()
    counted = max(1, times - 1)
    for _ in range(counted):
        action()
    return (time.perf_counter() - begun_s) / counted


@dataclass(frozen=True, slots=True)
class _Rows:
    """What a probed layer is given, made beforehand for the largest: ranks shall begin together."""

    hidden_TD: torch.Tensor
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor
    answers_AD: torch.Tensor

    @classmethod
    def most(cls, format: WireFormat, num_slots: int, world: PeerGroup) -> _Rows:
        rows, top_k = MANY_ROWS[0], format.top_k
        generator = torch.Generator().manual_seed(world.rank)
        scores = torch.rand((rows, num_slots), generator=generator)
        arriving = rows * min(top_k, world.size)  # on average at most
        return cls(
            hidden_TD=torch.ones((rows, format.dim), dtype=format.dtype),
            expert_TK=scores.topk(top_k, dim=1).indices,
            weight_TK=torch.ones((rows, top_k)),
            # Written: pages that nobody has written are all the same one, which is always near.
            answers_AD=torch.ones((arriving, format.dim), dtype=torch.float64),
        )

    def first(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, experts and weights of some of them."""
        return self.hidden_TD[:rows], self.expert_TK[:rows], self.weight_TK[:rows]

    def answers(self, num_rows: int) -> torch.Tensor:
        """What experts would answer to so many rows."""
        if num_rows <= self.answers_AD.shape[0]:
            return self.answers_AD[:num_rows]
        return self.answers_AD.new_ones((num_rows, self.answers_AD.shape[1]))


class _RowWork:
    """What a hop does to rows there and back: gather, put together, add up."""

    num_rows, dim = 128, ROW_WORK_BYTES // (2 * 2 * 128 * 4)
    num_copies = 2 * num_rows

    def __init__(self, sums: RowSums) -> None:
        self._sums = sums
        self._partial = torch.ones((self.num_copies, self.dim), dtype=torch.float64)
        self._rows = torch.ones((self.num_rows, self.dim))
        self._plan = RowPlan.build(torch.arange(2).expand(self.num_rows, 2), 2)

    def run(self) -> None:
        """Once there and back."""
        self._plan.gather(self._rows)
        packed = torch.empty((self.num_copies, 1 + self.dim), dtype=torch.int32)
        self._sums.pack(self._partial, packed)
        self._sums.total([packed], self._plan.row_R, torch.empty_like(self._rows))
