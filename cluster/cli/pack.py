"""`penstock pack`: write the packed weights of streamed models before anything serves them.

An offload replica packs at its first start if nobody has; packing beforehand makes that start as
fast as the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from cluster.base.amount_text import size_text
from cluster.base.env import read_environment
from cluster.base.errors import ConfigError
from cluster.base.load import load_cluster_file
from cluster.cli.console import console, print_warning
from cluster.planner.checkpoint_info import read_checkpoint
from cluster.planner.hardware import local_topology
from cluster.planner.hub import Hub
from cluster.planner.plan_file import plan_file
from replicas.models.hf_config import arch_from_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The stores of one model, one for each rank."""

    name: str
    model_path: str
    dtype: str
    precision: str
    compression: str
    disk_path: str
    tp_size: int


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--model", type=click.Path(path_type=Path), help="A checkpoint instead of FILE.")
@click.option("--out", type=click.Path(path_type=Path), help="With --model: where to write.")
@click.option("--dtype", default="auto", help="With --model; auto: the checkpoint's own.")
@click.option(
    "--precision",
    type=click.Choice(["native", "int8", "int4"]),
    default="native",
    help="With --model: format of the layers' linear weights.",
)
@click.option(
    "--compression",
    type=click.Choice(["none", "lossless"]),
    default="none",
    help="With --model: how records lie on disk; `penstock plan` tells what a replica wants.",
)
@click.option("--tp", default=1, show_default=True, help="With --model: ranks.")
def pack(  # noqa: PLR0913 - the options of the command
    file: Path | None,
    model: Path | None,
    out: Path | None,
    dtype: str,
    precision: str,
    compression: str,
    tp: int,
) -> None:
    """Write the packed weights of the streamed models of FILE, or of one checkpoint."""
    if (file is None) == (model is None):
        raise click.UsageError("Give either FILE or --model DIR.")
    given = (out, dtype, precision, compression, tp)
    if model is None and given != (None, "auto", "native", "none", 1):
        raise click.UsageError(
            "--out, --dtype, --precision, --compression and --tp belong to --model."
        )
    if file is not None:
        jobs = list(_jobs_of(file))
    elif model is not None and out is not None:
        jobs = [_job_of(model, out, dtype, precision, compression, tp)]
    else:
        raise click.UsageError("--model needs --out DIR.")
    for job in jobs:
        _run(job)


def _jobs_of(file: Path) -> Iterator[Job]:
    environment = read_environment()
    plan = plan_file(
        load_cluster_file(file),
        local_topology(environment),
        Hub(offline=environment.hub_offline),
    )
    for warning in plan.warnings:
        print_warning(warning)
    streamed = [model for model in plan.models if model.offload and model.offload.is_packed]
    if not streamed:
        raise ConfigError(
            f"No model of {file} is streamed from a packed store; there is nothing to pack.",
            "See `penstock plan` for what would run.",
        )
    for model in streamed:
        assert model.offload is not None
        yield Job(
            name=model.name,
            model_path=model.path,
            dtype=model.dtype,
            precision=model.offload.precision,
            compression=model.offload.compression,
            disk_path=model.offload.disk_path,
            tp_size=model.tp_size,
        )


def _job_of(
    model: Path, out: Path, dtype: str, precision: str, compression: str, tp_size: int
) -> Job:
    checkpoint = read_checkpoint(model.resolve())
    return Job(
        name=model.name,
        model_path=str(checkpoint.directory),
        dtype=arch_from_hf(checkpoint.config).dtype if dtype == "auto" else dtype,
        precision=precision,
        compression=compression,
        disk_path=str(out.resolve()),
        tp_size=tp_size,
    )


def _run(job: Job) -> None:
    # Torch, which no other command needs.
    packing = importlib.import_module("offload.pack_model")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    for rank in range(job.tp_size):
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task(f"{job.name} rank {rank}", total=None)
            store = packing.pack_model(
                job.model_path,
                dtype=job.dtype,
                precision=job.precision,
                compression=job.compression,
                disk_path=job.disk_path,
                rank=rank,
                size=job.tp_size,
                on_progress=partial(_show, progress, task),
            )
        size = store.total_bytes
        console.print(f"{store.path}: {size_text(size)}", markup=False, soft_wrap=True)


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)
