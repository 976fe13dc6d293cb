"""What the leader knows of the links between ranks, and whether a gathering has to measure anew.

Pure. Costs are kept while they still hold: a link does not change with the ranks that are left,
and how many there are, and where, the choice of an exchange takes into account. To measure takes a
second in which requests wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.base.errors import InternalError
from cluster.dist.rank_topology import RankTopology
from replicas.worker.gathering import Gathered


@dataclass(frozen=True, slots=True)
class ProbeDecision:
    """Whether the members of a gathering measure their links, and why."""

    probes: bool
    reason: str


class LinkKnowledge:
    """Costs as ranks measured them, and on which nodes those ranks were.

    Args:
        exchange: as the plan says; links matter to `auto` alone.
        costs: `LinkCosts` as bytes; empty: nobody has measured.
        nodes: node of each rank that measured.
    """

    def __init__(self, exchange: str, costs: bytes, nodes: Sequence[str]) -> None:
        self._exchange = exchange
        self.costs = costs
        self._measured_on = tuple(nodes)

    def decide(self, nodes: Sequence[str]) -> ProbeDecision:
        """For ranks on these nodes, one each; some may be gone, moved or new."""
        if self._exchange != "auto":
            return ProbeDecision(False, f"the exchange is {self._exchange}, whatever links cost")
        if not self.costs:
            return ProbeDecision(True, "nobody has measured them")
        if fuller := sorted(Counter(nodes) - Counter(self._measured_on)):
            names = ", ".join(fuller)
            return ProbeDecision(True, f"more ranks are on {names} than when they were measured")
        now, then = RankTopology(tuple(nodes)), RankTopology(self._measured_on)
        if now.has_two_levels and not then.has_two_levels:
            return ProbeDecision(True, "two hops have become possible")
        return ProbeDecision(False, "no node has more ranks than when they were measured")

    def learn(
        self, decision: ProbeDecision, nodes: Sequence[str], answers: Mapping[int, Gathered]
    ) -> None:
        """Take over what the members of a gathering answered.

        Raises:
            InternalError: they go by different costs, and might not choose alike.
        """
        costs = {rank: answer.costs for rank, answer in answers.items()}
        if len(set(costs.values())) > 1:
            raise InternalError(
                f"Ranks {sorted(costs)} hold different costs of their links.",
                "All members of a gathering measure together, or none does.",
            )
        (self.costs,) = set(costs.values())
        if decision.probes:
            self._measured_on = tuple(nodes)
