"""What a client may do on its connection, and the account of what it did; pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Bounds of one client's connection."""

    max_message_bytes: int
    max_metadata_bytes: int = 16 * 1024
    """Names, values and 32 bytes each, as HTTP/2 counts. Above it a call is refused."""
    hard_metadata_bytes: int = 128 * 1024
    """Above it the connection ends."""
    max_streams: int = 1024
    keepalive_s: float = 30.0
    """A connection silent for so long is pinged."""
    keepalive_timeout_s: float = 10.0
    """... and closed when nothing has come after so long."""
    min_ping_interval_s: float = 10.0
    max_ping_strikes: int = 2
    """Pings sooner than that after the one before, with nothing sent in between."""
    max_resets: int = 1000
    """Calls a client may have ended itself, beyond `resets_per_s` of them a second."""
    resets_per_s: float = 100.0
    receive_window_bytes: int = 1 << 20
    max_unsent_bytes: int = 1 << 20
    """What may wait for a client that makes the server answer and does not read."""


class PeerConduct:
    """Counts pings and resets of one client."""

    def __init__(self, limits: ConnectionLimits, now_s: float) -> None:
        self._limits = limits
        self._last_ping_s = float("-inf")
        self._strikes = 0
        self._resets = 0.0
        self._resets_at_s = now_s

    def note_answer(self) -> None:
        """Something of a call was sent: earlier pings are forgiven (gRFC A8)."""
        self._strikes = 0
        self._last_ping_s = float("-inf")

    def allows_ping(self, now_s: float) -> bool:
        """Count a ping; False when there were too many."""
        if now_s - self._last_ping_s < self._limits.min_ping_interval_s:
            self._strikes += 1
        self._last_ping_s = now_s
        return self._strikes <= self._limits.max_ping_strikes

    def allows_reset(self, now_s: float) -> bool:
        """Count a call that the client ended; False when there were too many (CVE-2023-44487)."""
        forgiven = (now_s - self._resets_at_s) * self._limits.resets_per_s
        self._resets = max(0.0, self._resets - forgiven) + 1.0
        self._resets_at_s = now_s
        return self._resets <= self._limits.max_resets
