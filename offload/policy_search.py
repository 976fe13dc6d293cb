"""What to keep where: every placement that fits the budgets, priced by the cost model. Pure.

The space is small (resident layers x format x ring depth x home of the KV cache x micro-batch x
batch), so all of it is enumerated.
There is no rule of thumb for residency: with unlimited demand memory serves throughput better as
KV cache than as resident weights (tokens/s = BW (M - R) / k / (W - R) falls with R while W > M);
with bounded demand, or for latency, what the cache does not need belongs to weights.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from offload.cost_model import (
    PassLoad,
    Resource,
    balance_tokens,
    pass_time,
    time_to_first_token_s,
)
from offload.homes import KvHome, Placement
from offload.model_shape import ModelShape
from offload.rates import Rates
from offload.search_space import (
    Activations,
    Budgets,
    Choices,
    Demand,
    activations,
    host_bytes_of,
    placements,
)


class Objective(enum.StrEnum):
    """What is made as good as possible."""

    THROUGHPUT = "throughput"
    """Tokens per second with all the requests that demand and cache allow."""
    LATENCY = "latency"
    """Time per token of a request that runs alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement with a batch, and what is predicted of it."""

    placement: Placement
    rows: int
    """Requests that decode together."""
    max_rows: int
    """Requests of the mean length that the cache holds."""
    kv_bytes: int
    """Memory of its home that is left for the cache."""
    device_bytes: int
    """Resident weights, ring and windows of the cache."""
    host_bytes: int
    """Staging, weights and a cache that are at home in host memory."""
    workspace_bytes: int
    """What the computation of a step takes of the device."""
    tpot_s: float
    bound: Resource
    context_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together."""
        return self.rows / self.tpot_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of a search."""

    best: Candidate
    chunk_tokens: int
    """Tokens of a pass below which more of them are free (the balance batch), rows included."""
    ttft_s: float
    frontier: tuple[Candidate, ...]
    """Candidates that nothing else beats in both tokens/s and time per token, fastest first."""


def search(
    model: ModelShape,
    rates: Rates,
    budgets: Budgets,
    demand: Demand,
    objective: Objective,
    choices: Choices,
) -> Found | None:
    """The best placement under the budgets; None when none holds one request of the longest.

    Ties go to experts computed on the device, then to larger micro-batches, then to fewer ring
    slots, then to fewer resident layers: memory that buys nothing stays with the KV cache.
    """
    candidates = [
        candidate
        for placement in placements(model, budgets, demand, choices)
        for cut in activations(budgets, choices)
        for candidate in _candidates(model, rates, budgets, demand, (placement, cut))
    ]
    if not candidates:
        return None
    best = min(candidates, key=_score(objective))
    chunk = max(best.rows, min(choices.max_chunk, balance_tokens(model, best.placement, rates)))
    return Found(
        best=best,
        chunk_tokens=chunk,
        ttft_s=time_to_first_token_s(
            model, best.placement, rates, prompt_tokens=demand.prompt_tokens, chunk=chunk
        ),
        frontier=_frontier(candidates),
    )


def _score(objective: Objective) -> Callable[[Candidate], tuple[float, ...]]:
    """A key that is smallest for the best candidate."""

    def key(candidate: Candidate) -> tuple[float, ...]:
        placement = candidate.placement
        smallness = 1 / placement.micro_batch_tokens if placement.micro_batch_tokens else 0.0
        tie = (
            placement.host_experts,
            smallness,
            placement.ring_slots,
            placement.held_bytes,
            placement.resident_layers,
        )
        if objective is Objective.LATENCY:
            alone = candidate.tpot_s if candidate.rows == 1 else float("inf")
            return (_round(alone), -candidate.max_rows, *tie)
        return (-_round(candidate.tokens_per_s), _round(candidate.tpot_s), *tie)

    return key


def _round(value: float) -> float:
    """Four digits: a difference that nobody could measure decides nothing."""
    return float(f"{value:.4g}")


def _candidates(
    model: ModelShape,
    rates: Rates,
    budgets: Budgets,
    demand: Demand,
    choice: tuple[Placement, Activations],
) -> Iterator[Candidate]:
    placement, cut = choice
    placement = replace(placement, micro_batch_tokens=cut.micro_batch_tokens)
    weights = placement.weight_bytes(model)
    left = budgets.device_bytes - cut.workspace_bytes - weights
    host_bytes = host_bytes_of(model, placement) if budgets.host_holds_weights else 0
    host_left = budgets.host_bytes - host_bytes
    if left < 0 or host_left < 0:
        return
    room = left if placement.kv_home is KvHome.DEVICE else host_left
    kv_bytes = room if budgets.kv_bytes is None else budgets.kv_bytes
    held = kv_bytes // model.kv_bytes_per_token
    if kv_bytes > room or held < demand.max_context:
        return
    max_rows = max(1, min(demand.max_rows, held // max(1, demand.context_tokens)))
    for rows in _row_choices(max_rows):
        load = PassLoad(rows=rows, context_tokens=demand.context_tokens)
        time = pass_time(model, placement, rates, load)
        yield Candidate(
            placement=placement,
            rows=rows,
            max_rows=max_rows,
            kv_bytes=kv_bytes,
            device_bytes=weights,
            host_bytes=host_bytes + (kv_bytes if placement.kv_home is not KvHome.DEVICE else 0),
            workspace_bytes=cut.workspace_bytes,
            tpot_s=time.total_s,
            bound=time.bound,
            context_tokens=demand.context_tokens,
        )


def _row_choices(max_rows: int) -> list[int]:
    powers = [1 << power for power in range(max_rows.bit_length())]
    return sorted({*powers, max_rows})


def _frontier(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Not beaten in both; by time per token, so tokens/s rises along it."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (_round(c.tpot_s), -c.tokens_per_s)):
        if not kept or _round(candidate.tokens_per_s) > _round(kept[-1].tokens_per_s):
            kept.append(candidate)
    return tuple(kept)
