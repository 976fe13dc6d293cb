"""What to keep where: every placement that fits the budgets, priced by the cost model. Pure.

The space is small (resident layers x format x ring depth x batch), so all of it is enumerated.
There is no rule of thumb for residency: with unlimited demand memory serves throughput better as
KV cache than as resident weights (tokens/s = BW (M - R) / k / (W - R) falls with R while W > M);
with bounded demand, or for latency, what the cache does not need belongs to weights.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from offload.cost_model import (
    KvHome,
    PassLoad,
    Placement,
    Resource,
    balance_tokens,
    pass_time,
    time_to_first_token_s,
)
from offload.model_shape import ModelShape
from offload.precision import Precision
from offload.rates import Rates

MAX_RESIDENT_CHOICES = 65
"""Deep models are tried with so many numbers of resident layers, evenly spread."""


class Objective(enum.StrEnum):
    """What is made as good as possible."""

    THROUGHPUT = "throughput"
    """Tokens per second with all the requests that demand and cache allow."""
    LATENCY = "latency"
    """Time per token of a request that runs alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes of one rank that may be used."""

    device_bytes: int
    """Resident weights, ring, KV cache and workspace."""
    workspace_bytes: int
    """Part of `device_bytes` that the computation of a step takes."""
    host_bytes: int
    """Host memory for streamed weights and staging; 0 on a CPU replica: it has one memory."""
    kv_bytes: int | None = None
    """Size of the KV cache; None: what the weights leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of the replica."""

    max_rows: int
    """Requests that may run at one time."""
    context_tokens: int
    """Tokens that one of them holds on average."""
    max_context: int
    """Tokens of the longest; the cache must hold one such request."""
    prompt_tokens: int = 512
    """Prompt length for which the time to the first token is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What may be chosen; one entry where the user has decided."""

    precisions: tuple[Precision, ...] = (Precision.NATIVE,)
    ring_slots: tuple[int, ...] = (2, 3, 4)
    expert_shares: tuple[float, ...] = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625, 0.0)
    """Parts of the streamed routed experts that slots are tried for."""
    resident_layers: int | None = None
    """None: free."""
    max_chunk: int = 131_072
    """Most tokens of a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement with a batch, and what is predicted of it."""

    placement: Placement
    rows: int
    """Requests that decode together."""
    max_rows: int
    """Requests of the mean length that the cache holds."""
    kv_bytes: int
    """Device memory left for the cache."""
    device_bytes: int
    """Resident weights and ring."""
    host_bytes: int
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

    Ties go to fewer ring slots, then to fewer resident layers: memory that buys nothing stays
    with the KV cache.
    """
    candidates = [
        candidate
        for placement in _placements(model, budgets, choices)
        for candidate in _candidates(model, rates, budgets, demand, placement)
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
        tie = (placement.ring_slots, placement.resident_layers)
        if objective is Objective.LATENCY:
            alone = candidate.tpot_s if candidate.rows == 1 else float("inf")
            return (_round(alone), -candidate.max_rows, *tie)
        return (-_round(candidate.tokens_per_s), _round(candidate.tpot_s), *tie)

    return key


def _round(value: float) -> float:
    """Four digits: a difference that nobody could measure decides nothing."""
    return float(f"{value:.4g}")


def _placements(model: ModelShape, budgets: Budgets, choices: Choices) -> Iterator[Placement]:
    layers = len(model.layers)
    for precision in choices.precisions:
        for slots in choices.ring_slots:
            for fixed in (True, False):
                for resident in _resident_choices(model, choices.resident_layers):
                    base = Placement(
                        resident_layers=resident,
                        host_layers=0,
                        fixed_resident=fixed,
                        precision=precision,
                        ring_slots=slots,
                        kv_home=KvHome.DEVICE,
                    )
                    if slots <= layers - resident:
                        for placement in _expert_homes(model, base, choices):
                            yield replace(
                                placement, host_layers=_host_layers(model, placement, budgets)
                            )


def _expert_homes(model: ModelShape, base: Placement, choices: Choices) -> Iterator[Placement]:
    """With each number of expert slots, for a model whose streamed layers have routed experts."""
    count = base.streamed_experts(model)
    if not count:
        yield base
        return
    least = least_expert_slots(model)
    for slots in sorted({max(least, round(share * count)) for share in choices.expert_shares}):
        for bases_resident in (False, True):
            yield replace(base, expert_slots=min(slots, count), bases_resident=bases_resident)


def least_expert_slots(model: ModelShape) -> int:
    """Slots without which streaming experts makes no sense: one token's, and one to read into."""
    return 1 + max((layer.top_k for layer in model.layers), default=0)


def _resident_choices(model: ModelShape, wanted: int | None) -> Sequence[int]:
    """Of a mixture none unless asked: slots hold what is visited, in any layer."""
    layers = len(model.layers)
    if wanted is not None:
        return (wanted,)
    if any(layer.experts for layer in model.layers):
        return (0,)
    if layers <= MAX_RESIDENT_CHOICES:
        return range(layers)
    steps = MAX_RESIDENT_CHOICES - 1
    return sorted({(layers - 1) * step // steps for step in range(steps + 1)})


def _host_layers(model: ModelShape, base: Placement, budgets: Budgets) -> int:
    """As many streamed layers as host memory holds: a link is never slower than disk and link."""
    sizes = [layer.record_bytes(base.precision) for layer in model.layers[base.resident_layers :]]
    if sum(sizes) <= budgets.host_bytes:
        return len(sizes)
    room = budgets.host_bytes - base.ring_slots * base.slot_bytes(model)  # staging for the disk
    count = 0
    for size in sizes:
        room -= size
        if room < 0:
            break
        count += 1
    return count


def _candidates(
    model: ModelShape, rates: Rates, budgets: Budgets, demand: Demand, placement: Placement
) -> Iterator[Candidate]:
    weights = placement.weight_bytes(model)
    left = budgets.device_bytes - budgets.workspace_bytes - weights
    kv_bytes = left if budgets.kv_bytes is None else budgets.kv_bytes
    if kv_bytes > left:
        return
    held = kv_bytes // model.kv_bytes_per_token
    if held < demand.max_context:
        return
    host_bytes = host_bytes_of(model, placement, has_host=budgets.host_bytes > 0)
    if host_bytes > budgets.host_bytes:
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
            host_bytes=host_bytes,
            tpot_s=time.total_s,
            bound=time.bound,
            context_tokens=demand.context_tokens,
        )


def host_bytes_of(model: ModelShape, placement: Placement, *, has_host: bool) -> int:
    """Host bytes of a placement: layers that live there, and staging for those on disk."""
    if not has_host:
        return 0
    start = placement.resident_layers
    homes = model.layers[start : start + placement.host_layers]
    held = sum(layer.record_bytes(placement.precision) for layer in homes)
    if start + placement.host_layers == len(model.layers) and placement.fixed_resident:
        return held
    return held + placement.ring_slots * placement.slot_bytes(model)


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
