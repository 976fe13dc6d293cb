"""The leader's side of ending one group of ranks and gathering another, over their step links.

    leader   HALT ▶ everybody        wait for HALTED        GATHER ▶ those that are left    wait
    ranks         leave all groups ▶ HALTED                        join, read experts ▶ GATHERED

Frames of a socket come in order, so a rank's HALTED is a fence: what it said before belongs to the
epoch that ended and is read away here, what the leader had sent before is not run any more.

While the ranks have no group there is no watch among them either: the leader itself asks after
those it waits for (`FindSilent`), so a rank that is stopped now is found as quickly as in a step:

    0 ........ 1.0 s      nothing is asked
    1.0 + 2 * 1.2 s       who left two questions unanswered is lost
    0.6 s                 who a peer had found stopped before: one question
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from cluster.base.errors import CollectiveTimeoutError, WorkerDiedError
from replicas.worker import wire
from replicas.worker.frames import FrameKind
from replicas.worker.gathering import Gathered, Gathering
from replicas.worker.leader_link import LeaderLink

FindSilent = Callable[[Collection[int], float], Collection[int]]
"""Those of these ranks whose processes do not answer within so many seconds; computing is no
excuse, being in a step neither."""

_SEND_TIMEOUT_S = 1.0
_SUSPICION_S = 1.0
_QUESTION_S = 1.2
_CONFIRMATION_S = 0.6
_ENDED = "its process has ended"
_STOPPED = "it is stopped, or its node cannot be reached"
_USELESS = "its tensor-parallel group has lost another rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class RollCall:
    """Who is left."""

    present: tuple[int, ...]
    """Ranks that have halted and wait, ascending."""
    absent: dict[int, str]
    """The others, and how each was found missing."""


def halt(
    link: LeaderLink, timeout_s: float, find_silent: FindSilent, *, tp_size: int = 1
) -> RollCall:
    """End the present group at all ranks.

    Tensor-parallel peers of a lost rank are not waited for: they may be in a wait for it that only
    its deadline ends, and are of no use without it.

    Args:
        timeout_s: longer than a rank that lives is ever busy between two looks at its link.
        tp_size: ranks of a tensor-parallel group.
    """
    present: set[int] = set()
    absent: dict[int, str] = {}
    doubts = _Doubts(link, find_silent)
    for rank in link.ranks:
        try:
            link.send(rank, FrameKind.HALT, b"", _SEND_TIMEOUT_S)
        except OSError:
            absent[rank] = _ENDED
    deadline_s = time.monotonic() + timeout_s
    while missing := set(link.ranks) - present - set(absent):
        groups_lost = {rank // tp_size for rank in absent}
        awaited = {rank for rank in missing if rank // tp_size not in groups_lost}
        if not awaited:
            absent |= dict.fromkeys(missing, _USELESS)
            break
        left_s = deadline_s - time.monotonic()
        if left_s <= 0.0:
            absent |= dict.fromkeys(missing, _STOPPED)
            break
        frame = link.receive(doubts.patience_s(awaited, left_s))
        if frame is None:
            absent |= dict.fromkeys(doubts.resolve(awaited), _STOPPED)
            continue
        rank, kind, payload = frame
        if kind is None:
            absent[rank] = _ENDED
        elif kind is FrameKind.HALTED:
            present.add(rank)
        elif kind is FrameKind.FAULT:
            link.fault(payload)
    return RollCall(present=tuple(sorted(present - set(absent))), absent=absent)


def gather(
    link: LeaderLink,
    gatherings: Mapping[int, Gathering],
    timeout_s: float,
    find_silent: FindSilent,
) -> dict[int, Gathered]:
    """Have all ranks of a link meet under a new epoch.

    Args:
        gatherings: what each rank of the link is told.

    Raises:
        WorkerDiedError: a rank is gone or stopped; those are the link's `suspects` then.
        CollectiveTimeoutError: not all have answered in time.
        PenstockError: the root cause that a rank gave for staying away.
    """
    for rank, gathering in gatherings.items():
        with suppress(OSError):  # whoever is gone is noticed below
            link.send(rank, FrameKind.GATHER, wire.encode(gathering), _SEND_TIMEOUT_S)
    answers: dict[int, Gathered] = {}
    link.suspects.clear()
    doubts = _Doubts(link, find_silent)
    deadline_s = time.monotonic() + timeout_s
    while missing := set(gatherings) - set(answers):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0.0:
            raise CollectiveTimeoutError(
                f"Ranks {sorted(missing)} did not join the new group within {timeout_s:.0f} s."
            )
        frame = link.receive(doubts.patience_s(missing, left_s))
        if frame is None:
            if lost := doubts.resolve(missing):
                link.suspects |= lost
                names = " and ".join(map(link.describe, sorted(lost)))
                raise WorkerDiedError(
                    f"{names} gave no sign of life while a new group was made.",
                    "It is stopped, or its node cannot be reached.",
                )
            continue
        rank, kind, payload = frame
        if kind is None:
            raise WorkerDiedError(f"{link.describe(rank)} ended while a new group was made.")
        if kind is FrameKind.FAULT:
            raise link.fault(payload)
        if kind is FrameKind.GATHERED:
            answers[rank] = wire.decode_gathered(payload)
    return answers


class _Doubts:
    """Counts the questions that ranks have left unanswered, one after another."""

    def __init__(self, link: LeaderLink, find_silent: FindSilent) -> None:
        self._link = link
        self._find_silent = find_silent
        self._unanswered: dict[int, int] = {}

    def patience_s(self, awaited: Collection[int], left_s: float) -> float:
        """How long to listen before asking: not at all where all are suspected, or where somebody
        has been asked without an answer."""
        if self._unanswered or set(awaited) <= self._link.suspects:
            return 0.0
        return min(_SUSPICION_S, left_s)

    def resolve(self, awaited: Collection[int]) -> set[int]:
        """Ask all of them; those that are lost. A suspect that answers is none any more."""
        suspects = set(awaited) & self._link.suspects
        all_suspected = suspects == set(awaited)
        silent = set(self._find_silent(awaited, _CONFIRMATION_S if all_suspected else _QUESTION_S))
        self._link.suspects -= suspects - silent
        self._unanswered = {rank: self._unanswered.get(rank, 0) + 1 for rank in silent}
        return {rank for rank in silent if rank in suspects or self._unanswered[rank] > 1}
