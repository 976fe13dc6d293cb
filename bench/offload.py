"""Streaming a model twice its memory: ours against DeepSpeed, Accelerate and a mapped file.

    python -m bench.offload [--rounds 2] [--threads 1] [--limit-mb 1400]

A random bf16 model of about 2.9 GB is served from disk by processes in one memory cgroup (needs
root), each engine in turn, round after round; the page cache is dropped per file before each.
Greedy tokens are compared. Accelerate is installed beside the bench, never into the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.memory_cgroup import MemoryCgroup
from bench.offload_child import BatchResult, ChildResult, ChildTask
from bench.offload_run import Runner, install_accelerate
from bench.random_checkpoint import SHAPES, RandomCheckpoint, random_checkpoint
from bench.report import Row, Samples, compared, measured, write_report
from cluster.base.env import default_cache_dir
from offload.cost_model import PassLoad, Placement, Rates, pass_time
from offload.machine_rates import RatesRequest, machine_rates
from offload.model_shape import ModelShape, model_shape
from offload.pack_model import pack_model
from offload.precision import Precision
from replicas.models.hf_config import arch_from_hf

DEEP = {**SHAPES["dense-1b"], "vocab_size": 8192, "num_hidden_layers": 28}
"""2.9 GB; little of it is vocabulary, so that nearly all streams."""
PROMPT_TOKENS = 16
NEW_TOKENS = 5
BATCH = 8
PEERS = {
    "deepspeed_zero3": ("DeepSpeed ZeRO-3 NVMe", 2.5),
    "accelerate_disk": ("Accelerate disk offload", 5.0),
    "mapped": ("mapped store, same engine", 1.4),
}
"""Engine -> name and the ratio to reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all cases share."""

    shape: ModelShape
    rates: Rates
    limit_bytes: int


def main() -> None:
    """Run the benchmark and write its report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-mb", type=int, default=1400)
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    models = default_cache_dir() / "bench-models"
    checkpoint = random_checkpoint("dense-deep", models, config=DEEP)
    shape = model_shape(arch_from_hf(DEEP), 1, "bfloat16")
    limit = arguments.limit_mb * 10**6
    with tempfile.TemporaryDirectory(dir=models, prefix="offload-") as folder:
        stores = pack_all(checkpoint, Path(folder))
        with MemoryCgroup("penstock-bench-offload", limit) as cgroup:
            runner = Runner(
                task=task_of(checkpoint, arguments.threads),
                cgroup=cgroup,
                stores=stores,
                accelerate=install_accelerate(default_cache_dir()),
            )
            request = RatesRequest(
                device="cpu",
                num_threads=arguments.threads,
                dtype="bfloat16",
                disk=Path(folder),
            )
            rates = machine_rates(request, Path(folder) / "fresh")
            setting = Setting(shape=shape, rates=rates, limit_bytes=limit)
            rows = peer_rows(runner, arguments.rounds, setting)
            rows += batch_rows(runner, arguments.rounds, setting)
    write_report(
        "offload",
        rows,
        notes=[
            f"bf16, {arguments.threads} compute threads, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, "
            f"memory limit {arguments.limit_mb} MB, "
            f"{(shape.layer_bytes(Precision.NATIVE) + shape.fixed_bytes) / limit:.2f} times that "
            "of weights",
            f"load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
            f"probed: disk {rates.disk_bytes_per_s / 1e9:.2f} GB/s, memory "
            f"{rates.memory_bytes_per_s / 1e9:.1f} GB/s",
            *runner.notes,
        ],
    )


def task_of(checkpoint: RandomCheckpoint, threads: int) -> ChildTask:
    """What every child is asked but for its engine."""
    return ChildTask(
        engine="",
        checkpoint=str(checkpoint.path),
        folder="",
        cgroup_procs="",
        batches=(BATCH,),
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        threads=threads,
        vocab_size=checkpoint.vocab_size,
    )


def pack_all(checkpoint: RandomCheckpoint, folder: Path) -> dict[Precision, Path]:
    """A folder with the store of each format."""
    stores = {precision: folder / precision.value for precision in Precision}
    for precision, store in stores.items():
        pack_model(
            str(checkpoint.path),
            dtype="bfloat16",
            precision=precision.value,
            disk_path=str(store),
        )
    return stores


