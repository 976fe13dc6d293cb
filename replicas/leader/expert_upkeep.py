"""Looks after the experts of a running replica: asks for the load, reports it, moves experts.

One task on the leader's asyncio loop, about once a second, off the path of every step. Only the
solver leaves the loop, for a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.base.errors import PenstockError
from replicas.leader.expert_balancer import ExpertBalancer
from replicas.leader.expert_watch import ExpertWatch
from replicas.leader.record import ExpertRecord

log = logging.getLogger(__name__)

PERIOD_S = 1.0

AskRanks = Callable[[], Awaitable[Sequence[Mapping[str, Any]]]]
"""The fields of every rank's `ExpertState`; raises PenstockError when they do not come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUpkeep:
    """The parts that see to it.

    `newest_step` gives the number of the last step: an idle replica is left alone. `interval_s` is
    the time between two looks at the balance; None: experts stay where they are.
    """

    ask_ranks: AskRanks
    newest_step: Callable[[], int]
    watch: ExpertWatch
    balancer: ExpertBalancer
    interval_s: float | None
    report: Callable[[ExpertRecord], None]
    period_s: float = PERIOD_S

    async def run(self) -> None:
        """Until cancelled."""
        seen_step, looked_s = 0, time.monotonic()
        is_settled = True
        while True:
            await asyncio.sleep(self.period_s)
            step = self.newest_step()
            if step == seen_step and is_settled:
                continue
            try:
                await self._look()
            except PenstockError as error:
                log.warning("the ranks did not say what their experts do: %s", error)
                continue
            # The last step may have been under way: its end is worth another look.
            is_settled, seen_step = step == seen_step, step
            if self.interval_s is not None and time.monotonic() - looked_s >= self.interval_s:
                looked_s = time.monotonic()
                await self._balance()

    async def _look(self) -> None:
        states = await self.ask_ranks()
        self.watch.add(states)
        self.balancer.hear(states)
        record = self.watch.record(self.balancer.tables)
        self.report(replace(record, table=self.balancer.version, num_moves=self.balancer.num_moves))

    async def _balance(self) -> None:
        if self.balancer.is_resting:
            await asyncio.to_thread(self.balancer.propose, self.watch.loads())
