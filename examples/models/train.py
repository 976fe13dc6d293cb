"""Command line: train a demo model and publish it, or publish from saved training state.

Run from the repository root as `python -m examples.models.train`. Training writes the checkpoint,
`training.json` and the card to `demo-<model>` beside this file.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from examples.models.publishing import Publisher
from examples.models.recipes import BUILDERS, Recipe
from examples.models.trainer import Trainer
from examples.models.training_run import (
    Bounds,
    Housekeeping,
    Materials,
    build_trainer,
    prepare_materials,
)

HERE = Path(__file__).parent
POSITIVE = click.FloatRange(min=0, min_open=True)
KIND = click.option(
    "--model", "kind", type=click.Choice(sorted(BUILDERS)), required=True, help="Which model."
)
WORK = click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Directory of resumable state."
)
OUTPUT = click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=HERE,
    show_default="beside this file",
    help="Where `demo-<model>` and the held-out sample are written.",
)
THREADS = click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Torch threads."
)


@click.group()
def main() -> None:
    """Train and publish the demo models."""


@main.command()
@KIND
@WORK
@OUTPUT
@THREADS
@click.option("--minutes", type=POSITIVE, help="Wall-time budget for training.")
@click.option("--steps", type=click.IntRange(min=1), help="Exact step count, instead of --minutes.")
@click.option(
    "--decay-steps",
    type=click.IntRange(min=1),
    help="How many last steps decay the rate, with --steps.",
)
@click.option("--snapshot-minutes", type=POSITIVE, help="Also write an early checkpoint then.")
def train(
    kind: str,
    work: Path,
    output: Path,
    threads: int,
    **limits: float | None,
) -> None:
    """Train from the start, or go on from the state in --work; then publish.

    A finished run goes on if the new bounds lie further: its rate decays once more.
    """
    torch.set_num_threads(threads)
    bounds = _bounds(limits)
    recipe = Recipe()
    materials = prepare_materials(recipe)
    trainer = build_trainer(kind, materials, recipe, bounds)
    if (work / "state.json").exists():
        trainer.load(work)
        trainer.extend(bounds.schedule(recipe))
        click.echo(f"resumed at step {trainer.progress.step}")
    snapshot_minutes = limits["snapshot_minutes"]
    housekeeping = Housekeeping(
        trainer=trainer,
        materials=materials,
        work=work,
        output=output / f"demo-{kind}",
        snapshot_s=None if snapshot_minutes is None else snapshot_minutes * 60,
    )
    trainer.run(housekeeping)
    trainer.save(work)
    _publish(kind, output, recipe, materials, trainer)


@main.command()
@KIND
@WORK
@OUTPUT
@THREADS
def publish(kind: str, work: Path, output: Path, threads: int) -> None:
    """Write checkpoint, figures and card from the state in --work, without training."""
    torch.set_num_threads(threads)
    recipe = Recipe()
    materials = prepare_materials(recipe)
    trainer = build_trainer(kind, materials, recipe, Bounds())
    trainer.load(work)
    _publish(kind, output, recipe, materials, trainer)


def _publish(
    kind: str, output: Path, recipe: Recipe, materials: Materials, trainer: Trainer
) -> None:
    publisher = Publisher(root=output, kind=kind, recipe=recipe, materials=materials)
    record = publisher.publish(trainer)
    score = record["evaluation"]["held_out_split"]["bits_per_byte"]
    click.echo(f"{record['name']}: {score:.4f} bits per byte on the held-out split")


def _bounds(limits: dict[str, float | None]) -> Bounds:
    minutes, steps, decay_steps = (limits[key] for key in ("minutes", "steps", "decay_steps"))
    if (minutes is None) == (steps is None):
        raise click.UsageError("give either --minutes or --steps")
    if decay_steps is not None and (steps is None or decay_steps > steps):
        raise click.UsageError("--decay-steps needs --steps and cannot exceed it")
    return Bounds(
        minutes=minutes,
        steps=None if steps is None else int(steps),
        decay_steps=None if decay_steps is None else int(decay_steps),
    )


if __name__ == "__main__":
    main()
