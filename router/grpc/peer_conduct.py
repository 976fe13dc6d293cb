"""What a client may do on its connection, and the account of what it did; pure."""

from __future__ import annotations

from dataclasses import dataclass

import h2.events


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Bounds of one client's connection."""

    max_message_bytes: int
    max_metadata_bytes: int = 16 * 1024
    """Names, values and 32 bytes each, as HTTP/2 counts. Above it a call is refused."""
    hard_metadata_bytes: int = 128 * 1024
    """Above it the connection ends."""
    max_streams: int = 1024
    handshake_timeout_s: float = 10.0
    """... for the HTTP/2 preface and the client's first settings."""
    request_timeout_s: float = 30.0
    """... for the one message of a call that takes one."""
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
    max_idle_frames: int = 1000
    """Frames that carry nothing of a call (settings, priorities, empty data), beyond
    `idle_frames_per_s` of them a second."""
    idle_frames_per_s: float = 1000.0
    receive_window_bytes: int = 1 << 20
    max_unsent_bytes: int = 1 << 20
    """What may wait for a client that makes the server answer and does not read."""


class _Allowance:
    """A bucket that leaks: so many at once, and so many a second."""

    def __init__(self, at_once: int, per_s: float, now_s: float) -> None:
        self._at_once, self._per_s = at_once, per_s
        self._level, self._at_s = 0.0, now_s

    def takes_one(self, now_s: float) -> bool:
        leaked = (now_s - self._at_s) * self._per_s
        self._level = max(0.0, self._level - leaked) + 1.0
        self._at_s = now_s
        return self._level <= self._at_once


class PeerConduct:
    """Counts what a client makes the server do without asking for an answer."""

    def __init__(self, limits: ConnectionLimits, now_s: float) -> None:
        self._limits = limits
        self._last_ping_s = float("-inf")
        self._strikes = 0
        self._resets = _Allowance(limits.max_resets, limits.resets_per_s, now_s)
        self._idle = _Allowance(limits.max_idle_frames, limits.idle_frames_per_s, now_s)

    def note_answer(self) -> None:
        """Something of a call was sent: earlier pings are forgiven (gRFC A8)."""
        self._strikes = 0
        self._last_ping_s = float("-inf")

    def offence(self, event: h2.events.Event, now_s: float) -> str:
        """Count what came; not empty, and saying why, when it is enough to end the connection."""
        match event:
            case h2.events.StreamReset() if not self.allows_reset(now_s):
                return "too many calls were reset"
            case h2.events.PingReceived() if not self.allows_ping(now_s):
                return "too_many_pings"
            case h2.events.DataReceived(data=data, stream_ended=end) if not data and end is None:
                is_idle = True
            case h2.events.RemoteSettingsChanged() | h2.events.PriorityUpdated():
                is_idle = True
            case _:
                is_idle = False
        return "too_many_idle_frames" if is_idle and not self.allows_idle_frame(now_s) else ""

    def allows_ping(self, now_s: float) -> bool:
        """Count a ping; False when there were too many."""
        if now_s - self._last_ping_s < self._limits.min_ping_interval_s:
            self._strikes += 1
        self._last_ping_s = now_s
        return self._strikes <= self._limits.max_ping_strikes

    def allows_reset(self, now_s: float) -> bool:
        """Count a call that the client ended; False when there were too many (CVE-2023-44487)."""
        return self._resets.takes_one(now_s)

    def allows_idle_frame(self, now_s: float) -> bool:
        """Count a frame that asks for nothing; False when there were too many (CVE-2019-9515)."""
        return self._idle.takes_one(now_s)
