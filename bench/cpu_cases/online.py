"""Each engine's own OpenAI server under the same closed loop of 16 clients.

All servers run at the same time and take turns, so an idle one must cost nothing: what the machine
still used with all of them idle is a row. Ours is the whole stack, gateway included.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.cpu_cases.compare import open_all, take_turns
from bench.load import Load, LoadResult, drive
from bench.peers.protocol import Engine, PeerError, Server
from bench.random_checkpoint import RandomCheckpoint
from bench.report import Row, Samples, measured

CLIENTS = 16
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
TARGET = 1.2
IDLE_WINDOW_S = 2.0
_TICKS_PER_S = 100


def online_rows(
    checkpoint: RandomCheckpoint, engines: Sequence[Engine], repeats: int, num_requests: int
) -> list[Row]:
    """Tokens per second and the medians of the time to the first and per further token."""
    label = f"{checkpoint.name} online"
    with ExitStack() as stack:
        contenders = open_all(
            engines, online=True, opening=lambda engine: engine.serve(checkpoint), stack=stack
        )
        idle = Samples(values=(_busy_cores(),))

        print(f"  {label}", flush=True)
        turns = take_turns(
            contenders,
            lambda server, number: _drive(checkpoint, server, number, num_requests),
            lambda result: f"{result.tokens_per_s:.1f} tok/s",
            repeats,
        )
    rows = turns.rows(label, ("output", "tok/s"), lambda result: result.tokens_per_s, TARGET)
    rows += turns.rows(label, ("TTFT p50", "ms"), _p50("ttft_s"), TARGET)
    rows += turns.rows(label, ("TPOT p50", "ms"), _p50("tpot_s"), TARGET)
    return [*rows, measured(label, "all servers idle", "cores", idle)]


def _drive(
    checkpoint: RandomCheckpoint, server: Server, round_number: int, num_requests: int
) -> LoadResult:
    # The first round only warms: one request of each client. No two rounds share a prompt, or a
    # prefix cache would answer.
    load = Load(
        target=server.target,
        model=server.model,
        concurrency=CLIENTS,
        num_requests=num_requests if round_number else CLIENTS,
        prompt_tokens=PROMPT_TOKENS,
        max_tokens=OUTPUT_TOKENS,
        vocab_size=checkpoint.vocab_size,
        seed=round_number,
        stagger_s=0.0,
        think_s=0.0,
        front="http",
    )
    try:
        return drive(load)
    except subprocess.CalledProcessError as error:
        raise PeerError(f"its answers were not what was asked for: {error}") from error


def _p50(name: str) -> Callable[[LoadResult], float]:
    def read(result: LoadResult) -> float:
        values = tuple(1e3 * getattr(request, name) for request in result.requests)
        return Samples(values=values).median

    return read


def _busy_cores() -> float:
    """Cores that the whole machine used over a short while."""
    before = _busy_ticks()
    time.sleep(IDLE_WINDOW_S)
    return (_busy_ticks() - before) / _TICKS_PER_S / IDLE_WINDOW_S


def _busy_ticks() -> int:
    """User, nice, system, interrupts of all processors (proc(5)): all but idle and waiting."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:8]
    ticks = [int(field) for field in fields]
    return sum(ticks[:3]) + sum(ticks[5:])
