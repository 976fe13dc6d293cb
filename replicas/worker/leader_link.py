"""The leader's end of the step channel: one framed socket to each worker rank.

Ray is not involved in a step: it costs two system calls a worker. Every rank is watched while
rank 0's answer is awaited, so the end of any of them is seen at once, with its root cause.
"""

from __future__ import annotations

import hmac
import os
import select
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.base.errors import (
    CollectiveTimeoutError,
    InternalError,
    PenstockError,
    WorkerDiedError,
    error_from_dict,
)
from replicas.worker import wire
from replicas.worker.frames import FrameKind, FrameSocket, LinkAddress

_ACCEPT_SLICE_S = 0.5
_ACCOUNT_S = 1.0
_NAP_S = 100e-6
_MOST_NAPS = 16


class LinkListener:
    """The leader's end before its workers have joined."""

    def __init__(
        self,
        *,
        size: int,
        epoch: str,
        secret: str,
        host: str | None = None,
        nodes: Sequence[str] = (),
    ) -> None:
        """Listen for `size` workers; on `host` over TCP, or on a private unix socket if None.

        `nodes` names the node of each rank, where the ranks watch each other (expert parallelism).
        """
        self._size = size
        self._nodes = tuple(nodes)
        self._epoch = epoch
        self.secret = secret
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if host is None:
            self._folder = tempfile.TemporaryDirectory(prefix="penstock-link-")
            path = str(Path(self._folder.name) / "leader.sock")
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sock.bind(path)
            os.chmod(path, 0o600)
            self.address = LinkAddress(path=path)
        else:
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._sock.bind((host, 0))
            self.address = LinkAddress(host=host, port=self._sock.getsockname()[1])
        self._sock.listen(size)

    def accept_all(self, timeout_s: float) -> LeaderLink:
        """Wait until every rank has said hello, then give the link.

        A connection that does not know the secret or belongs to another epoch is dropped.

        Raises:
            CollectiveTimeoutError: ranks are missing at the deadline, or when the listener was
                closed; names them.
        """
        deadline_s = time.monotonic() + timeout_s
        peers: dict[int, FrameSocket] = {}
        while len(peers) < self._size:
            connection = self._accept(deadline_s)
            if connection is None:
                missing = sorted(set(range(self._size)) - set(peers))
                for peer in peers.values():
                    peer.close()
                raise CollectiveTimeoutError(
                    f"Worker ranks {missing} did not connect within {timeout_s:.0f} s.",
                    "See their logs in the Ray dashboard.",
                )
            peer = FrameSocket(connection)
            rank = self._greet(peer)
            if rank is None or rank in peers:
                peer.close()
            else:
                peers[rank] = peer
        return LeaderLink([peers[rank] for rank in range(self._size)], self._nodes)

    def close(self) -> None:
        """Stop listening; an accepted link stays open."""
        self._sock.close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _accept(self, deadline_s: float) -> socket.socket | None:
        """The next connection; None at the deadline or once the listener is closed."""
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                # Closing a socket does not wake who waits on it: look again now and then.
                self._sock.settimeout(min(left_s, _ACCEPT_SLICE_S))
                return self._sock.accept()[0]
            except TimeoutError:
                continue
            except OSError:
                return None
        return None

    def _greet(self, peer: FrameSocket) -> int | None:
        try:
            kind, payload = peer.receive(timeout_s=5.0)
            hello = wire.decode_hello(payload)
        except (OSError, InternalError):
            return None
        trusted = hmac.compare_digest(hello.secret, self.secret) and hello.epoch == self._epoch
        return hello.rank if kind is FrameKind.HELLO and trusted else None


