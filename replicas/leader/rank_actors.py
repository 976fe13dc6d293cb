"""The worker actors of a replica, by rank, and what they are asked beside their steps.

The handles are kept here, so Ray does not collect the actors; they die with the leader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.base.errors import PenstockError
from replicas.leader.worker_calls import all_or_first_error, as_error, call, outcome
from replicas.leader.worker_plans import Place

_POLL_S = 0.2
_STATE_TIMEOUT_S = 5.0
_PORT_TIMEOUT_S = 2.0

OnProgress = Callable[[str, float], None]


class RankActors:
    """Those that there are, loading ones among them."""

    def __init__(self) -> None:
        self._actors: dict[int, Any] = {}
        self._parked: dict[int, Any] = {}
        self.hosts: dict[int, str] = {}
        """The address that a rank listens on; missing: its machine's own."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks there are, those that load among them."""
        return tuple(self._actors)

    def add(self, rank: int, actor: Any) -> None:
        """Take in a new actor."""
        self._actors[rank] = actor

    def park(self, ranks: Iterable[int]) -> None:
        """Have ranks serve; the call ends when they do."""
        for rank in ranks:
            self._parked[rank] = self._actors[rank].run.remote()

    def lose(self, ranks: Iterable[int]) -> None:
        """End these ranks now, stopped ones too; others stay."""
        for rank in ranks:
            self._parked.pop(rank, None)
            actor = self._actors.pop(rank, None)
            if actor is not None:
                with suppress(Exception):  # already dead, or Ray itself is going down
                    ray.kill(actor)

    async def call(
        self, rank: int, method: str, doing: str, timeout_s: float, *arguments: Any
    ) -> Any:
        """The answer of one rank; raises as `worker_calls.call`."""
        ref = getattr(self._actors[rank], method).remote(*arguments)
        return await call(ref, timeout_s, doing, rank)

    async def wait_failure(self) -> PenstockError:
        """Return when a rank leaves its parked call; says which and why."""
        ranks = tuple(self._parked)
        calls = [asyncio.ensure_future(outcome(self._parked[rank])) for rank in ranks]
        try:
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in calls:
                each.cancel()
        index = next(i for i, each in enumerate(calls) if each.done() and not each.cancelled())
        return as_error(calls[index].result(), ranks[index])

    async def places(self, ranks: Sequence[int], timeout_s: float = _PORT_TIMEOUT_S) -> list[Place]:
        """An address of each rank's machine and a port free there.

        Args:
            timeout_s: for an answer; processes that are still starting need long.

        Raises:
            PenstockError: a rank is gone or does not answer.
        """
        return [
            (str(host), int(port))
            for host, port in await all_or_first_error(
                [
                    self.call(
                        rank, "pick_port", "choosing a port", timeout_s, self.hosts.get(rank, "")
                    )
                    for rank in ranks
                ]
            )
        ]

    async def silent(self, ranks: Collection[int], timeout_s: float) -> set[int]:
        """Those of these ranks whose processes are gone, or do not answer in time; a rank in a step
        does, and one that computes."""
        asked = [rank for rank in ranks if rank in self._actors]
        answers = await asyncio.gather(
            *(self.call(rank, "progress", "a sign of life", timeout_s) for rank in asked),
            return_exceptions=True,
        )
        mute = {
            rank
            for rank, answer in zip(asked, answers, strict=True)
            if isinstance(answer, BaseException)
        }
        return mute | (set(ranks) - set(asked))

    async def expert_states(self, ranks: Sequence[int]) -> list[dict[str, Any]]:
        """What these ranks of an expert-parallel replica know of their experts.

        Raises:
            PenstockError: a rank is gone or does not answer.
        """
        here = [rank for rank in ranks if rank in self._actors]
        return await all_or_first_error(
            [self.call(rank, "expert_state", "counting rows", _STATE_TIMEOUT_S) for rank in here]
        )

    async def watch_progress(self, ranks: Sequence[int], on_progress: OnProgress) -> None:
        """Tell how far the slowest of some ranks is, until cancelled."""
        while True:
            await asyncio.sleep(_POLL_S)
            with suppress(RayActorError, TimeoutError, KeyError):
                calls = [
                    asyncio.wait_for(self._actors[rank].progress.remote(), 5.0) for rank in ranks
                ]
                states = await asyncio.gather(*calls)
                phase, fraction = min(states, key=lambda state: state[1])
                on_progress(phase, fraction)
