"""A peer that was not chosen: it keeps its rows, with that as the reason."""

from __future__ import annotations

from typing import NoReturn

from bench.peers.protocol import PeerError
from bench.random_checkpoint import RandomCheckpoint

REASON = "left out of this run with --peers"


class LeftOut:
    """See `Engine`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, *, online: bool) -> str:
        """See `Engine`."""
        return REASON

    def offline(self, checkpoint: RandomCheckpoint) -> NoReturn:
        """See `Engine`."""
        raise PeerError(REASON)

    def serve(self, checkpoint: RandomCheckpoint) -> NoReturn:
        """See `Engine`."""
        raise PeerError(REASON)
