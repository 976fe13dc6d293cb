"""One engine in one process under a memory limit: loads a model, runs batches, prints what it took.

Started by `bench.offload` as `python -m bench.offload_child`, with a `ChildTask` as JSON on its
standard input. It enters the memory cgroup before it imports anything large, so that all it ever
allocates is counted. Greedy, batches of equal prompts; times are wall-clock seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

STARTED_S = time.perf_counter()
_STEADY = 0.05
"""By how much of its mean the disk may differ before and after a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildTask:
    """What a child does."""

    engine: str
    """A module of `bench.offload_engines`."""
    checkpoint: str
    folder: str
    """Scratch and store, on the disk that is measured."""
    cgroup_procs: str
    """File that takes a process into the cgroup; empty: none."""
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    threads: int
    vocab_size: int
    precision: str = "native"
    compression: str = "none"
    """Of the records in `folder`."""
    resident_layers: int = 0
    """Ours keeps so many in memory."""
    held_bytes: int = 0
    """Ours keeps so much of the compressed records of the others."""
    ring_slots: int = 3
    """Ours streams through so many."""
    attempts: int = 1
    """Most runs of a batch, until the disk is the same before and after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """One batch."""

    rows: int
    first_token_s: float
    """From the start of the batch."""
    step_s: tuple[float, ...]
    """Every further token of all rows."""
    cpu_s: float
    """Processor seconds of the whole batch."""
    read_bytes: int
    """What the batch read from the disk, mapped files included."""
    token_ids: tuple[tuple[int, ...], ...]
    disk_bytes_per_s: float = 0.0
    """What the disk gave to the reader alone, before and after this batch; 0: not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildResult:
    """What a child says."""

    load_s: float
    """From the start of the process, imports included, until it could take a request."""
    engine_load_s: float
    """The part of it after the imports."""
    batches: tuple[BatchResult, ...]
    facts: dict[str, float]
    """What else the engine tells of itself."""


Generate = Callable[[list[list[int]], int], tuple[list[float], list[list[int]]]]
"""(prompts, new tokens) -> (seconds of each token, token ids of each row)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a module of `bench.offload_engines` opens."""

    generate: Generate
    disk_bytes_per_s: Callable[[], float] = lambda: 0.0
    """The disk alone, before the first batch and after each one; not counted."""
    facts: Callable[[], dict[str, float]] = dict


def prompts_of(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """The same for every engine; without a library, so that all get them."""
    state, prompts = 12345, []
    for _ in range(rows):
        prompt = []
        for _ in range(length):
            state = (1103515245 * state + 12345) % 2**31
            prompt.append(3 + (state >> 8) % (vocab_size - 3))
        prompts.append(prompt)
    return prompts


def main() -> None:
    """Read the task, run it, print the result."""
    data = json.load(sys.stdin)
    task = ChildTask(**{**data, "batches": tuple(data["batches"])})
    if task.cgroup_procs:
        Path(task.cgroup_procs).write_text(str(os.getpid()), encoding="utf-8")
    module: Any = importlib.import_module(f"bench.offload_engines.{task.engine}")
    imported_s = time.perf_counter()
    with module.opened(task) as engine:
        loaded_s = time.perf_counter()
        batches, disk = [], engine.disk_bytes_per_s()
        for rows in task.batches:
            batch, disk = _steady(engine, task, rows, disk)
            batches.append(batch)
        result = ChildResult(
            load_s=loaded_s - STARTED_S,
            engine_load_s=loaded_s - imported_s,
            batches=tuple(batches),
            facts=engine.facts(),
        )
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
    sys.stdout.flush()
    # Libraries under test may hang or abort on their way out; the result is what counts.
    os._exit(0)


def _steady(engine: Engine, task: ChildTask, rows: int, before: float) -> tuple[BatchResult, float]:
    """A batch during which the disk stayed as it was, and the disk after it.

    It drifts by a third within seconds; where it did, the batch is run again.
    """
    for _ in range(task.attempts):
        batch = _run(engine, task, rows)
        after = engine.disk_bytes_per_s()
        mean = (before + after) / 2
        if abs(after - before) <= _STEADY * mean:
            break
        before = after
    return replace(batch, disk_bytes_per_s=mean), after


def _run(engine: Engine, task: ChildTask, rows: int) -> BatchResult:
    prompts = prompts_of(rows, task.prompt_tokens, task.vocab_size)
    cpu_s, read_bytes = time.process_time(), _read_bytes()
    seconds, tokens = engine.generate(prompts, task.new_tokens)
    return BatchResult(
        rows=rows,
        first_token_s=seconds[0],
        step_s=tuple(seconds[1:]),
        cpu_s=time.process_time() - cpu_s,
        read_bytes=_read_bytes() - read_bytes,
        token_ids=tuple(tuple(row) for row in tokens),
    )


def _read_bytes() -> int:
    """What this process has fetched from disks so far."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


if __name__ == "__main__":
    main()
