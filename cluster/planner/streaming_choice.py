"""What was decided for a model whose weights are streamed, and its slices of the plan. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.base.amount_text import size_text
from cluster.base.plan import OffloadPlan, SpeedPlan, SpeedPoint
from offload.compression import Compression
from offload.cost_model import PassLoad, host_costs, host_experts_share, pass_time
from offload.homes import KvHome, Placement
from offload.model_shape import ModelShape
from offload.policy_search import Candidate, Found
from offload.rates import Rates
from offload.search_space import Budgets, Demand

READ_TIMEOUT_S = 30.0
"""A read that has not ended after so long never will."""
READ_SHARE = 0.8
"""Of the time that a step may take, what one read may take."""
MAX_POINTS = 16
"""Points of the frontier that a plan carries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """The chosen placement, and everything that it was chosen from."""

    why: str
    """Why the model is streamed at all; empty when the user said so."""
    fits: bool
    """Whether the model would fit without streaming."""
    disk_path: str
    model: ModelShape
    rates: Rates
    budgets: Budgets
    demand: Demand
    found: Found
    block_size: int
    """Tokens of a block of the KV cache."""
    is_packed: bool = True
    shares: bool = False
    """Whether replicas of a node have resident units in common."""
    num_sharing: int = 1
    """Data-parallel groups, which read and hold all but their experts together."""
    not_compressed: str = ""
    """Why records were left as they are without asking the search; empty where it decided."""

    @property
    def shared_bytes(self) -> int:
        """Of the weights of a rank, what its node holds once."""
        return self.placement.resident_bytes(self.model) if self.shares else 0

    @property
    def placement(self) -> Placement:
        """Where the weights are."""
        return self.found.best.placement

    def offload_plan(self, step_timeout_s: float) -> OffloadPlan:
        """The rank's slice; a read that hangs is named before the step is given up."""
        placement, model = self.placement, self.model
        first_disk = placement.resident_layers + placement.host_layers
        resident = list(_unit_names(model, 0, placement.resident_layers))
        if placement.bases_resident:
            streamed = model.layers[placement.resident_layers :]
            resident += [layer.base.name for layer in streamed]
        if placement.fixed_resident:
            resident += [unit.name for unit in model.fixed_units]
        host = list(_unit_names(model, placement.resident_layers, first_disk))
        if placement.fixed_on_host:
            host += [unit.name for unit in model.fixed_units]
        return OffloadPlan(
            disk_path=self.disk_path,
            device_bytes=self.budgets.device_bytes,
            host_bytes=self.budgets.host_bytes,
            workspace_bytes=self.found.best.workspace_bytes,
            micro_batch_tokens=placement.micro_batch_tokens,
            kv_home=placement.kv_home.value,
            kv_windows=placement.kv_windows,
            kv_window_blocks=placement.kv_window_tokens // self.block_size,
            resident_units=tuple(resident),
            is_packed=self.is_packed,
            share_resident=self.shares and bool(resident),
            num_sharing=self.num_sharing,
            host_units=tuple(host),
            held_bytes=placement.held_bytes,
            ring_slots=placement.ring_slots,
            prefetch_depth=placement.ring_slots,
            expert_slots=placement.expert_slots,
            host_experts=host_costs(self.rates) if placement.host_experts else None,
            read_timeout_s=min(READ_TIMEOUT_S, READ_SHARE * step_timeout_s),
            precision=placement.precision.value,
            compression=placement.compression.value,
        )

    def speed_plan(self) -> SpeedPlan:
        """What is predicted."""
        rows, context = self.found.best.rows, self.demand.context_tokens
        disk_bytes, host_bytes = self.placement.streamed_bytes(self.model, rows, rows * context)
        load = PassLoad(rows=rows, context_tokens=context)
        host_bytes -= host_experts_share(self.model, self.placement, self.rates, load)[0]
        return SpeedPlan(
            chosen=_point(self.found.best),
            ttft_s=self.found.ttft_s,
            prompt_tokens=self.demand.prompt_tokens,
            context_tokens=self.demand.context_tokens,
            disk_bytes=round(self.placement.read_bytes(self.model, disk_bytes)),
            stored_share=self.placement.stored_share(self.model),
            host_bytes=host_bytes + self._streamed_kv_bytes,
            rates=self._speeds(),
            frontier=tuple(_point(candidate) for candidate in _thinned(self.found.frontier)),
        )

    def compression_reason(self) -> str:
        """Why records lie on disk as they do, where the user left that open."""
        if self.not_compressed:
            return self.not_compressed
        if self.placement.compression is Compression.NONE:
            return "no faster: something else than the disk decides, or decoding is too slow"
        return (
            f"{self.model.stored_share:.0%} of the bytes by a sample of the weights, decoded at "
            f"{self.rates.decode_bytes_per_s / 1e9:.3g} GB/s"
        )

    def _speeds(self) -> dict[str, float]:
        speeds = {
            "disk": self.rates.disk_bytes_per_s,
            "link": self.rates.link_bytes_per_s,
            "memory": self.rates.memory_bytes_per_s,
        }
        if self.placement.compression is not Compression.NONE:
            speeds["decoding"] = self.rates.decode_bytes_per_s
        return speeds

    @property
    def resident_tokens_per_s(self) -> float:
        """What the same batch would give with all weights on the device."""
        everything = Placement(
            resident_layers=len(self.model.layers),
            host_layers=0,
            precision=self.placement.precision,
            ring_slots=0,
        )
        rows = self.found.best.rows
        load = PassLoad(rows=rows, context_tokens=self.demand.context_tokens)
        return rows / pass_time(self.model, everything, self.rates, load).total_s

    def reason(self) -> str:
        """Where the weights are and how fast that is, in a sentence."""
        placement, layers = self.placement, len(self.model.layers)
        on_disk = layers - placement.resident_layers - placement.host_layers
        homes = {
            "on the device": placement.resident_layers,
            "in host memory": placement.host_layers,
            "on disk": on_disk,
        }
        where = ", ".join(f"{count} {home}" for home, count in homes.items() if count)
        if placement.expert_slots:
            rest = ", the rest of them on the device" if placement.bases_resident else ""
            experts = placement.streamed_experts(self.model)
            where += f" ({placement.expert_slots} of {experts} experts in slots{rest})"
        if placement.host_experts:
            where += ", experts of few rows computed by the host's cores"
        best = self.found.best
        if placement.kv_home is not KvHome.DEVICE:
            where += f", keys and values in host memory{self._windows()}"
        if placement.compression is not Compression.NONE:
            where += f", records compressed to {self.model.stored_share:.0%} without loss"
        if placement.held_bytes:
            where += f", {size_text(placement.held_bytes)} of them held in memory as stored"
        if placement.micro_batch_tokens:
            where += f", computed in micro-batches of {placement.micro_batch_tokens} tokens"
        speed = (
            f"predicted {best.tokens_per_s:.3g} tokens/s with {best.rows} requests, "
            f"bound by {best.bound.value}"
        )
        if self.num_sharing > 1:
            piece = self.model.layers[-1].base.record_bytes(placement.precision)
            where += (
                f", all but the experts read in {self.num_sharing} pieces (of a layer "
                f"{size_text(piece)} each), one by a rank of each group, and held once for all"
            )
            speed += f", in each of {self.num_sharing} groups"
        if self.shared_bytes:
            where += f", {size_text(self.shared_bytes)} of it once for all replicas of a node"
        if not self.is_packed:
            speed += " if it were packed; straight from the checkpoint's files it is slower"
        start = f"{self.why}; " if self.why else ""
        return f"{start}of {layers} layers {where}; {speed}"

    @property
    def _streamed_kv_bytes(self) -> int:
        """Keys and values that a step brings to the device."""
        if self.placement.kv_home is not KvHome.STREAMED:
            return 0
        tokens = self.found.best.rows * self.demand.context_tokens
        return tokens * self.model.kv_bytes_per_token

    def _windows(self) -> str:
        placement = self.placement
        if not placement.kv_windows:
            return ""
        size = placement.window_bytes(self.model)
        return (
            f" through {placement.kv_windows} windows of {placement.kv_window_tokens} tokens "
            f"({size_text(size)})"
        )


def _unit_names(model: ModelShape, start: int, stop: int) -> Iterator[str]:
    for layer in model.layers[start:stop]:
        yield layer.base.name
        yield from layer.routed or (expert.name for expert in layer.experts)


def _point(candidate: Candidate) -> SpeedPoint:
    return SpeedPoint(
        rows=candidate.rows,
        tokens_per_s=candidate.tokens_per_s,
        tpot_s=candidate.tpot_s,
        resident_layers=candidate.placement.resident_layers,
        precision=candidate.placement.precision.value,
        compression=candidate.placement.compression.value,
        held_bytes=candidate.placement.held_bytes,
        micro_batch_tokens=candidate.placement.micro_batch_tokens,
        kv_home=candidate.placement.kv_home.value,
        bound=candidate.bound.value,
    )


def _thinned(frontier: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """At most `MAX_POINTS`, both ends among them."""
    last = len(frontier) - 1
    if last < MAX_POINTS:
        return frontier
    kept = {round(step * last / (MAX_POINTS - 1)) for step in range(MAX_POINTS)}
    return tuple(frontier[index] for index in sorted(kept))
