"""llama.cpp as a peer: llama-bench, llama-batched-bench and llama-server on a bf16 GGUF.

Its benches load the model anew for each run and warm up by themselves. llama-batched-bench neither
samples nor detokenises: that is in its favour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.peers.places import HOSTS, LLAMA_CPP, Place, checkpoints_dir, place_of
from bench.peers.processes import BATCH_TIMEOUT_S, free_port, http_server
from bench.peers.protocol import Batch, BatchTimes, PeerError, Server
from bench.random_checkpoint import RandomCheckpoint

SLOTS = 16
SLOT_CONTEXT = 512


class LlamaCpp:
    """See `Engine`."""

    name = "llama.cpp"

    def __init__(self, threads: int, cache_dir: Path | None = None) -> None:
        self._place = place_of(LLAMA_CPP, cache_dir)
        self._threads = threads
        self._models = checkpoints_dir(cache_dir)

    def why_not(self, *, online: bool) -> str:
        """See `Engine`."""
        return self._place.why_not()

    @contextmanager
    def offline(self, checkpoint: RandomCheckpoint) -> Iterator[LlamaBatches]:
        """See `Engine`."""
        yield LlamaBatches(self._place, self._gguf(checkpoint), self._threads)

    @contextmanager
    def serve(self, checkpoint: RandomCheckpoint) -> Iterator[Server]:
        """See `Engine`."""
        port = free_port()
        command = [*_program(self._place, "llama-server"), "-m", str(self._gguf(checkpoint))]
        command += ["--alias", checkpoint.name, "--host", "127.0.0.1", "--port", str(port)]
        command += ["-t", str(self._threads), "-np", str(SLOTS), "-c", str(SLOTS * SLOT_CONTEXT)]
        log = self._place.root / "server.log"
        with http_server(command, log, {}, port=port, model=checkpoint.name) as server:
            yield server

    def _gguf(self, checkpoint: RandomCheckpoint) -> Path:
        """The converted checkpoint, made at first use."""
        target = self._models / f"{checkpoint.path.name}.gguf"
        if not target.is_file():
            print(f"  converting {checkpoint.name} for llama.cpp ...", flush=True)
            unfinished = target.with_suffix(".part")
            _finished(
                [
                    sys.executable,
                    str(HOSTS / "to_gguf.py"),
                    str(self._place.root / "source"),
                    str(checkpoint.path),
                    str(unfinished),
                ],
                {"PYTHONPATH": str(self._place.root / "python")},
            )
            unfinished.rename(target)
        return target


class LlamaBatches:
    """See `Offline`."""

    def __init__(self, place: Place, model: Path, threads: int) -> None:
        self._place = place
        self._common = ["-m", str(model), "-t", str(threads)]

    def run(self, batch: Batch) -> BatchTimes:
        """See `Offline`."""
        if batch.new_tokens == 1:
            return self._prefill(batch)
        command = [*_program(self._place, "llama-batched-bench"), *self._common]
        positions = batch.size * (batch.prompt_tokens + batch.new_tokens)
        command += ["-c", str(positions), "-b", "2048", "-ub", "512", "-npl", str(batch.size)]
        command += ["-npp", str(batch.prompt_tokens), "-ntg", str(batch.new_tokens)]
        command += ["--output-format", "jsonl"]
        return batched_times(_finished(command), batch)

    def _prefill(self, batch: Batch) -> BatchTimes:
        command = [*_program(self._place, "llama-bench"), *self._common, "-n", "0", "-r", "1"]
        command += ["-p", str(batch.prompt_tokens), "-o", "json"]
        [row] = json.loads(_finished(command))
        return BatchTimes(prefill_s=row["avg_ns"] / 1e9, decode_s=0.0, decode_tokens=0)


def batched_times(output: str, batch: Batch) -> BatchTimes:
    """The last line of llama-batched-bench, which counts every token it generates as decoded.

    Raises:
        PeerError: the output holds no result.
    """
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise PeerError(f"llama-batched-bench gave no result: {output[-200:]}")
    row: dict[str, Any] = json.loads(lines[-1])
    num_tokens = batch.size * batch.new_tokens
    return BatchTimes(prefill_s=row["t_pp"], decode_s=row["t_tg"], decode_tokens=num_tokens)


def _program(place: Place, name: str) -> list[str]:
    return [str(place.root / "build" / "bin" / name)]


def _finished(command: list[str], env: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=BATCH_TIMEOUT_S,
            env={**os.environ, **(env or {})},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"{Path(command[0]).name}: no answer in {BATCH_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise PeerError(f"{Path(command[0]).name}: {done.stderr.strip()[-300:]}")
    return done.stdout
