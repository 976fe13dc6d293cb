"""Sets one training run up and drives it: data, model, checkpoints, progress lines.

The work directory holds the resumable state and is no part of the repository; the checkpoint
directory receives an early snapshot, if asked for, and the final model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer

from examples.models.bits_per_byte import Protocol
from examples.models.checkpoint import write_checkpoint
from examples.models.corpus import Corpus, held_out_sample, load_corpus
from examples.models.demo_tokenizer import train_tokenizer
from examples.models.evaluation import TextScorer, TransformersScorer
from examples.models.recipes import BUILDERS, Recipe
from examples.models.schedule import Schedule
from examples.models.trainer import Progress, Trainer
from examples.models.training_data import BatchSampler, TrainingData, build_training_data

REPORT_EVERY_STEPS = 50
SAVE_EVERY_S = 300.0
VALIDATION_WINDOWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What ends a run: minutes of training, or exact steps with their decay."""

    minutes: float | None = None
    steps: int | None = None
    decay_steps: int | None = None

    def schedule(self, recipe: Recipe) -> Schedule:
        """The schedule to start with; open-ended under a wall-time budget."""
        schedule = Schedule(peak=recipe.peak_learning_rate, warmup_steps=recipe.warmup_steps)
        if self.steps is None:
            return schedule
        decay = self.decay_steps
        return Schedule(
            peak=schedule.peak,
            warmup_steps=schedule.warmup_steps,
            decay_steps=round(self.steps * recipe.decay_share) if decay is None else decay,
            total_steps=self.steps,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What both models share: corpus, tokenizer and the tokenised train split."""

    corpus: Corpus
    tokenizer: Tokenizer
    data: TrainingData


def prepare_materials(recipe: Recipe) -> Materials:
    """Read the library, learn the tokenizer and tokenise; the same for a given Python version."""
    corpus = load_corpus(recipe.seed, recipe.held_out_share)
    tokenizer = train_tokenizer(file.text for file in corpus.train)
    data = build_training_data(corpus, tokenizer, recipe.seed, recipe.chat_share)
    return Materials(corpus=corpus, tokenizer=tokenizer, data=data)


@dataclass(slots=True, kw_only=True)
class Housekeeping:
    """The after-step hook: progress lines, resumable state, the early snapshot."""

    trainer: Trainer
    materials: Materials
    work: Path
    output: Path
    snapshot_s: float | None
    _saved_at: float = field(default_factory=time.monotonic)

    def __call__(self, progress: Progress) -> None:
        if progress.step % REPORT_EVERY_STEPS == 0:
            self._report(progress)
        if time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self.trainer.save(self.work)
            self._saved_at = time.monotonic()
            print(
                f"saved step {progress.step}, held-out {self._validate():.3f} bits/byte", flush=True
            )
        if self.snapshot_s is not None and progress.elapsed_s >= self.snapshot_s:
            self.snapshot_s = None
            write_checkpoint(self.trainer.model, self.materials.tokenizer, self.output)
            print(f"early snapshot of step {progress.step} in {self.output}", flush=True)

    def _report(self, progress: Progress) -> None:
        schedule = self.trainer.schedule
        rate = schedule.learning_rate(progress.step)
        pace = progress.step / progress.elapsed_s
        end = "open" if schedule.total_steps is None else str(schedule.total_steps)
        print(
            f"step {progress.step}/{end} loss {progress.loss:.3f} rate {rate:.2e} "
            f"{pace:.2f} steps/s {progress.elapsed_s / 60:.1f} min",
            flush=True,
        )

    def _validate(self) -> float:
        model = self.trainer.model
        model.train(False)
        model.set_attn_implementation("sdpa")
        scorer = TextScorer(
            scorer=TransformersScorer(model=model),
            tokenizer=self.materials.tokenizer,
            protocol=Protocol(),
        )
        text = held_out_sample(self.materials.corpus.held_out)
        score = scorer.score([text], max_windows=VALIDATION_WINDOWS)
        model.train()
        return score.bits_per_byte


def build_trainer(kind: str, materials: Materials, recipe: Recipe, bounds: Bounds) -> Trainer:
    """A trainer at step 0; weights depend on the seed alone."""
    torch.manual_seed(recipe.seed)
    sampler = BatchSampler(
        tokens=materials.data.tokens,
        seed=recipe.seed,
        batch_tokens=recipe.batch_tokens,
        lengths=recipe.lengths,
        length_shares=recipe.length_shares,
    )
    budget_s = None if bounds.minutes is None else bounds.minutes * 60
    return Trainer(BUILDERS[kind](), sampler, recipe, bounds.schedule(recipe), budget_s)
