"""Has the ranks of an expert-parallel replica halt, and gather anew: where, with what they know.

On the leader's asyncio loop; the waiting itself is done in a thread (`worker/roll_call.py`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence

from cluster.base.errors import InternalError, PenstockError
from cluster.base.ids import new_epoch
from cluster.base.plan import ModelPlan
from cluster.dist.rank_topology import RankTopology
from replicas.leader.roster import Meeting, Muster, Roster
from replicas.leader.worker_group import WorkerGroup
from replicas.worker import roll_call
from replicas.worker.gathering import Gathered
from replicas.worker.leader_link import LeaderLink

_HALT_S = 20.0
"""For a rank that lives: one computes a layer between two looks, or waits to its own deadline."""
_GATHER_S = 120.0
"""Experts may have to be read."""
_SILENT_S = 0.6


class RollCaller:
    """Calls the ranks of one replica together.

    Args:
        group: their actors.
        link: to all of them.
        roster: who they are.
    """

    def __init__(
        self, plan: ModelPlan, group: WorkerGroup, link: LeaderLink, roster: Roster
    ) -> None:
        if plan.experts is None:
            raise InternalError("These ranks do not share experts.")
        self._exchange = plan.experts.exchange
        self._tp_size = plan.tp_size
        self._group = group
        self._roster = roster
        self._costs: bytes = group.facts["costs"]
        self._measured_on = group.nodes
        self.link = link
        """To the ranks there are."""

    async def halt(self) -> roll_call.RollCall:
        """End the present group; who is left."""
        return await asyncio.to_thread(
            roll_call.halt,
            self.link,
            _HALT_S,
            self._silence_finder(),
            tp_size=self._tp_size,
        )

    async def gather(
        self, muster: Muster, table: int, *, forgets_rows: bool
    ) -> dict[int, Gathered]:
        """Have a muster meet; what each answers.

        Args:
            table: version of the placement of its experts.
            forgets_rows: steps were interrupted.

        Raises:
            PenstockError: a rank is lost, then it is among the link's suspects; or it stays away.
        """
        nodes = self._roster.nodes_of(muster)
        meeting = await self._meeting(muster, table, probes=self._must_probe(nodes))
        told = self._roster.gatherings(muster, meeting, forgets_rows=forgets_rows)
        answers = await asyncio.to_thread(
            roll_call.gather, self.link, told, _GATHER_S, self._silence_finder()
        )
        self._costs = answers[muster.members[0]].costs
        if meeting.probes:
            self._measured_on = nodes
        return answers

    async def _meeting(self, muster: Muster, table: int, *, probes: bool) -> Meeting:
        """Under a new epoch, at ports that its ranks say are free."""
        firsts = self._roster.first_ranks(muster)
        asked = [muster.members[0], *firsts]
        try:
            peers, *places = await self._group.actors.places(asked)
        except PenstockError:
            self.link.suspects |= await self._group.actors.silent(asked, _SILENT_S)
            raise
        groups = [rank // self._tp_size for rank in firsts]
        return Meeting(
            epoch=new_epoch("ranks"),
            peers=peers,
            tensor_groups=dict(zip(groups, places, strict=True)),
            table=table,
            costs=self._costs,
            probes=probes,
        )

    def _must_probe(self, nodes: Sequence[str]) -> bool:
        """Whether these ranks, some gone or moved, need costs of their own.

        What a link costs does not change with the ranks that are left; how many there are, and
        where, the choice of an exchange takes into account. To measure takes a second in which
        requests wait: only where more ranks share a node than before, or two hops have become
        possible that had not been.
        """
        if self._exchange != "auto":
            return False
        is_fuller = bool(Counter(nodes) - Counter(self._measured_on))
        now, then = RankTopology(tuple(nodes)), RankTopology(self._measured_on)
        return is_fuller or (now.has_two_levels and not then.has_two_levels)

    def _silence_finder(self) -> roll_call.FindSilent:
        """For a roll call in a thread, which asks the ranks on this loop."""
        loop = asyncio.get_running_loop()

        def find(ranks: Collection[int], timeout_s: float) -> set[int]:
            asking = self._group.actors.silent(ranks, timeout_s)
            silent: set[int] = asyncio.run_coroutine_threadsafe(asking, loop).result()
            return silent

        return find
