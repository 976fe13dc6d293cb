"""The leader's end of the step channel: one framed socket to each worker rank.

Ray is not involved in a step: it costs two system calls a worker. Every rank is watched while
rank 0's answer is awaited, so the end of any of them is seen at once, with its root cause.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterable, Mapping, Sequence

from cluster.base.errors import (
    CollectiveTimeoutError,
    PenstockError,
    WorkerDiedError,
    error_from_dict,
)
from replicas.worker import wire
from replicas.worker.frames import NEARLY_DONE, PLAN, RESULT, FrameKind, FrameSocket, Payload

_ACCOUNT_S = 1.0
_NAP_S = 100e-6
_MOST_NAPS = 16


class LeaderLink:
    """The leader's end: plans out to all ranks, results and faults back from any.

    Args:
        peers: the socket to each rank, ascending.
        size: ranks of the replica; some may not be there.
        nodes: node of each of them, where they watch each other.
    """

    def __init__(
        self, peers: Mapping[int, FrameSocket], size: int, nodes: Sequence[str] = ()
    ) -> None:
        self._peers = dict(peers)
        self._size = size
        self._nodes = nodes
        self._rank_of = {peer.fileno(): rank for rank, peer in peers.items()}
        self._poll = select.poll()
        for peer in peers.values():
            self._poll.register(peer.fileno(), select.POLLIN)
        self._first = next(iter(peers.values()))
        self.suspects: set[int] = set()
        """Ranks that others have reported gone or stopped."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks at the other ends."""
        return tuple(self._peers)

    def describe(self, rank: int) -> str:
        """How messages name a rank."""
        node = f" (node {self._nodes[rank]})" if self._nodes else ""
        return f"Worker rank {rank} of {self._size}{node}"

    def merged(self, other: LeaderLink) -> LeaderLink:
        """One link to the ranks of both, which are not to be used any more themselves; where ranks
        are is what the other, the newer one, says."""
        peers = self._peers | other._peers
        return LeaderLink({rank: peers[rank] for rank in sorted(peers)}, self._size, other._nodes)

    def drop(self, ranks: Iterable[int]) -> None:
        """Close the sockets of ranks that are lost or let go."""
        for rank in ranks:
            peer = self._peers.pop(rank, None)
            if peer is None:
                continue
            del self._rank_of[peer.fileno()]
            self._forget(peer.fileno())
            peer.close()
        self._first = next(iter(self._peers.values()), self._first)

    def send(self, rank: int, kind: FrameKind, payload: bytes, timeout_s: float) -> None:
        """Send one frame to one rank; raises as `FrameSocket.send`."""
        self._peers[rank].send(kind, payload, timeout_s)

    def receive(self, timeout_s: float) -> tuple[int, FrameKind | None, Payload] | None:
        """The next frame of any rank, with no kind when that rank is gone; None at the deadline."""
        ready = self._poll.poll(max(0.0, timeout_s) * 1e3)
        if not ready:
            return None
        fd, _ = ready[0]
        rank = self._rank_of[fd]
        try:
            kind, payload = self._peers[rank].receive(timeout_s=1.0)
        except OSError:
            self._forget(fd)
            return rank, None, b""
        return rank, kind, payload

    def send_plan(self, payload: bytes, timeout_s: float) -> None:
        """Send one encoded plan to every rank.

        Raises:
            WorkerDiedError: a rank's socket is closed.
            CollectiveTimeoutError: a rank does not read.
        """
        self.send_plans([payload] * len(self._peers), timeout_s)

    def send_plans(self, payloads: Sequence[bytes], timeout_s: float) -> None:
        """Send every rank its own encoded plan; raises as `send_plan`."""
        for (rank, peer), payload in zip(self._peers.items(), payloads, strict=True):
            try:
                peer.send(PLAN, payload, timeout_s)
            except TimeoutError:
                raise CollectiveTimeoutError(
                    f"{self.describe(rank)} did not take the step plan within {timeout_s:.0f} s."
                ) from None
            except OSError as error:
                raise self._last_words(rank) from error

    def wait_readable(self, timeout_s: float) -> bool:
        """Whether a rank has something to say, or is gone, within `timeout_s` seconds.

        Also ends, with False, when rank 0 says that its step is nearly done. The poll of the
        system counts in milliseconds; the rest of the time is slept, so an event near the end of
        it may be seen that much late.
        """
        whole_ms, rest_ms = divmod(timeout_s * 1e3, 1.0)
        if self._poll.poll(whole_ms):
            return self._has_more_than_a_sign()
        if rest_ms > 0.0:
            time.sleep(rest_ms * 1e-3)
            return bool(self._poll.poll(0)) and self._has_more_than_a_sign()
        return False

    def nap(self) -> None:
        """Sleep, for a few milliseconds at most, until a rank has more to say than a sign.

        For who is in no hurry: a rank that answers pays for waking whoever waits on its socket (45
        us right after it has read its weights through the caches); now there is nobody to wake.
        """
        for _ in range(_MOST_NAPS):
            if self._poll.poll(0) and self._has_more_than_a_sign():
                return
            time.sleep(_NAP_S)

    def receive_result(self, timeout_s: float) -> Payload:
        """The next result of rank 0; raises as `receive_from_any`."""
        return self.receive_from_any(timeout_s)[1]

    def receive_from_any(self, timeout_s: float) -> tuple[int, Payload]:
        """The next result and the rank that gave it, while watching every rank.

        Raises:
            WorkerDiedError: a rank's socket closed.
            CollectiveTimeoutError: nothing within `timeout_s` seconds.
            PenstockError: the root cause that a failing rank reported.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            ready = self._poll.poll(max(0.0, left_s) * 1e3)
            if not ready:
                raise CollectiveTimeoutError(
                    f"The workers did not finish a step within {timeout_s:.1f} s.",
                    "A rank may be stopped or its machine overloaded; "
                    "raise limits.step_timeout if steps are really that long.",
                )
            # Rank 0 last: a fault elsewhere explains a missing or broken result.
            for fd, _ in sorted(ready, key=lambda item: -self._rank_of[item[0]]):
                payload = self._read_from(self._rank_of[fd])
                if payload is not None:
                    return self._rank_of[fd], payload

    def fault(self, payload: Payload) -> PenstockError:
        """The error that a rank reported, with the rank in its cause; notes whom it suspects."""
        fault = wire.decode_fault(payload)
        self.suspects |= set(fault.lost)
        fields = dict(fault.error)
        fields["cause"] = f"Worker rank {fault.rank}: {fields.get('cause')}"
        return error_from_dict(fields)

    def stop(self) -> None:
        """Ask every rank to leave its loop, then close."""
        for peer in self._peers.values():
            try:
                peer.send(FrameKind.STOP, b"", timeout_s=1.0)
            except OSError:
                continue  # that rank is already gone
        self.close()

    def close(self) -> None:
        """Close all sockets: the workers see EOF and exit."""
        for peer in self._peers.values():
            peer.close()

    def _has_more_than_a_sign(self) -> bool:
        """Take in rank 0's NEARLY_DONE; whether anything is left to read."""
        try:
            return not self._first.skip(NEARLY_DONE) or bool(self._poll.poll(0))
        except OSError:
            return True  # a socket that fails is for the reader to explain

    def _read_from(self, rank: int) -> Payload | None:
        try:
            kind, payload = self._peers[rank].receive(timeout_s=10.0)
        except OSError as error:
            raise self._lost(rank, f" ({error})") from error
        if kind is RESULT:
            return payload
        if kind is FrameKind.FAULT:
            raise self.fault(payload)
        return None

    def _last_words(self, rank: int) -> PenstockError:
        """Why a rank is gone: its fault report if one is in the socket, else that it died."""
        try:
            while True:
                kind, payload = self._peers[rank].receive(timeout_s=0.05)
                if kind is FrameKind.FAULT:
                    return self.fault(payload)
        except OSError:
            return self._lost(rank)

    def _lost(self, rank: int, detail: str = "") -> WorkerDiedError:
        """The end of a rank; where peers watch each other, with what the first of them saw."""
        cause = f"{self.describe(rank)} is gone{detail}."
        account = self._account_of(rank) if self._nodes else None
        if account is not None:
            cause = f"{cause} {account.cause}"
        return WorkerDiedError(cause, "The replica restarts by itself; retry the request.")

    def _account_of(self, lost: int) -> PenstockError | None:
        """The first fault that a peer of a lost rank reports within a moment."""
        self._forget(self._peers[lost].fileno())
        deadline_s = time.monotonic() + _ACCOUNT_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left_s * 1e3):
                try:
                    kind, payload = self._peers[self._rank_of[fd]].receive(timeout_s=0.5)
                except OSError:
                    self._forget(fd)  # gone without a word
                    continue
                if kind is FrameKind.FAULT:
                    return self.fault(payload)
        return None

    def _forget(self, fd: int) -> None:
        """Poll a socket no more; safe to call twice."""
        with contextlib.suppress(KeyError):
            self._poll.unregister(fd)
