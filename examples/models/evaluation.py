"""Scores and samples a checkpoint through transformers, in fp32 on the CPU.

Implements the `score_windows` callable of `bits_per_byte` for a transformers model; that module
owns how text is cut, this one only runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from examples.models.bits_per_byte import Protocol, Score, Window, byte_lengths, score_text
from examples.models.chat_documents import conversation
from examples.models.demo_tokenizer import (
    END_OF_TEXT_ID,
    TURN_END_ID,
    render_chat,
    token_strings,
)

SAMPLE_PROMPTS = (
    "def ",
    "class Reader:\n    def __init__(self",
    "import os\nimport sys\n\ndef main(",
)
CHAT_QUESTION = "Write a Python function `read_line`. Read one line from the file."


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One continuation; `temperature` 0 is greedy."""

    kind: str
    prompt: str
    temperature: float
    completion: str


def load_in_fp32(directory: Path) -> PreTrainedModel:
    """The bf16 checkpoint in `directory`, widened to fp32, ready to score."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.train(False)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersScorer:
    """`score_windows` on a transformers model; one window per pass, so nothing is padded."""

    model: PreTrainedModel

    @torch.inference_mode()
    def __call__(self, windows: Sequence[Window]) -> list[list[float]]:
        return [self._score(window) for window in windows]

    def _score(self, window: Window) -> list[float]:
        ids_1T = torch.tensor([list(window)])
        logits_TV = self.model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float()
        logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
        chosen: list[float] = logprobs_TV.gather(1, ids_1T[0, 1:, None])[:, 0].tolist()
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScorer:
    """Bits per byte of texts under one model, tokenizer and protocol."""

    scorer: TransformersScorer
    tokenizer: Tokenizer
    protocol: Protocol

    def score(self, texts: Sequence[str], max_windows: int | None = None) -> Score:
        """Total over `texts`; windows never span two of them."""
        vocabulary = token_strings(self.tokenizer)
        lengths = byte_lengths(vocabulary)
        ids = [self.tokenizer.encode(text).ids for text in texts]
        scores = [score_text(row, lengths, self.scorer, self.protocol, max_windows) for row in ids]
        return reduce(add, scores)


@torch.inference_mode()
def expert_load(model: PreTrainedModel, windows: Sequence[Window]) -> list[list[float]]:
    """Share of routed slots that each expert receives, [layers][experts]; empty if dense."""
    experts = getattr(model.config, "num_experts", 0)
    if not experts:
        return []
    counts_LE = torch.zeros(model.config.num_hidden_layers, experts)
    for window in windows:
        output = model(input_ids=torch.tensor([list(window)]), output_router_logits=True)
        for layer, logits_TE in enumerate(output.router_logits):
            chosen = logits_TE.topk(model.config.num_experts_per_tok, dim=-1).indices
            counts_LE[layer] += torch.bincount(chosen.flatten(), minlength=experts)
    shares: list[list[float]] = (counts_LE / counts_LE.sum(dim=1, keepdim=True)).tolist()
    return shares


def draw_samples(model: PreTrainedModel, tokenizer: Tokenizer, seed: int) -> list[Sample]:
    """Greedy and seeded temperature-0.8 continuations of fixed prompts, then one chat answer."""
    prompts = [("completion", prompt, prompt) for prompt in SAMPLE_PROMPTS]
    asked = render_chat(conversation(CHAT_QUESTION, "", with_system=False)[:1])
    prompts.append(("chat", CHAT_QUESTION, asked + "<|im_start|>assistant\n"))
    samples = []
    for kind, shown, prompt in prompts:
        for temperature in (0.0, 0.8):
            torch.manual_seed(seed)
            completion = _complete(model, tokenizer, prompt, temperature)
            samples.append(
                Sample(kind=kind, prompt=shown, temperature=temperature, completion=completion)
            )
    return samples


@torch.inference_mode()
def _complete(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, temperature: float) -> str:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    generate: Any = model.generate
    output = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=128,
        eos_token_id=[END_OF_TEXT_ID, TURN_END_ID],
        pad_token_id=END_OF_TEXT_ID,
        **({"do_sample": False} | sampling),
    )
    completion: str = tokenizer.decode(output[0, ids.shape[1] :].tolist())
    return completion
