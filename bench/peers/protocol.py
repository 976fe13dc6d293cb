"""What a benchmark asks of an engine, ours or a peer's: offline batches and an HTTP server.

A case holds several `Engine`s and never knows which is which. An engine that cannot do what is
asked on this machine says why; the benchmark writes that reason where the number would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from bench.random_checkpoint import RandomCheckpoint


class PeerError(Exception):
    """A peer is not there, did not start or did not answer; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Random prompts of one length, all at once, greedy, end-of-sequence ignored."""

    size: int
    prompt_tokens: int
    new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTimes:
    """Prefill: to the moment when all have their first token. Decode: the rest."""

    prefill_s: float
    decode_s: float
    decode_tokens: int
    """New tokens of all requests in `decode_s`."""
    ledger_ms: Mapping[str, float] = field(default_factory=dict)
    """A decode step by its parts, from an engine that tells."""

    def prefill_rate(self, batch: Batch) -> float:
        """Prompt tokens per second."""
        return batch.size * batch.prompt_tokens / self.prefill_s

    @property
    def decode_rate(self) -> float:
        """New tokens per second once all requests decode."""
        return self.decode_tokens / self.decode_s


class Offline(Protocol):
    """A loaded model that runs batches one after the other."""

    def run(self, batch: Batch) -> BatchTimes:
        """Run one batch.

        Raises:
            PeerError: it did not answer.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that is ready: where it listens and what it calls the model."""

    target: str
    """HOST:PORT of an OpenAI-compatible HTTP server."""
    model: str
    start_s: float


class Engine(Protocol):
    """One engine on one machine."""

    @property
    def name(self) -> str:
        """As in tables."""
        ...

    def why_not(self, *, online: bool) -> str:
        """Why it cannot be measured here; empty when it can."""
        ...

    def offline(self, checkpoint: RandomCheckpoint) -> AbstractContextManager[Offline]:
        """Load a checkpoint.

        Raises:
            PeerError: it does not start.
        """
        ...

    def serve(self, checkpoint: RandomCheckpoint) -> AbstractContextManager[Server]:
        """Start its own OpenAI-compatible server.

        Raises:
            PeerError: it does not start.
        """
        ...
