"""One step of attention as tests describe it: ragged requests, shuffled blocks, seeded tensors."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from replicas.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec
from tests.support.stepping import metadata_for

NUM_BLOCKS = 96


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One step: requests as (query tokens, tokens before them)."""

    requests: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    block_size: int = 4
    window: int | None = None
    dtype: str = "float32"
    seed: int = 0
    sinks: bool = False
    shared_plane: bool = False

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_heads=self.kv_heads * self.group,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=0.3,
            block_size=self.block_size,
            dtype=self.dtype,
            device="cpu",
            sinks=self.sinks,
            shared_plane=self.shared_plane,
        )

    @property
    def fits(self) -> bool:
        return sum(-(-sum(pair) // self.block_size) for pair in self.requests) <= NUM_BLOCKS

    def metadata(self) -> AttentionMetadata:
        free = list(range(NUM_BLOCKS))
        random.Random(self.seed).shuffle(free)
        lens = [query + before for query, before in self.requests]
        tables = [[free.pop() for _ in range(-(-size // self.block_size))] for size in lens]
        return metadata_for([q for q, _ in self.requests], lens, tables, self.block_size)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """query, key, value and a cache full of other requests' values."""
        tokens = sum(query for query, _ in self.requests)
        row = (tokens, self.kv_heads, self.head_dim)
        planes = 1 if self.shared_plane else 2
        query = self._noise(0, tokens, self.kv_heads * self.group, self.head_dim)
        key = self._noise(1, *row)
        value = key if self.shared_plane else self._noise(2, *row)
        cache = self._noise(3, planes, NUM_BLOCKS, self.block_size, *row[1:])
        return query, key, value, cache.expand(2, -1, -1, -1, -1)

    def sinks_H(self) -> torch.Tensor | None:  # noqa: N802 - dimensions are upper-case
        """Scores that take a good share of the softmax."""
        return 2 * self._noise(4, self.kv_heads * self.group) if self.sinks else None

    def run(self, backend: AttentionBackend) -> tuple[torch.Tensor, torch.Tensor]:
        """What the backend gives, and the cache after it."""
        query, key, value, cache = self.tensors()
        output = backend.forward(
            query, key, value, cache, self.metadata(), self.window, self.sinks_H()
        )
        return output, cache

    def run_alone(
        self, backend: AttentionBackend, rows: range, cache: torch.Tensor
    ) -> torch.Tensor:
        """`rows` of one request in a step of their own, over a cache that holds what is before."""
        query, key, value, _ = self.tensors()
        metadata = self.metadata()
        request = sum(begin <= rows.start for begin in metadata.query_start[:-1]) - 1
        before = self.requests[request][1] + rows.start - metadata.query_start[request]
        table = metadata.block_tables_RN[request].tolist()
        here = slice(rows.start, rows.stop)
        return backend.forward(
            query[here],
            key[here],
            value[here],
            cache,
            metadata_for([len(rows)], [before + len(rows)], [table], self.block_size),
            self.window,
            self.sinks_H(),
        )

    def _noise(self, part: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 8 + part)
        return torch.randn(shape, generator=generator).to(getattr(torch, self.dtype))
