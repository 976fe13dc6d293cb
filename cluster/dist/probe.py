"""Asking a peer how it is, beside the data path: gloo does not say which peer is silent or gone.

Each rank answers on a TCP port of its own, from a thread that works while the rank computes or
waits. Nothing is sent while all goes well: a rank asks only when it has waited long. A refused
connection means that the process is gone, no answer that it is stopped or unreachable. A rank that
found a culprit tells all others, so that they name the same one and not whoever gave up first.

Torch-free. One line of JSON each way; a key that only the group's members know goes first.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

CONNECTION_TIMEOUT_S = 1.0
_MAX_LINE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """What a rank says of itself."""

    num_waits: int
    """Waits it has ended; who has the fewest is behind."""
    waiting_for: str = ""
    """The operation it waits in; empty while it computes."""
    since_s: float = 0.0
    """How long it has been at that."""
    last: str = ""
    """The operation it waited in before."""
    failure: dict[str, str | None] | None = None
    """`PenstockError.to_dict()` of what ended the group for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of asking one peer: a state, or one of two kinds of silence."""

    state: RankState | None = None
    gone: bool = False
    """Nobody listens there any more: the process has ended."""


class Responder:
    """Answers for one rank until `close`; usable when the constructor returns.

    Args:
        host: this rank's own address.
        key: what a message must begin with to be believed.
        state: called for each question, from the responder's thread.
        on_failure: called with what a peer says has ended the group.
    """

    def __init__(
        self,
        *,
        host: str,
        key: str,
        state: Callable[[], RankState],
        on_failure: Callable[[dict[str, str | None]], None],
    ) -> None:
        self._key = key
        self._state = state
        self._on_failure = on_failure
        self._listener = socket.create_server((host, 0), family=_family(host), backlog=256)
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="peer-responder", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where peers find it."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def close(self) -> None:
        """Stop answering; safe to call twice."""
        self._closed = True
        # close() alone does not wake a thread in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(CONNECTION_TIMEOUT_S)

    def _serve(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(CONNECTION_TIMEOUT_S)
                try:
                    self._answer(connection)
                except (OSError, ValueError):
                    continue  # a peer that gave up, or a stranger: its loss

    def _answer(self, connection: socket.socket) -> None:
        message = _read_line(connection)
        if message.get("key") != self._key:
            return
        connection.sendall(_line(asdict(self._state())))
        if message.get("failure"):
            self._on_failure(message["failure"])


def ask(
    peers: Mapping[int, tuple[str, int]],
    key: str,
    *,
    timeout_s: float = CONNECTION_TIMEOUT_S,
    failure: dict[str, str | None] | None = None,
) -> dict[int, Answer]:
    """Ask all peers at once; with `failure`, tell them what has ended the group as well."""
    if not peers:
        return {}
    line = _line({"key": key, "failure": failure})
    with ThreadPoolExecutor(max_workers=min(32, len(peers))) as pool:
        answers = pool.map(lambda address: _ask(address, line, timeout_s), peers.values())
        return dict(zip(peers, answers, strict=True))


def _ask(address: tuple[str, int], line: bytes, timeout_s: float) -> Answer:
    deadline_s = time.monotonic() + timeout_s
    try:
        with socket.create_connection(address, timeout=timeout_s) as connection:
            connection.settimeout(max(0.01, deadline_s - time.monotonic()))
            connection.sendall(line)
            return Answer(state=RankState(**_read_line(connection)))
    except ConnectionError:
        return Answer(gone=True)
    except (OSError, ValueError, TypeError):
        return Answer()


def _read_line(connection: socket.socket) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        piece = connection.recv(_MAX_LINE_BYTES)
        if not piece:
            raise ConnectionResetError("the peer closed before it had spoken")
        data += piece
        if len(data) > _MAX_LINE_BYTES:
            raise ValueError("no line of ours is that long")
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("not a message of ours")
    return message


def _line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
