"""Expert placement by EPLB's published method, written anew: the baseline of `bench.moe_balance`.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.4, and the README of its load
balancer: pack groups onto nodes, replicate within each node (hierarchical) or everywhere (global),
pack copies onto ranks; heaviest first, equal numbers everywhere, copies share rows equally.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe.node_packing import ExpertRanks
from moe.placement import LayerPlacement


def eplb_global(load_E: Sequence[float], ranks: ExpertRanks) -> LayerPlacement:
    """Replicate and pack without regard to nodes."""
    copies = _replicate(load_E, range(len(load_E)), sum(ranks.slots))
    homes = _pack_copies(load_E, copies, range(ranks.num_ranks), ranks.slots[0])
    return _placement(homes)


def eplb_hierarchical(
    load_E: Sequence[float], ranks: ExpertRanks, groups: Sequence[Sequence[int]]
) -> LayerPlacement:
    """Whole groups onto nodes, then replicate and pack inside each node."""
    nodes = sorted(set(ranks.nodes))
    group_loads = [sum(load_E[expert] for expert in group) for group in groups]
    packs = _pack(group_loads, len(nodes), len(groups) // len(nodes))
    homes: dict[int, list[int]] = {}
    for node, pack in zip(nodes, packs, strict=True):
        experts = [expert for index in pack for expert in groups[index]]
        here = [rank for rank, where in enumerate(ranks.nodes) if where == node]
        slots = ranks.slots[here[0]]
        copies = _replicate(load_E, experts, slots * len(here))
        homes |= _pack_copies(load_E, copies, here, slots)
    return _placement(homes)


def _replicate(
    load_E: Sequence[float], experts: Sequence[int] | range, slots: int
) -> dict[int, int]:
    copies = dict.fromkeys(experts, 1)
    for _ in range(slots - len(copies)):
        hottest = max(copies, key=lambda expert: load_E[expert] / copies[expert])
        copies[hottest] += 1
    return copies


def _pack(weights: Sequence[float], num_packs: int, per_pack: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    filled = [0.0] * num_packs
    for item in sorted(range(len(weights)), key=lambda index: -weights[index]):
        pack = min(
            (pack for pack in range(num_packs) if len(packs[pack]) < per_pack),
            key=lambda pack: filled[pack],
        )
        packs[pack].append(item)
        filled[pack] += weights[item]
    return packs


def _pack_copies(
    load_E: Sequence[float], copies: dict[int, int], ranks: Sequence[int] | range, slots: int
) -> dict[int, list[int]]:
    physical = [expert for expert, count in copies.items() for _ in range(count)]
    packs = _pack([load_E[expert] / copies[expert] for expert in physical], len(ranks), slots)
    homes: dict[int, list[int]] = {}
    for rank, pack in zip(ranks, packs, strict=True):
        for item in pack:
            homes.setdefault(physical[item], []).append(rank)
    return homes


def _placement(homes: dict[int, list[int]]) -> LayerPlacement:
    """Copies share rows equally; two copies on one rank count as two."""
    ordered = [sorted(homes[expert]) for expert in range(len(homes))]
    distinct = [sorted(set(ranks)) for ranks in ordered]
    shares = [
        tuple(ranks.count(rank) / len(ranks) for rank in kept)
        for ranks, kept in zip(ordered, distinct, strict=True)
    ]
    return LayerPlacement(homes=tuple(map(tuple, distinct)), shares=tuple(shares))
