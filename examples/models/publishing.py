"""Turns saved training state into what is committed: checkpoint, figures, card, sample text.

Every figure is measured on the bf16 checkpoint as written, read back through transformers and run
in fp32; nothing is carried over from training but step count, wall time and loss.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from examples.models.bits_per_byte import Protocol, Score, cut_windows
from examples.models.card import render_card
from examples.models.checkpoint import write_checkpoint
from examples.models.corpus import held_out_sample
from examples.models.demo_tokenizer import END_OF_TEXT_ID
from examples.models.evaluation import (
    TextScorer,
    TransformersScorer,
    draw_samples,
    expert_load,
    load_in_fp32,
)
from examples.models.recipes import Recipe, active_parameters
from examples.models.trainer import Trainer
from examples.models.training_run import Materials

SAMPLE_NAME = "heldout.txt"
DENSE_NAMES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)
MOE_NAMES = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
PREFIX_WINDOWS = 8
"""`training.json` also holds the figure of this many leading windows, for quick checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publisher:
    """Writes one model below `root`, next to the sample text that both models share."""

    root: Path
    kind: str
    recipe: Recipe
    materials: Materials
    protocol: Protocol = field(default=Protocol(start_token_id=END_OF_TEXT_ID))

    def publish(self, trainer: Trainer) -> dict[str, Any]:
        """Write checkpoint, sample text, `training.json` and card; returns the record."""
        directory = self.root / f"demo-{self.kind}"
        write_checkpoint(trainer.model, self.materials.tokenizer, directory)
        sample = held_out_sample(self.materials.corpus.held_out)
        (self.root / SAMPLE_NAME).write_text(sample, encoding="utf-8")
        model = load_in_fp32(directory)
        record = {
            "name": directory.name,
            "model": self._describe_model(model),
            "data": self._describe_data(),
            "run": self._describe_run(trainer),
            "evaluation": self._evaluate(model, sample),
            "samples": [
                asdict(sample)
                for sample in draw_samples(model, self.materials.tokenizer, self.recipe.seed)
            ],
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (directory / "training.json").write_text(text, encoding="utf-8")
        (directory / "README.md").write_text(render_card(record), encoding="utf-8")
        return record

    def _describe_model(self, model: PreTrainedModel) -> dict[str, Any]:
        config = model.config
        names = DENSE_NAMES + (MOE_NAMES if getattr(config, "num_experts", 0) else ())
        return {
            "architecture": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "active_parameters": active_parameters(model),
            "dtype": "bfloat16",
            "config": {name: getattr(config, name) for name in names},
        }

    def _describe_data(self) -> dict[str, Any]:
        corpus, data = self.materials.corpus, self.materials.data
        return {
            "source": "Python standard library sources (tests and generated tables left out)",
            "python_version": platform.python_version(),
            "corpus_sha256": corpus.digest,
            "split_seed": self.recipe.seed,
            "train_files": len(corpus.train),
            "train_bytes": sum(file.num_bytes for file in corpus.train),
            "train_tokens": len(data.tokens),
            "chat_documents": data.num_chats,
            "chat_tokens": data.chat_tokens,
            "held_out_files": [file.path for file in corpus.held_out],
            "held_out_bytes": sum(file.num_bytes for file in corpus.held_out),
        }

    def _describe_run(self, trainer: Trainer) -> dict[str, Any]:
        progress = trainer.progress
        return {
            "steps": progress.step,
            "cycles": trainer.cycles,
            "tokens_seen": progress.step * self.recipe.batch_tokens,
            "wall_seconds": round(progress.elapsed_s, 1),
            "final_training_loss": round(progress.loss, 4),
            "recipe": asdict(self.recipe),
            "machine": "one CPU thread, bf16 autocast over fp32 weights, "
            + torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def _evaluate(self, model: PreTrainedModel, sample: str) -> dict[str, Any]:
        tokenizer = self.materials.tokenizer
        scorer = TextScorer(
            scorer=TransformersScorer(model=model), tokenizer=tokenizer, protocol=self.protocol
        )
        windows = cut_windows(tokenizer.encode(sample).ids, self.protocol)
        held_out = [file.text for file in self.materials.corpus.held_out]
        return {
            "protocol": asdict(self.protocol)
            | {
                "file": SAMPLE_NAME,
                "sha256": hashlib.sha256(sample.encode()).hexdigest(),
                "rule": "Tokenise the text without special tokens; cut it into consecutive windows "
                "of window_tokens - 1 text tokens, the last may be shorter; score each window on "
                "its own behind start_token_id, every text token once; sum -log2 p and divide by "
                "the UTF-8 bytes that the scored tokens spell.",
                "arithmetic": "fp32 on the bf16 checkpoint, transformers, CPU",
            },
            SAMPLE_NAME: _figures(scorer.score([sample])),
            "prefix": _figures(scorer.score([sample], max_windows=PREFIX_WINDOWS)),
            "held_out_split": _figures(scorer.score(held_out)),
            "expert_load": expert_load(model, windows),
        }


def _figures(score: Score) -> dict[str, float | int]:
    return {
        "bits_per_byte": score.bits_per_byte,
        "bytes": score.num_bytes,
        "tokens": score.tokens,
        "windows": score.windows,
    }
