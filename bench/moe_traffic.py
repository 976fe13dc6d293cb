"""Synthetic routing with skew, and the rows that a placement makes cross between nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe.load_split import source_shares
from moe.placement import LayerPlacement

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Group-limited routing as in DeepSeek-V3, over experts of Zipf popularity."""

    num_experts: int
    top_k: int
    num_groups: int
    top_groups: int
    zipf: float

    @property
    def groups(self) -> list[list[int]]:
        """Experts of each group."""
        size = self.num_experts // self.num_groups
        return [list(range(group * size, (group + 1) * size)) for group in range(self.num_groups)]

    def logits(self, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """Popularity of the experts of one layer: log of a shuffled Zipf law."""
        popularity = 1.0 / np.arange(1, self.num_experts + 1) ** self.zipf
        rng.shuffle(popularity)
        logits: npt.NDArray[np.float64] = np.log(popularity)
        return logits

    def tokens(
        self, logits_E: npt.NDArray[np.float64], count: int, rng: np.random.Generator
    ) -> Ids:
        """Experts of `count` tokens, (T, K): noisy logits, best groups, best experts in them."""
        scores = logits_E + rng.gumbel(size=(count, self.num_experts))
        by_group = scores.reshape(count, self.num_groups, -1)
        top2 = np.sort(by_group, axis=-1)[..., -2:].sum(-1)
        kept = np.argsort(-top2, axis=1)[:, : self.top_groups]
        mask = np.full((count, self.num_groups), -np.inf)
        np.put_along_axis(mask, kept, 0.0, axis=1)
        limited = (by_group + mask[..., None]).reshape(count, -1)
        return np.argsort(-limited, axis=1)[:, : self.top_k].astype(np.int64)


def inter_node_rows(
    tokens_TK: Ids, placement: LayerPlacement, nodes: tuple[int, ...], rng: np.random.Generator
) -> float:
    """Rows per token that leave its node: distinct other nodes among its experts' copies."""
    node_ids = sorted(set(nodes))
    choices = [
        [
            source_shares(homes, shares, nodes, source)
            for homes, shares in zip(placement.homes, placement.shares, strict=True)
        ]
        for source in node_ids
    ]
    crossing = 0
    sources = rng.integers(len(node_ids), size=len(tokens_TK))
    picks = rng.random(tokens_TK.shape)
    for experts_K, source, draws in zip(tokens_TK, sources, picks, strict=True):
        reached = set()
        for expert, draw in zip(experts_K, draws, strict=True):
            shares = np.cumsum(choices[source][expert])
            copy = min(int(np.searchsorted(shares, draw)), len(shares) - 1)
            reached.add(nodes[placement.homes[expert][copy]])
        crossing += len(reached - {node_ids[source]})
    return crossing / len(tokens_TK)
