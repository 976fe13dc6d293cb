"""A worker's end of the step channel: plans in, results and faults out."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from cluster.base.errors import WorkerDiedError
from replicas.worker import wire
from replicas.worker.frames import (
    NEARLY_DONE,
    RESULT,
    STOP,
    FrameKind,
    FrameSocket,
    LinkAddress,
    Payload,
)
from replicas.worker.gathering import Gathered


class WorkerLink:
    """A worker's end."""

    def __init__(self, sock: FrameSocket, rank: int) -> None:
        self._sock = sock
        self._rank = rank
        self._sending = threading.Lock()
        self.waited_s = 0.0
        """How long the last order was waited for; next to nothing where it was there already."""

    @classmethod
    def connect(
        cls, address: LinkAddress, *, rank: int, epoch: str, secret: str, timeout_s: float
    ) -> WorkerLink:
        """Join the leader at `address`.

        Raises:
            WorkerDiedError: the leader cannot be reached.
        """
        family = socket.AF_UNIX if address.path else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect(address.path if address.path else (address.host, address.port))
            frames = FrameSocket(sock, reads_ahead=True)
            hello = wire.Hello(rank=rank, epoch=epoch, secret=secret)
            frames.send(FrameKind.HELLO, wire.encode(hello), timeout_s)
        except OSError as error:
            raise WorkerDiedError(f"Rank {rank} cannot reach its leader: {error}.") from error
        return cls(frames, rank)

    def receive_plan(self) -> Payload | None:
        """The next plan's bytes; None when the leader said stop or is gone."""
        order = self.receive_order(None)
        return order[1] if order is not None and order[0] is FrameKind.PLAN else None

    def has_order(self) -> bool:
        """Whether the leader has said something, or is gone; never waits."""
        return self._sock.is_readable()

    def receive_order(self, timeout_s: float | None) -> tuple[FrameKind, Payload] | None:
        """The next frame but STOP; None when the leader said that or is gone.

        Raises:
            TimeoutError: the leader has said nothing for so long.
        """
        started_s = time.perf_counter()
        try:
            kind, payload = self._sock.receive(timeout_s)
        except TimeoutError:
            raise
        except OSError:
            return None
        self.waited_s = time.perf_counter() - started_s
        return None if kind is STOP else (kind, payload)

    def send_halted(self) -> None:
        """Nothing of the epoch that ends follows; raises OSError when the leader is gone."""
        with self._sending:
            self._sock.send(FrameKind.HALTED, b"", timeout_s=30.0)

    def send_gathered(self, gathered: Gathered) -> None:
        """This rank's groups stand; raises OSError when the leader is gone."""
        with self._sending:
            self._sock.send(FrameKind.GATHERED, wire.encode(gathered), timeout_s=30.0)

    def send_result(self, payload: bytes) -> None:
        """Send an encoded result; raises OSError when the leader is gone."""
        with self._sending:
            self._sock.send(RESULT, payload, timeout_s=30.0)

    def send_nearly_done(self) -> None:
        """Tell the leader that the step's layers are computed; raises OSError when it is gone."""
        with self._sending:
            self._sock.send(NEARLY_DONE, b"", timeout_s=30.0)

    def send_fault(self, error: dict[str, str | None], lost: tuple[int, ...] = ()) -> None:
        """Tell the leader why this rank or its group has ended; best effort, from any thread."""
        fault = wire.Fault(rank=self._rank, error=error, lost=lost)
        # A leader that is gone will not miss it.
        with contextlib.suppress(OSError), self._sending:
            self._sock.send(FrameKind.FAULT, wire.encode(fault), timeout_s=2.0)

    def close(self) -> None:
        """Close this end; safe to call twice."""
        self._sock.close()
