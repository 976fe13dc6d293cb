"""Has the ranks of an expert-parallel replica halt, and gather anew: where, with what they know.

On the leader's asyncio loop; the waiting itself is done in a thread (`worker/roll_call.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from cluster.base.errors import InternalError, PenstockError
from cluster.base.ids import new_epoch
from cluster.base.plan import ModelPlan
from replicas.leader.link_knowledge import LinkKnowledge, ProbeDecision
from replicas.leader.roster import Meeting, Muster, Roster
from replicas.leader.worker_group import WorkerGroup
from replicas.worker import roll_call
from replicas.worker.gathering import Gathered
from replicas.worker.leader_link import LeaderLink

log = logging.getLogger(__name__)

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
        self._tp_size = plan.tp_size
        self._group = group
        self._roster = roster
        self._links = LinkKnowledge(plan.experts.exchange, group.facts["costs"], group.nodes)
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
        decision = self._links.decide(nodes)
        what = "measured anew" if decision.probes else "kept"
        log.warning("costs of links are %s: %s", what, decision.reason)
        meeting = await self._meeting(muster, table, decision)
        told = self._roster.gatherings(muster, meeting, forgets_rows=forgets_rows)
        answers = await asyncio.to_thread(
            roll_call.gather, self.link, told, _GATHER_S, self._silence_finder()
        )
        self._links.learn(decision, nodes, answers)
        return answers

    async def _meeting(self, muster: Muster, table: int, decision: ProbeDecision) -> Meeting:
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
            costs=self._links.costs,
            probes=decision.probes,
        )

    def _silence_finder(self) -> roll_call.FindSilent:
        """For a roll call in a thread, which asks the ranks on this loop."""
        loop = asyncio.get_running_loop()

        def find(ranks: Collection[int], timeout_s: float) -> set[int]:
            asking = self._group.actors.silent(ranks, timeout_s)
            silent: set[int] = asyncio.run_coroutine_threadsafe(asking, loop).result()
            return silent

        return find
