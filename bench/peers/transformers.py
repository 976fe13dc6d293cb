"""Hugging Face transformers as a peer: `generate` in a process of its own; no server.

It is a test dependency of the project and runs in the project's environment.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from bench.peers.places import HOSTS, TRANSFORMERS, place_of
from bench.peers.processes import HostedBatches, child
from bench.peers.protocol import PeerError
from bench.random_checkpoint import RandomCheckpoint

NO_SERVER = "transformers serve takes neither token ids as a prompt nor ignore_eos"


class Transformers:
    """See `Engine`."""

    name = "transformers"

    def __init__(self, threads: int, cache_dir: Path | None = None) -> None:
        self._place = place_of(TRANSFORMERS, cache_dir)
        self._threads = threads

    def why_not(self, *, online: bool) -> str:
        """See `Engine`."""
        if online:
            return NO_SERVER
        return "" if find_spec("transformers") else "not installed (make setup)"

    @contextmanager
    def offline(self, checkpoint: RandomCheckpoint) -> Iterator[HostedBatches]:
        """See `Engine`."""
        self._place.root.mkdir(parents=True, exist_ok=True)
        log = self._place.root / "offline.log"
        command = [sys.executable, str(HOSTS / "transformers_host.py"), str(checkpoint.path)]
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(self._threads)}
        with child([*command, str(self._threads)], log, environment, piped=True) as process:
            yield HostedBatches(process, log)

    def serve(self, checkpoint: RandomCheckpoint) -> NoReturn:
        """See `Engine`."""
        raise PeerError(NO_SERVER)
