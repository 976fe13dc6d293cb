"""One call to gather, obeyed in a thread of its own, so that the leader can call it off.

    joining    waits for the other members, in calls that nothing can interrupt
    gathering  in the new groups: links are measured, experts read
    over       the leader has the answer, or the reason why there is none

When a rank is lost while the others gather, these are in one of the first two. Called off while it
joins, the attempt is left alone: it has not touched the rank, ends at its own deadline and closes
what it has made, which nobody else looks for under that epoch. Called off while it gathers, it ends
after the expert that is being read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from cluster.base.errors import CollectiveTimeoutError, WorkerDiedError
from replicas.worker.gathering import Gathered, Gathering
from replicas.worker.lockstep_groups import JoinedGroups
from replicas.worker.lockstep_rank import LockstepRank

log = logging.getLogger(__name__)


class _CalledOffError(Exception):
    """The leader wants another gathering."""


class GatheringAttempt:
    """A rank on its way into a gathering, from construction on.

    Args:
        rank: in no group; not to be touched by others until the attempt is over.
        on_gathered: the rank is in the groups and ready for steps; from the attempt's thread.
        on_failed: it is not, and why: members are lost (it has left the groups and may be told of
            others), or anything else, which is its end. From the attempt's thread.
    """

    def __init__(
        self,
        rank: LockstepRank,
        gathering: Gathering,
        on_gathered: Callable[[Gathered], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._rank = rank
        self._gathering = gathering
        self._on_gathered = on_gathered
        self._on_failed = on_failed
        self._is_called_off = False
        self._touches_rank = threading.Lock()
        threading.Thread(target=self._run, name="gathering", daemon=True).start()

    def call_off(self) -> None:
        """Have it end without a word; when this returns it no longer touches the rank."""
        self._is_called_off = True
        with self._touches_rank:
            return

    def _run(self) -> None:
        groups: JoinedGroups | None = None
        failure: Exception | None = None
        try:
            groups = self._rank.meet(self._gathering)
        except Exception as error:
            failure = error
        with self._touches_rank:
            if self._is_called_off:
                if groups is not None:
                    groups.close()
                return
            try:
                if groups is None:
                    raise failure or RuntimeError("There are no groups and no reason why.")
                gathered = self._rank.gather(self._gathering, groups, self._check)
            except _CalledOffError:
                self._rank.leave()
            except (WorkerDiedError, CollectiveTimeoutError) as error:
                log.warning("found no group: %s", error)
                self._rank.leave()
                self._on_failed(error)
            except Exception as error:
                self._on_failed(error)
            else:
                self._on_gathered(gathered)

    def _check(self) -> None:
        if self._is_called_off:
            raise _CalledOffError
