"""Where a leader waits for the ranks of its step link: each says hello and proves its epoch."""

from __future__ import annotations

import hmac
import os
import socket
import time
from collections.abc import Sequence

from cluster.base.errors import CollectiveTimeoutError, InternalError
from cluster.base.own_folder import OwnFolder
from replicas.worker import wire
from replicas.worker.frames import FrameKind, FrameSocket, LinkAddress
from replicas.worker.leader_link import LeaderLink

_ACCEPT_SLICE_S = 0.5


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
        ranks: Sequence[int] = (),
    ) -> None:
        """Listen for `size` workers; on `host` over TCP, or on a private unix socket if None.

        `nodes` names the node of each of the `size` ranks of the replica, where the ranks watch
        each other (expert parallelism). `ranks` are those to come; none: all.
        """
        self._size = size
        self._ranks = frozenset(ranks or range(size))
        self._nodes = tuple(nodes)
        self._epoch = epoch
        self.secret = secret
        self._folder: OwnFolder | None = None
        if host is None:
            self._folder = OwnFolder("link")
            path = str(self._folder.path / "leader.sock")
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
        while len(peers) < len(self._ranks):
            connection = self._accept(deadline_s)
            if connection is None:
                missing = sorted(self._ranks - set(peers))
                for peer in peers.values():
                    peer.close()
                raise CollectiveTimeoutError(
                    f"Worker ranks {missing} did not connect within {timeout_s:.0f} s.",
                    "See their logs in the Ray dashboard.",
                )
            peer = FrameSocket(connection)
            rank = self._greet(peer)
            if rank is None or rank not in self._ranks or rank in peers:
                peer.close()
            else:
                peers[rank] = peer
        by_rank = {rank: peers[rank] for rank in sorted(peers)}
        return LeaderLink(by_rank, self._size, self._nodes)

    def close(self) -> None:
        """Stop listening; an accepted link stays open."""
        self._sock.close()
        if self._folder is not None:
            self._folder.close()
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
