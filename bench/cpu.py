"""The engine on the CPU in bf16, compiled kernels against torch, beside the memory's own speed.

    python -m bench.cpu [--repeats 3] [--threads 2] [--models dense-160m dense-1b]

Offline, in this process: prefill of 512 tokens, decode after 128-token prompts at batch 1, 8, 32.
Both engines hold the same random weights and take turns (A B A B); the read bandwidth is probed
around each pair, because it drifts on shared machines. `of memory speed` is what the weights that
a token must read would take at the probed rate, over what the token took.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.offline_engine import OfflineEngine, OfflineRun
from bench.random_checkpoint import SHAPES, write_random_checkpoint
from bench.report import Row, Samples, compared, measured, write_report

BATCHES = (1, 8, 32)
PREFILL_TOKENS = 512
PROMPT_TOKENS = 128
NEW_TOKENS = 128
PROBE_BYTES = 2**30
TORCH = "torch kernels"


class MemoryProbe:
    """Reads 1 GiB with all threads; GB/s."""

    def __init__(self) -> None:
        self._data = torch.ones(PROBE_BYTES // 4)

    def read(self, repeats: int = 5) -> float:
        """The fastest of a few reads, so that a neighbour's burst does not count."""
        times = []
        for _ in range(repeats):
            started_s = time.perf_counter()
            self._data.sum()
            times.append(time.perf_counter() - started_s)
        return PROBE_BYTES / min(times) / 1e9


@dataclass(kw_only=True)
class Case:
    """Runs of both engines and the bandwidth around them."""

    ours: list[OfflineRun] = field(default_factory=list)
    theirs: list[OfflineRun] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)


def main() -> None:
    """Run the benchmark and write its report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    probe = MemoryProbe()
    rows: list[Row] = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            read_bytes = write_random_checkpoint(name, Path(folder))
            ours = OfflineEngine(Path(folder), kernels="auto")
            theirs = OfflineEngine(Path(folder), kernels="off")
        rows += model_rows(name, ours, theirs, read_bytes, (probe, arguments.repeats))
    write_report(
        "cpu",
        rows,
        notes=[
            f"bf16, {arguments.threads} threads, greedy, kernels {ours.kernels}",
            f"prefill {PREFILL_TOKENS}; decode {PROMPT_TOKENS} + {NEW_TOKENS} tokens",
            "random weights; the other engine is this one with kernels: off",
        ],
    )


def model_rows(
    name: str,
    ours: OfflineEngine,
    theirs: OfflineEngine,
    read_bytes: int,
    setting: tuple[MemoryProbe, int],
) -> list[Row]:
    """All rows of one model."""
    probe, repeats = setting
    prefill = alternate(ours, theirs, (1, PREFILL_TOKENS, 1), probe, repeats)
    rows = [
        rate_row(
            f"{name} prefill {PREFILL_TOKENS}", prefill, lambda r: PREFILL_TOKENS / r.prefill_s
        )
    ]
    for batch in BATCHES:
        case = alternate(ours, theirs, (batch, PROMPT_TOKENS, NEW_TOKENS), probe, repeats)
        label = f"{name} decode batch {batch}"
        rows.append(rate_row(label, case, functools.partial(decode_rate, batch)))
        shares = [
            read_bytes / (rate * 1e9) / (run.decode_s / run.num_steps)
            for run, rate in zip(case.ours, case.bandwidth, strict=True)
        ]
        rows.append(measured(label, "of memory speed", "", Samples(values=tuple(shares))))
        rows.append(measured(label, "read", "GB/s", Samples(values=tuple(case.bandwidth))))
        rows += ledger_rows(label, case)
    return rows


def alternate(
    ours: OfflineEngine,
    theirs: OfflineEngine,
    batch: tuple[int, int, int],
    probe: MemoryProbe,
    repeats: int,
) -> Case:
    """`repeats` pairs of runs after one that warms up."""
    case = Case()
    for repeat in range(repeats + 1):
        before = probe.read()
        mine = ours.run(*batch)
        bandwidth = max(before, probe.read())
        other = theirs.run(*batch)
        if repeat:
            case.ours.append(mine)
            case.theirs.append(other)
            case.bandwidth.append(bandwidth)
    return case


def decode_rate(batch: int, run: OfflineRun) -> float:
    """Tokens per second while all requests decode."""
    return batch * run.num_steps / run.decode_s


def rate_row(label: str, case: Case, rate: Callable[[OfflineRun], float]) -> Row:
    """Tokens per second of both."""
    mine = Samples(values=tuple(rate(run) for run in case.ours))
    other = Samples(values=tuple(rate(run) for run in case.theirs))
    return compared(measured(label, "rate", "tok/s", mine), TORCH, other)


def ledger_rows(label: str, case: Case) -> list[Row]:
    """Milliseconds of a step by part, of both."""
    rows = []
    for part in case.ours[0].ledger_s:
        mine, other = (
            Samples(values=tuple(1000 * run.ledger_s[part] / run.num_steps for run in runs))
            for runs in (case.ours, case.theirs)
        )
        row = measured(label, f"step: {part}", "ms", mine)
        rows.append(compared(row, TORCH, other, lower_is_better=True))
    return rows


if __name__ == "__main__":
    main()