class LeaderLink:
    """The leader's end: plans out to all ranks, results and faults back from any."""

    def __init__(self, peers: list[FrameSocket], nodes: Sequence[str] = ()) -> None:
        self._peers = peers
        self._nodes = nodes
        self._rank_of = {peer.fileno(): rank for rank, peer in enumerate(peers)}
        self._poll = select.poll()
        for peer in peers:
            self._poll.register(peer.fileno(), select.POLLIN)

    def send_plan(self, payload: bytes, timeout_s: float) -> None:
        """Send one encoded plan to every rank.

        Raises:
            WorkerDiedError: a rank's socket is closed.
            CollectiveTimeoutError: a rank does not read.
        """
        self.send_plans([payload] * len(self._peers), timeout_s)

    def send_plans(self, payloads: Sequence[bytes], timeout_s: float) -> None:
        """Send every rank its own encoded plan; raises as `send_plan`."""
        for rank, (peer, payload) in enumerate(zip(self._peers, payloads, strict=True)):
            try:
                peer.send(FrameKind.PLAN, payload, timeout_s)
            except TimeoutError:
                raise CollectiveTimeoutError(
                    f"{self._name(rank)} did not take the step plan within {timeout_s:.0f} s."
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

    def receive_result(self, timeout_s: float) -> bytearray:
        """The next result of rank 0; raises as `receive_from_any`."""
        return self.receive_from_any(timeout_s)[1]

    def receive_from_any(self, timeout_s: float) -> tuple[int, bytearray]:
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

    def stop(self) -> None:
        """Ask every rank to leave its loop, then close."""
        for peer in self._peers:
            try:
                peer.send(FrameKind.STOP, b"", timeout_s=1.0)
            except OSError:
                continue  # that rank is already gone
        self.close()

    def close(self) -> None:
        """Close all sockets: the workers see EOF and exit."""
        for peer in self._peers:
            peer.close()

    def _has_more_than_a_sign(self) -> bool:
        """Take in rank 0's NEARLY_DONE; whether anything is left to read."""
        try:
            return not self._peers[0].skip(FrameKind.NEARLY_DONE) or bool(self._poll.poll(0))
        except OSError:
            return True  # a socket that fails is for the reader to explain

    def _read_from(self, rank: int) -> bytearray | None:
        try:
            kind, payload = self._peers[rank].receive(timeout_s=10.0)
        except OSError as error:
            raise self._lost(rank, f" ({error})") from error
        if kind is FrameKind.FAULT:
            raise _error_of(payload)
        return payload if kind is FrameKind.RESULT else None

    def _last_words(self, rank: int) -> PenstockError:
        """Why a rank is gone: its fault report if one is in the socket, else that it died."""
        try:
            while True:
                kind, payload = self._peers[rank].receive(timeout_s=0.05)
                if kind is FrameKind.FAULT:
                    return _error_of(payload)
        except OSError:
            return self._lost(rank)

    def _lost(self, rank: int, detail: str = "") -> WorkerDiedError:
        """The end of a rank; where peers watch each other, with what the first of them saw."""
        cause = f"{self._name(rank)} is gone{detail}."
        account = self._account_of(rank) if self._nodes else None
        if account is not None:
            cause = f"{cause} {account.cause}"
        return WorkerDiedError(cause, "The replica restarts by itself; retry the request.")

    def _account_of(self, lost: int) -> PenstockError | None:
        """The first fault that a peer of a lost rank reports within a moment."""
        self._poll.unregister(self._peers[lost].fileno())
        deadline_s = time.monotonic() + _ACCOUNT_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left_s * 1e3):
                try:
                    kind, payload = self._peers[self._rank_of[fd]].receive(timeout_s=0.5)
                except OSError:
                    self._poll.unregister(fd)  # gone without a word
                    continue
                if kind is FrameKind.FAULT:
                    return _error_of(payload)
        return None

    def _name(self, rank: int) -> str:
        node = f" (node {self._nodes[rank]})" if self._nodes else ""
        return f"Worker rank {rank} of {len(self._peers)}{node}"


def _error_of(payload: bytearray) -> PenstockError:
    """The error a rank reported, with the rank in its cause."""
    fault = wire.decode_fault(payload)
    fields = dict(fault.error)
    fields["cause"] = f"Worker rank {fault.rank}: {fields.get('cause')}"
    return error_from_dict(fields)
