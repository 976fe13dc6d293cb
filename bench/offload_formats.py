"""Rows of `bench.offload` on ours alone: each format against the disk and the cost model."""

from __future__ import annotations

import dataclasses

from bench.offload_rows import Setting, rates_of, step_s
from bench.offload_run import Runner, all_streaming
from bench.report import Row, Samples, compared, measured
from offload.compression import Compression
from offload.cost_model import PassLoad, pass_time
from offload.precision import Precision

AIM_OF_BATCHES = 60.0
"""How many times the rate of one row the largest batch should give."""


def format_rows(
    runner: Runner, precision: Precision, batches: tuple[int, ...], rounds: int, setting: Setting
) -> list[Row]:
    """One format of ours: each batch against the disk and the cost model, batches against one row.

    Raises:
        RuntimeError: no child came through.
    """
    results = (runner.run("ours", batches, precision) for _ in range(rounds))
    done = [run for run in results if run is not None]
    if not done:
        raise RuntimeError(f"no result for {precision}: {runner.notes[-1]}")
    step_bytes = setting.shape.layer_bytes(precision)
    is_compressed = setting.compression_of(precision) is Compression.LOSSLESS
    share = setting.shape.stored_share if is_compressed else 1.0
    rows: list[Row] = []
    alone = rates_of([run.batches[0] for run in done])
    for index, count in enumerate(batches):
        label = f"{precision.value}: batch {count}"
        each = [run.batches[index] for run in done]
        disk = Samples(values=tuple(batch.disk_bytes_per_s / 1e9 for batch in each))
        row = measured(label, "rate", "tok/s", rates_of(each))
        if count > 1:
            is_last = precision is Precision.NATIVE and index == len(batches) - 1
            row = compared(row, "batch 1", alone, target=AIM_OF_BATCHES if is_last else None)
        used = tuple(step_bytes / step_s(batch) / 1e9 for batch in each)
        stored = Samples(values=tuple(share * rate for rate in used))
        read = measured(label, "read while serving", "GB/s", stored)
        target = 0.95 if precision is Precision.NATIVE else None
        rows += [row, compared(read, "its reader alone", disk, target=target)]
        if is_compressed:
            brought = measured(label, "weights brought while serving", "GB/s", Samples(values=used))
            rows.append(compared(brought, "its reader alone", disk))
        rows += [
            predicted_row(label, setting, precision, count, disk.median * 1e9, rates_of(each)),
        ]
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
    placement = all_streaming(precision, setting.compression_of(precision))
    load = PassLoad(rows=rows, context_tokens=setting.context_tokens)
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
