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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STARTED_S = time.perf_counter()


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
    between: Callable[[], None] = lambda: None
    """Called before the first batch and after each one; not counted."""
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
        engine.between()
        batches = [_run(engine, task, rows) for rows in task.batches]
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


def _run(engine: Engine, task: ChildTask, rows: int) -> BatchResult:
    prompts = prompts_of(rows, task.prompt_tokens, task.vocab_size)
    cpu_s, read_bytes = time.process_time(), _read_bytes()
    seconds, tokens = engine.generate(prompts, task.new_tokens)
    result = BatchResult(
        rows=rows,
        first_token_s=seconds[0],
        step_s=tuple(seconds[1:]),
        cpu_s=time.process_time() - cpu_s,
        read_bytes=_read_bytes() - read_bytes,
        token_ids=tuple(tuple(row) for row in tokens),
    )
    engine.between()
    return result


def _read_bytes() -> int:
    """What this process has fetched from disks so far."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


if __name__ == "__main__":
    main()
