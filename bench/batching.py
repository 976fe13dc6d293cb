"""Continuous against static batches of a streamed model, with the lengths of real requests.

    python -m bench.batching [--trace FILE] [--requests 160] [--rows 24] [--scale 16] [--rounds 2]

Every pass reads the whole model from disk, so what counts is how many rows a pass carries. A static
batch runs until its longest request has ended; continuous batching fills a row as soon as it is
free. Same engine, same requests, in turn; equal tokens asserted. Lengths are divided by `--scale`:
their spread matters, not their size. The sample in `bench/traces` is of a public trace; `--trace`
takes the whole one, or any other file with its columns. About 2 minutes.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.offload_child import prompts_of
from bench.offload_engines.ours import MIB
from bench.random_checkpoint import RandomCheckpoint, random_checkpoint
from bench.report import Row, Samples, compared, measured, write_report
from cluster.base.env import default_cache_dir
from cluster.base.plan import OffloadPlan
from cluster.dist.communicator import SingleRank
from offload.assembly import streamed_weights
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.sync_engine import SyncEngine
from replicas.worker.assembly import RankSpec, build_runner
from replicas.worker.in_process_executor import InProcessExecutor

SAMPLE = Path(__file__).parent / "traces" / "azure_conv_2023.csv"
MODEL = "dense-160m"
BLOCK_SIZE = 16
MAX_STEP_TOKENS = 512
TARGET = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """One request of a trace, in tokens."""

    prompt: int
    output: int


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What serving all requests once took."""

    seconds: float = 0.0
    num_passes: int = 0
    ended_s: dict[str, float] = field(default_factory=dict)
    """When each request had its last token, from the start of all."""
    token_ids: dict[str, list[int]] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all requests."""
        return sum(map(len, self.token_ids.values())) / self.seconds

    @property
    def mean_wait_s(self) -> float:
        """Until a request's last token, all having come at the start."""
        return sum(self.ended_s.values()) / len(self.ended_s)


