"""The leader's side of ending one group of ranks and gathering another, over their step links.

    leader   HALT ▶ everybody        wait for HALTED        GATHER ▶ those that are left    wait
    ranks         leave all groups ▶ HALTED                        join, read experts ▶ GATHERED

Frames of a socket come in order, so a rank's HALTED is a fence: what it said before belongs to the
epoch that ended and is read away here, what the leader had sent before is not run any more. Both
waits have a deadline; a rank that misses it is lost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from cluster.base.errors import CollectiveTimeoutError, WorkerDiedError
from replicas.worker import wire
from replicas.worker.frames import FrameKind
from replicas.worker.gathering import Gathered, Gathering
from replicas.worker.leader_link import LeaderLink

_SEND_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RollCall:
    """Who is left."""

    present: tuple[int, ...]
    """Ranks that have halted and wait, ascending."""
    absent: dict[int, str]
    """The others, and how each was found missing."""


def halt(link: LeaderLink, timeout_s: float) -> RollCall:
    """End the present group at all ranks.

    A rank that some peer has found gone or stopped is not waited for once all others have halted.

    Args:
        timeout_s: longer than ranks take to notice a stopped peer.
    """
    present: set[int] = set()
    absent: dict[int, str] = {}
    for rank in link.ranks:
        try:
            link.send(rank, FrameKind.HALT, b"", _SEND_TIMEOUT_S)
        except OSError:
            absent[rank] = "its process has ended"
    deadline_s = time.monotonic() + timeout_s
    while missing := set(link.ranks) - present - set(absent):
        frame = None
        if not missing <= link.suspects:
            frame = link.receive(deadline_s - time.monotonic())
        if frame is None:
            how = "it is stopped, or its node cannot be reached"
            absent |= dict.fromkeys(missing, how)
            break
        rank, kind, payload = frame
        if kind is None:
            absent[rank] = "its process has ended"
        elif kind is FrameKind.HALTED:
            present.add(rank)
        elif kind is FrameKind.FAULT:
            link.fault(payload)
    return RollCall(present=tuple(sorted(present - set(absent))), absent=absent)


def gather(
    link: LeaderLink, gatherings: Mapping[int, Gathering], timeout_s: float
) -> dict[int, Gathered]:
    """Have all ranks of a link meet under a new epoch.

    Args:
        gatherings: what each rank of the link is told.

    Raises:
        WorkerDiedError: a rank is gone.
        CollectiveTimeoutError: not all have answered in time.
        PenstockError: the root cause that a rank gave for staying away.
    """
    for rank, gathering in gatherings.items():
        with suppress(OSError):  # whoever is gone is noticed below
            link.send(rank, FrameKind.GATHER, wire.encode(gathering), _SEND_TIMEOUT_S)
    answers: dict[int, Gathered] = {}
    link.suspects.clear()
    deadline_s = time.monotonic() + timeout_s
    while missing := sorted(set(gatherings) - set(answers)):
        frame = link.receive(deadline_s - time.monotonic())
        if frame is None:
            raise CollectiveTimeoutError(
                f"Ranks {missing} did not join the new group within {timeout_s:.0f} s."
            )
        rank, kind, payload = frame
        if kind is None:
            raise WorkerDiedError(f"Rank {rank} ended while a new group was made.")
        if kind is FrameKind.FAULT:
            raise link.fault(payload)
        if kind is FrameKind.GATHERED:
            answers[rank] = wire.decode_gathered(payload)
    return answers
