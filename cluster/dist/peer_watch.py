"""Finds out who is at fault when a transfer does not come, and ends the group for that reason.

One watch per rank and epoch. A thread looks at the transfer being waited for; once that has lasted
`SUSPICION_S` it asks all peers (probe.py) until the transfer ends or a verdict stands:

    0 ........ 1.0 s   nothing is sent
    1.0 s ..           ask every second; a peer whose port is closed is gone, at once
    1.0 + 2 * 1.2 s    a peer that left two questions unanswered is stopped or unreachable
    timeout_s          all answer: whoever is behind is late

A verdict breaks every pending transfer of this rank through the `breakers` (a gloo wait cannot be
ended otherwise) and is told to all peers before it is raised.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.base.errors import (
    CollectiveTimeoutError,
    PenstockError,
    WorkerDiedError,
    error_from_dict,
)
from cluster.dist.probe import Answer, RankState, Responder, ask
from cluster.dist.rank_topology import RankTopology

if TYPE_CHECKING:
    from collections.abc import Iterator

SUSPICION_S = 1.0
PROBE_TIMEOUT_S = 1.2
TICK_S = 0.2
DIAGNOSIS_S = 4.0
"""How long a broken connection is looked into before it is reported without a name."""
TELL_TIMEOUT_S = 0.3


class PeerWatch:
    """The failure detector of one rank; usable after `meet`.

    Args:
        rank: this rank.
        topology: of the whole group; names ranks in messages.
        host: this rank's own address.
        key: shared by the members of this epoch.
        timeout_s: deadline of a wait whose peers all live.
    """

    def __init__(
        self, *, rank: int, topology: RankTopology, host: str, key: str, timeout_s: float
    ) -> None:
        self._rank = rank
        self._topology = topology
        self._key = key
        self._timeout_s = timeout_s
        self._peers: dict[int, tuple[str, int]] = {}
        self._breakers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._failure: PenstockError | None = None
        self._lost: tuple[int, ...] = ()
        self._waiting = ""
        self._last = ""
        self._since_s = time.monotonic()
        self._num_waits = 0
        self._stop = threading.Event()
        self._responder = Responder(
            host=host, key=key, state=self._state, on_failure=self._told_by_peer
        )
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        """Where peers ask."""
        return self._responder.address

    @property
    def failure(self) -> PenstockError | None:
        """Why the group has ended; None while it has not."""
        return self._failure

    @property
    def lost(self) -> tuple[int, ...]:
        """Ranks that this one's own verdict found gone or stopped, by name; a peer's says none."""
        return tuple(self._topology.name(rank) for rank in self._lost)

    def meet(self, addresses: Mapping[int, tuple[str, int]]) -> None:
        """Learn where every rank answers, and begin to watch."""
        self._peers = {rank: where for rank, where in addresses.items() if rank != self._rank}
        self._thread.start()

    def add_breaker(self, breaker: Callable[[], None]) -> None:
        """`breaker` makes all pending transfers of one group fail; called at most once."""
        self._breakers.append(breaker)

    def check(self) -> None:
        """Raise what has ended the group, if anything has."""
        if self._failure is not None:
            raise error_from_dict(self._failure.to_dict())

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Watch a wait; an error of the transport inside becomes one with a name.

        Raises:
            WorkerDiedError, CollectiveTimeoutError: as described at the top.
        """
        self.check()
        self._since_s = time.monotonic()
        self._waiting = what
        try:
            yield
        except RuntimeError as error:
            if self._failure is None:
                self._fail(self._diagnose(what, str(error)))
            self.check()
            raise  # a closed watch takes no more failures
        finally:
            self._last, self._waiting = what, ""
            self._num_waits += 1
            self._since_s = time.monotonic()

    def close(self) -> None:
        """Stop watching and answering; safe to call twice. Breakers have ended when it returns."""
        self._stop.set()
        self._responder.close()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _state(self) -> RankState:
        return RankState(
            num_waits=self._num_waits,
            waiting_for=self._waiting,
            since_s=time.monotonic() - self._since_s,
            last=self._last,
            failure=self._failure.to_dict() if self._failure else None,
        )

    def _told_by_peer(self, failure: dict[str, str | None]) -> None:
        self._fail(error_from_dict(failure), tell=False)

    def _watch(self) -> None:
        silent: dict[int, int] = {}
        while not self._stop.wait(TICK_S) and self._failure is None:
            what, since_s = self._waiting, self._since_s
            waited_s = time.monotonic() - since_s
            if not what or waited_s < SUSPICION_S:
                silent.clear()
                continue
            asked_s = time.monotonic()
            answers = ask(self._peers, self._key, timeout_s=PROBE_TIMEOUT_S)
            if self._since_s != since_s or self._stop.is_set():
                silent.clear()
                continue
            silent = {
                rank: silent.get(rank, 0) + 1
                for rank, answer in answers.items()
                if answer.state is None and not answer.gone
            }
            if verdict := self._verdict(what, answers, silent):
                self._fail(verdict)
            elif waited_s >= self._timeout_s:
                self._fail(self._late(what, answers))
            else:
                self._stop.wait(
                    max(0.0, min(1.0, self._timeout_s - waited_s) - (time.monotonic() - asked_s))
                )

    def _verdict(
        self, what: str, answers: Mapping[int, Answer], silent: Mapping[int, int]
    ) -> PenstockError | None:
        for answer in answers.values():
            if answer.state is not None and answer.state.failure is not None:
                return error_from_dict(answer.state.failure)
        me = self._topology.describe(self._rank)
        if gone := [rank for rank, answer in answers.items() if answer.gone]:
            self._lost = tuple(gone)
            return WorkerDiedError(
                f"{self._names(gone)} ended while {me} waited in {what}.",
                "Its own log holds the reason.",
            )
        if mute := [rank for rank, times in silent.items() if times > 1]:
            self._lost = tuple(mute)
            waited_s = time.monotonic() - self._since_s
            return WorkerDiedError(
                f"{self._names(mute)} gave no sign of life while {me} waited {waited_s:.1f} s "
                f"in {what}.",
                "It is stopped, or its node cannot be reached.",
            )
        return None

    def _late(self, what: str, answers: Mapping[int, Answer]) -> PenstockError:
        states = {rank: a.state for rank, a in answers.items() if a.state is not None}
        computing = {rank: state for rank, state in states.items() if not state.waiting_for}
        behind = computing or states
        me = self._topology.describe(self._rank)
        prefix = f"{me} waited {self._timeout_s:g} s in {what}"
        if not behind:
            return CollectiveTimeoutError(f"{prefix}.")
        rank = min(behind, key=lambda other: (behind[other].num_waits, other))
        state = behind[rank]
        doing = (
            f"it waits in {state.waiting_for}"
            if state.waiting_for
            else (
                f"it has been computing for {state.since_s:.1f} s after {state.last or 'the start'}"
            )
        )
        return CollectiveTimeoutError(
            f"{prefix} for {self._topology.describe(rank)}: {doing}.",
            "Raise the collective timeout if steps may take that long.",
        )

    def _diagnose(self, what: str, text: str) -> PenstockError:
        """A verdict on a connection that broke; the peer may need a moment to be seen as gone."""
        silent: dict[int, int] = {}
        give_up_s = time.monotonic() + DIAGNOSIS_S
        while time.monotonic() < give_up_s and self._failure is None:
            answers = ask(self._peers, self._key, timeout_s=PROBE_TIMEOUT_S)
            for rank, answer in answers.items():
                if answer.state is None and not answer.gone:
                    silent[rank] = silent.get(rank, 0) + 1
            if verdict := self._verdict(what, answers, silent):
                return verdict
            time.sleep(0.1)
        if self._failure is not None:
            return self._failure
        me = self._topology.describe(self._rank)
        return WorkerDiedError(f"A connection of {me} broke in {what} ({text.splitlines()[0]}).")

    def _fail(self, failure: PenstockError, *, tell: bool = True) -> None:
        with self._lock:
            if self._failure is not None or self._stop.is_set():
                return
            self._failure = failure
        if tell:
            ask(self._peers, self._key, timeout_s=TELL_TIMEOUT_S, failure=failure.to_dict())
        for breaker in self._breakers:
            breaker()

    def _names(self, ranks: list[int]) -> str:
        names = [self._topology.describe(rank) for rank in ranks]
        joined = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return joined[0].upper() + joined[1:]
