"""Batches without a server: prefill of 512 tokens; decode after 128-token prompts.

Batch-1 decode is also held against the memory: the bytes of weights and KV that a token must read,
over what the probe could have read in the same time. The probe runs before and after each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from bench.cpu_cases.compare import Turns, open_all, take_turns
from bench.memory_probe import MemoryProbe
from bench.peers.protocol import Batch, BatchTimes, Engine, Offline
from bench.random_checkpoint import RandomCheckpoint
from bench.report import Row, Samples, compared, measured

PREFILL_TOKENS = 512
PROMPT_TOKENS = 128
NEW_TOKENS = 128
WARM_TOKENS = 8
ROOFLINE_TARGET = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineCase:
    """One cell of the table: a batch and how many times faster than each peer it should be."""

    name: str
    size: int
    target: float

    def batch(self, round_number: int) -> Batch:
        """The batch of a round, with prompts of its own; the first only warms and is short."""
        seed = 1000 * self.size + round_number
        if self.size == 0:
            return Batch(size=1, prompt_tokens=PREFILL_TOKENS, new_tokens=1, seed=seed)
        new_tokens = NEW_TOKENS if round_number else WARM_TOKENS
        return Batch(size=self.size, prompt_tokens=PROMPT_TOKENS, new_tokens=new_tokens, seed=seed)


OFFLINE_CASES = (
    OfflineCase(name="prefill", size=0, target=1.0),
    OfflineCase(name="decode-1", size=1, target=1.0),
    OfflineCase(name="decode-8", size=8, target=1.2),
    OfflineCase(name="decode-32", size=32, target=1.2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A batch and how fast memory was around it, GB/s."""

    batch: Batch
    times: BatchTimes
    read_gb_per_s: float


def offline_rows(
    checkpoint: RandomCheckpoint,
    engines: Sequence[Engine],
    cases: Sequence[OfflineCase],
    repeats: int,
    threads: int,
) -> Iterator[list[Row]]:
    """The rows of each case as soon as it is measured; the engines stay loaded in between."""
    probe = MemoryProbe(round(checkpoint.bytes_per_token(_mean_context())), threads)
    with ExitStack() as stack:
        stack.callback(probe.close)
        contenders = open_all(
            engines,
            online=False,
            opening=lambda engine: engine.offline(checkpoint),
            stack=stack,
        )
        for case in cases:
            label = f"{checkpoint.name} {case.name}"
            print(f"  {label}", flush=True)
            turns = take_turns(contenders, _runner(case, probe), _shown, repeats)
            yield _rows(label, case, checkpoint, turns)


def _runner(case: OfflineCase, probe: MemoryProbe) -> Callable[[Offline, int], Timed]:
    def run(engine: Offline, round_number: int) -> Timed:
        batch = case.batch(round_number)
        before = probe.read()
        times = engine.run(batch)
        return Timed(batch=batch, times=times, read_gb_per_s=max(before, probe.read()))

    return run


def _shown(timed: Timed) -> str:
    return f"{_rate(timed):.1f} tok/s, memory {timed.read_gb_per_s:.1f} GB/s"


def _rows(
    label: str, case: OfflineCase, checkpoint: RandomCheckpoint, turns: Turns[Timed]
) -> list[Row]:
    rows = turns.rows(label, ("rate", "tok/s"), _rate, case.target)
    ours = next(iter(turns.samples.values()))
    if case.size == 1:
        rows.append(_roofline_row(label, checkpoint, ours))
    bandwidth = Samples(values=tuple(timed.read_gb_per_s for timed in ours))
    rows.append(measured(label, "memory read", "GB/s", bandwidth))
    for part in ours[0].times.ledger_ms if case.size else ():
        parts = Samples(values=tuple(timed.times.ledger_ms[part] for timed in ours))
        rows.append(measured(label, f"our step: {part}", "ms", parts))
    return rows


def _roofline_row(label: str, checkpoint: RandomCheckpoint, ours: Sequence[Timed]) -> Row:
    bytes_per_token = checkpoint.bytes_per_token(_mean_context())
    shares = tuple(bytes_per_token * _rate(timed) / 1e9 / timed.read_gb_per_s for timed in ours)
    row = measured(label, "of the memory roofline", "", Samples(values=shares))
    return compared(row, "memory read", Samples(values=(1.0,)), target=ROOFLINE_TARGET)


def _rate(timed: Timed) -> float:
    if timed.batch.new_tokens == 1:
        return timed.times.prefill_rate(timed.batch)
    return timed.times.decode_rate


def _mean_context() -> float:
    return PROMPT_TOKENS + NEW_TOKENS / 2