def peer_rows(runner: Runner, rounds: int, setting: Setting) -> list[Row]:
    """The same batch by everybody, in turn."""
    results: dict[str, list[ChildResult]] = {}
    for _ in range(rounds):
        for engine in ("ours", *PEERS):
            if (result := runner.run(engine)) is not None:
                results.setdefault(engine, []).append(result)
    ours = results.pop("ours")
    label = f"batch {BATCH}, model twice the memory"
    row = measured(label, "rate", "tok/s", _rates([run.batches[0] for run in ours]))
    rows = [row]
    for engine, runs in results.items():
        name, target = PEERS[engine]
        theirs = _rates([run.batches[0] for run in runs])
        rows.append(compared(row, name, theirs, target=target))
        start = measured(label, "engine start", "s", Samples(values=_loads(ours)))
        rows.append(compared(start, name, Samples(values=_loads(runs)), lower_is_better=True))
        rows.append(_same_tokens(label, name, ours[0].batches[0], runs[0].batches[0]))
    return [*rows, *_own_rows(label, ours, runner, setting)]


def _own_rows(
    label: str, ours: Sequence[ChildResult], runner: Runner, setting: Setting
) -> list[Row]:
    """Disk, start and memory of ours."""
    step_bytes = setting.shape.layer_bytes(Precision.NATIVE)
    used = [step_bytes / _step_s(run.batches[0]) / 1e9 for run in ours]
    disk = [run.facts["disk_bytes_per_s"] / 1e9 for run in ours]
    roof = measured(label, "read while serving", "GB/s", Samples(values=tuple(used)))
    start = measured(label, "engine start", "s", Samples(values=_loads(ours)))
    whole = measured(label, "process start", "s", Samples(values=tuple(run.load_s for run in ours)))
    peak = measured(label, "peak memory", "MB", Samples(values=(runner.peak_bytes / 1e6,)))
    limit = Samples(values=(setting.limit_bytes / 1e6,))
    return [
        compared(roof, "its reader alone", Samples(values=tuple(disk)), target=0.95),
        compared(start, "aim", Samples(values=(2.0,)), target=1.0, lower_is_better=True),
        whole,
        compared(peak, "limit", limit, target=1.0, lower_is_better=True),
    ]


def batch_rows(runner: Runner, rounds: int, setting: Setting) -> list[Row]:
    """Batches and formats of ours, and what the cost model says of them."""
    rows: list[Row] = []
    native: dict[int, Samples] = {}
    for precision in Precision:
        batches = (1, BATCH, 64)
        runs = [runner.run("ours", batches, precision) for _ in range(rounds)]
        done = [run for run in runs if run is not None]
        for index, rows_in_batch in enumerate(batches):
            label = f"{precision.value}, batch {rows_in_batch}"
            rates = _rates([run.batches[index] for run in done])
            row = measured(label, "rate", "tok/s", rates)
            if precision is Precision.NATIVE:
                native[rows_in_batch] = rates
                if rows_in_batch == 64:
                    row = compared(row, "batch 1", native[1], target=60.0)
            else:
                row = compared(row, "native", native[rows_in_batch])
            rows.append(row)
            disk = statistics.median(run.facts["disk_bytes_per_s"] for run in done)
            rows.append(predicted_row(label, setting, precision, rows_in_batch, disk, rates))
    return rows


def predicted_row(
    label: str,
    setting: Setting,
    precision: Precision,
    rows: int,
    disk_bytes_per_s: float,
    rates: Samples,
) -> Row:
    """The cost model's figure with the disk as fast as it was in the run, against the run's."""
    speeds = dataclasses.replace(setting.rates, disk_bytes_per_s=disk_bytes_per_s)
    placement = Placement(resident_layers=0, host_layers=0, precision=precision)
    load = PassLoad(rows=rows, context_tokens=PROMPT_TOKENS + NEW_TOKENS // 2)
    predicted = rows / pass_time(setting.shape, placement, speeds, load).total_s
    near = min(predicted / rates.median, rates.median / predicted)
    return Row(
        case=label,
        metric="predicted rate",
        unit="tok/s",
        ours=predicted,
        samples=1,
        spread=0.0,
        against="measured",
        theirs=rates.median,
        ratio=near,
        target=0.9,
    )


def _step_s(batch: BatchResult) -> float:
    return statistics.median(batch.step_s)


def _rates(batches: Sequence[BatchResult]) -> Samples:
    """Tokens per second while all rows decode."""
    return Samples(values=tuple(batch.rows / _step_s(batch) for batch in batches))


def _loads(runs: Sequence[ChildResult]) -> tuple[float, ...]:
    return tuple(run.engine_load_s for run in runs)


def _same_tokens(label: str, name: str, ours: BatchResult, theirs: BatchResult) -> Row:
    """Share of rows with equal tokens; other kernels may break a tie of bf16 another way."""
    equal = [mine == other for mine, other in zip(ours.token_ids, theirs.token_ids, strict=True)]
    share = sum(equal) / len(equal)
    return Row(
        case=label,
        metric="rows with equal tokens",
        unit="",
        ours=share,
        samples=len(equal),
        spread=0.0,
        against=name,
    )


if __name__ == "__main__":
    main()
