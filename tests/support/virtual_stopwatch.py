"""A group of ranks in virtual time: links and processors of known cost, and a clock for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.dist.rank_topology import RankTopology
from moe.exchange.calibrate import ROW_WORK_BYTES, SMALL_BYTES
from moe.exchange.choose import traffic_of
from moe.exchange.link_costs import LinkCosts
from moe.exchange.schemes import Scheme, Way
from moe.exchange.simulate import exchange_s, simulate
from moe.exchange.wire import WireFormat


@dataclass
class VirtualStopwatch:
    """Implements `Stopwatch`; what is timed passes on its clock.

    Args:
        topology, costs: the cluster as it is.
        own: by scheme, what processors take besides: seconds, and seconds per copy of a row.
    """

    topology: RankTopology
    costs: LinkCosts
    format: WireFormat
    own: dict[str, tuple[float, float]]
    slot_rows: int
    budget_s: float = 1.0
    spent_s: float = 0.0
    timed: Counter[tuple[object, int]] = field(default_factory=Counter)

    @property
    def left_s(self) -> float:
        return self.budget_s - self.spent_s

    @property
    def overhead_s(self) -> float:
        return 0.01 + exchange_s(Way.RAIL, self.topology, self.costs, SMALL_BYTES)

    def row_work(self, times: int) -> float:
        return self._pass(ROW_WORK_BYTES / self.costs.row_bytes_per_s, times, inside=True)

    def exchange(self, way: Way, num_bytes: int, times: int) -> float:
        self.timed[way, num_bytes] += times
        took_s = exchange_s(way, self.topology, self.costs, num_bytes)
        return self._pass(took_s, times, inside=way is Way.NODE)

    def trip(self, times: int) -> float:
        others = max(map(len, self.topology.nodes)) - 1
        took_s = self.costs.posted_call_s + 3 * others * self.costs.local_message_s
        return self._pass(took_s, times, inside=True)

    def layer(self, scheme: Scheme, rows: int) -> float:
        self.timed[scheme, rows] += 1
        return self._pass(self.truth_s(scheme, rows))

    def agree(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def worked_out(self, compute: Callable[[], list[float]], count: int) -> list[float]:
        numbers = compute()
        assert len(numbers) == count
        return numbers

    def truth_s(self, scheme: Scheme, rows: int, max_nodes: int = 0) -> float:
        """What a layer takes on this cluster."""
        traffic = traffic_of(rows, self.format, max_nodes)
        base_s, copy_s = self.own[str(scheme)]
        copies = rows * self.topology.num_ranks * traffic.rank_share(self.topology)
        links_s = simulate(scheme, self.topology, traffic, self.costs, self.slot_rows)
        return links_s + base_s + copies * copy_s

    def _pass(self, took_s: float, times: int = 1, *, inside: bool = False) -> float:
        self.spent_s += times * took_s + (0.0 if inside else self.overhead_s)
        return took_s
