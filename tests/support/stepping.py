"""Drives a `DecoderModel` step by step with paged KV: what a runner does, at its plainest.

Blocks are handed out in a shuffled order, so a backend that assumed neighbours would be caught.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch

from cluster.dist.communicator import Communicator, SingleRank
from moe.layout import ExpertLayout
from replicas.attention.backend import AttentionMetadata
from replicas.layers.weights import WeightProvider
from replicas.models.checkpoint import load_weights
from replicas.models.context import torch_dtype
from replicas.models.decoder import DecoderModel, ForwardBatch
from replicas.models.hf_config import arch_from_hf
from replicas.models.registry import build_model

BLOCK_SIZE = 4
NUM_BLOCKS = 96


def metadata_for(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    tables: Sequence[Sequence[int]],
    block_size: int,
) -> AttentionMetadata:
    """Metadata of a step from plain lists."""
    starts = [0]
    slots: list[int] = []
    for query_len, seq_len, table in zip(query_lens, seq_lens, tables, strict=True):
        starts.append(starts[-1] + query_len)
        slots.extend(
            table[position // block_size] * block_size + position % block_size
            for position in range(seq_len - query_len, seq_len)
        )
    width = max(len(table) for table in tables)
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    return AttentionMetadata(
        query_start=tuple(starts),
        seq_lens=tuple(seq_lens),
        query_start_R1=torch.tensor(starts, dtype=torch.int32),
        seq_lens_R=torch.tensor(seq_lens, dtype=torch.int32),
        block_tables_RN=torch.tensor(padded, dtype=torch.int32),
        slot_mapping_T=torch.tensor(slots),
    )


class Stepper:
    """Requests by name, each with its tokens so far and its blocks."""

    def __init__(
        self, model: DecoderModel, weights: WeightProvider, dtype: str, tp_size: int = 1
    ) -> None:
        self._model = model
        self._weights = weights
        arch = model.arch
        shape = (
            arch.kv_planes,
            NUM_BLOCKS,
            BLOCK_SIZE,
            arch.kv_heads_per_rank(tp_size),
            arch.head_dim,
        )
        # Stale values must never be read: NaN would show.
        self._kv = [torch.full(shape, float("nan"), dtype=torch_dtype(dtype)) for _ in arch.layers]
        self._free = list(range(NUM_BLOCKS))
        random.Random(0).shuffle(self._free)
        self._tables: dict[str, list[int]] = {}
        self._lens: dict[str, int] = {}

    @classmethod
    def load(
        cls,
        path: Path,
        communicator: Communicator | None = None,
        *,
        dtype: str = "float32",
        attention_backend: str = "auto",
        kernels: str = "auto",
        expert_layout: ExpertLayout | None = None,
    ) -> Self:
        """A stepper over a checkpoint directory."""
        communicator = communicator or SingleRank()
        arch = arch_from_hf(json.loads((path / "config.json").read_text()))
        model = build_model(
            arch,
            communicator,
            dtype=dtype,
            device="cpu",
            block_size=BLOCK_SIZE,
            attention_backend=attention_backend,
            kernels=kernels,
            expert_layout=expert_layout,
        )
        weights = load_weights(path, model.units, dtype=dtype, device="cpu", kernels=model.kernels)
        return cls(model, weights, dtype, communicator.size)

    @torch.inference_mode()
    def step(self, work: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Feed each request some tokens, all in one batch; logits of each, (tokens, V)."""
        hidden_TD = self._model.forward(self.batch(work), self._weights, self._kv)
        logits_TV = self._model.logits(hidden_TD, self._weights)
        sizes = [len(tokens) for tokens in work.values()]
        return dict(zip(work, logits_TV.split(sizes), strict=True))

    def batch(self, work: Mapping[str, Sequence[int]]) -> ForwardBatch:
        """The batch of a step that feeds each request some tokens; it must be run once."""
        positions: list[int] = []
        for name, tokens in work.items():
            start = self._lens.get(name, 0)
            self._lens[name] = start + len(tokens)
            positions.extend(range(start, start + len(tokens)))
            table = self._tables.setdefault(name, [])
            while len(table) * BLOCK_SIZE < self._lens[name]:
                table.append(self._free.pop())
        sizes = [len(tokens) for tokens in work.values()]
        return ForwardBatch(
            token_ids_T=torch.tensor([token for tokens in work.values() for token in tokens]),
            positions_T=torch.tensor(positions),
            attention=metadata_for(
                sizes,
                [self._lens[name] for name in work],
                [self._tables[name] for name in work],
                BLOCK_SIZE,
            ),
        )

    def idle(self) -> None:
        """A step in which this rank has no tokens."""
        self._model.forward_idle(self._weights)

    def greedy(self, prompt: Sequence[int], num_tokens: int, name: str = "request") -> list[int]:
        """Prefill in one step, then decode greedily."""
        row = self.step({name: prompt})[name][-1]
        output = [int(row.argmax())]
        while len(output) < num_tokens:
            row = self.step({name: output[-1:]})[name][-1]
            output.append(int(row.argmax()))
        return output