def main() -> None:
    """Run the benchmark and write its report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, default=SAMPLE)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--scale", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths = read_lengths(arguments.trace, arguments.requests, arguments.scale)
    checkpoint = random_checkpoint(MODEL, default_cache_dir() / "bench-models")
    engine = streamed_engine(checkpoint, lengths, arguments.rows)
    requests = requests_of(lengths, checkpoint.vocab_size)
    batches = [
        requests[first : first + arguments.rows]
        for first in range(0, len(requests), arguments.rows)
    ]
    serve(engine, batches[:1])  # the store is packed, checksums are known
    continuous: list[Outcome] = []
    static: list[Outcome] = []
    for _ in range(arguments.rounds):
        static.append(serve(engine, batches))
        continuous.append(serve(engine, [requests]))
        if static[-1].token_ids != continuous[-1].token_ids:
            raise RuntimeError("The two ways of batching gave different tokens.")
    _report(arguments, lengths, continuous, static)


def read_lengths(path: Path, count: int, scale: int) -> list[Lengths]:
    """`count` requests of a trace, evenly spread over it.

    Args:
        path: CSV with the columns ContextTokens and GeneratedTokens.
        scale: divisor of both.

    Raises:
        ValueError: the trace has too few requests.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) < count:
        raise ValueError(f"{path} has {len(rows)} requests, not {count}")
    return [
        Lengths(
            prompt=max(1, round(int(row["ContextTokens"]) / scale)),
            output=max(1, round(int(row["GeneratedTokens"]) / scale)),
        )
        for row in rows[:: len(rows) // count][:count]
    ]


def requests_of(lengths: Sequence[Lengths], vocab_size: int) -> list[GenerationRequest]:
    """Greedy requests of exactly these lengths, with made-up prompts."""
    prompts = prompts_of(len(lengths), max(each.prompt for each in lengths), vocab_size)
    return [
        GenerationRequest(
            request_id=f"{index}",
            prompt_token_ids=tuple(prompt[: each.prompt]),
            params=SamplingParams(temperature=0.0, max_tokens=each.output, ignore_eos=True),
        )
        for index, (prompt, each) in enumerate(zip(prompts, lengths, strict=True))
    ]


def streamed_engine(
    checkpoint: RandomCheckpoint, lengths: Sequence[Lengths], rows: int
) -> SyncEngine:
    """All layers streamed, a cache that holds `rows` of the longest requests."""
    blocks = -(-max(each.prompt + each.output for each in lengths) // BLOCK_SIZE)
    spec = RankSpec(
        model_path=str(checkpoint.path),
        dtype="bfloat16",
        kv_dtype="bfloat16",
        block_size=BLOCK_SIZE,
        num_blocks=rows * blocks + 1,
        max_context=blocks * BLOCK_SIZE,
    )
    plan = OffloadPlan(
        disk_path=str(default_cache_dir() / "bench-models" / "batching-stores"),
        device_bytes=2048 * MIB,
        host_bytes=0,
        workspace_bytes=0,
        resident_units=("embed", "norm", "head"),
    )
    runner = build_runner(
        spec, SingleRank(), torch.device("cpu"), weights_factory=streamed_weights(plan)
    )
    config = SchedulerConfig(
        max_running_requests=rows,
        max_step_tokens=MAX_STEP_TOKENS,
        max_context=spec.max_context,
        block_size=BLOCK_SIZE,
        num_blocks=spec.num_blocks,
        prefix_caching=False,
    )
    return SyncEngine(Scheduler(config), InProcessExecutor(runner))


def serve(engine: SyncEngine, batches: Sequence[Sequence[GenerationRequest]]) -> Outcome:
    """Each batch until its last request has ended; one batch of all is continuous batching."""
    outcome = Outcome()
    started_s = time.perf_counter()
    for batch in batches:
        for request in batch:
            outcome.token_ids[request.request_id] = []
            engine.add(request)
        while engine.has_unfinished:
            deltas = engine.step()
            outcome.num_passes += 1
            for delta in deltas:
                outcome.token_ids[delta.request_id] += delta.token_ids
                if delta.finish_reason is not None:
                    outcome.ended_s[delta.request_id] = time.perf_counter() - started_s
    outcome.seconds = time.perf_counter() - started_s
    return outcome


def _report(
    arguments: argparse.Namespace,
    lengths: Sequence[Lengths],
    continuous: Sequence[Outcome],
    static: Sequence[Outcome],
) -> None:
    label = f"{MODEL} streamed, {len(lengths)} requests, {arguments.rows} rows"

    def row(metric: str, unit: str, of: Callable[[Outcome], float]) -> tuple[Row, Samples]:
        ours, theirs = (Samples(values=tuple(map(of, each))) for each in (continuous, static))
        return measured(label, metric, unit, ours), theirs

    rate, static_rate = row("rate", "tok/s", lambda each: each.tokens_per_s)
    passes, static_passes = row("passes", "", lambda each: each.num_passes)
    wait, static_wait = row("mean time of a request", "s", lambda each: each.mean_wait_s)
    rows = [
        compared(rate, "static batches", static_rate, target=TARGET),
        compared(passes, "static batches", static_passes, lower_is_better=True),
        compared(wait, "static batches", static_wait, lower_is_better=True),
    ]
    outputs = [each.output for each in lengths]
    write_report(
        "batching",
        rows,
        notes=[
            f"bf16, {arguments.threads} compute threads, every layer streamed from disk in each "
            f"pass, at most {MAX_STEP_TOKENS} tokens a pass; all requests wait at the start",
            f"lengths of {arguments.trace.name}, divided by {arguments.scale}: outputs "
            f"{min(outputs)} to {max(outputs)} tokens, {sum(outputs) / len(outputs):.1f} on "
            f"average; prompts {sum(each.prompt for each in lengths) / len(lengths):.0f}",
            "tokens of both ways are equal",
            f"load average {os.getloadavg()[0]:.1f} at the end",
        ],
    )


if __name__ == "__main__":
    main()
